use super::*;

const TABLE_SIZE: u32 = 64;

fn call(number: i64, arguments: &[u64]) -> Syscall {
    let mut all = [u64::MAX; 6];
    all[..arguments.len()].copy_from_slice(arguments);
    Syscall {
        number,
        arguments: all,
    }
}

fn uses(call: &SyscallFds, fd: i32) -> bool {
    call.fds.as_ref().is_none_or(|fds| fds.contains(&fd))
}

fn nothing(_: u64, _: usize) -> Option<Vec<u8>> {
    None
}

#[test]
fn a_call_on_the_descriptor_is_seen() {
    let on = |number, arguments: &[u64]| {
        uses(
            &SyscallFds::of(1, &call(number, arguments), &nothing, TABLE_SIZE),
            7,
        )
    };
    assert!(on(libc::SYS_recvfrom, &[7]));
    assert!(!on(libc::SYS_recvfrom, &[8, 7]));
    // The kernel takes the lower half.
    assert!(on(libc::SYS_read, &[0xffff_0000_0000_0007]));
    assert!(on(libc::SYS_sendfile, &[3, 7]));
    assert!(on(libc::SYS_splice, &[3, 0, 7]));
    assert!(on(libc::SYS_epoll_ctl, &[3, 1, 7]));
    // The number of events is not a descriptor.
    assert!(!on(libc::SYS_epoll_pwait, &[3, 0x1000, 7]));
    assert!(on(libc::SYS_epoll_pwait, &[7, 0x1000, 7]));
    assert!(!on(libc::SYS_futex, &[7, 7, 7]));
    // The registers of an exiting thread can contain any number.
    assert!(!on(libc::SYS_exit, &[0, 7, 7]));
    // An unknown call.
    for position in 0..3 {
        let mut arguments = [0; 3];
        arguments[position] = 7;
        assert!(on(9999, &arguments));
    }
    assert!(!on(9999, &[0, 0, 0, 7]));
    #[cfg(target_arch = "x86_64")]
    assert!(on(OTHER_ABI | libc::SYS_poll, &[0x1000, 1]));
}

#[test]
fn lists_of_descriptors_are_read_from_memory() {
    let pollfds: Vec<u8> = [5i32, 7]
        .iter()
        .flat_map(|fd| [fd.to_ne_bytes(), [1, 0, 0, 0]].concat())
        .collect();
    let memory = |address: u64, len: usize| {
        let from = usize::try_from(address.checked_sub(0x1000)?).ok()?;
        pollfds.get(from..from + len).map(<[u8]>::to_vec)
    };
    let on = |number, fd, arguments: &[u64]| {
        uses(
            &SyscallFds::of(1, &call(number, arguments), &memory, TABLE_SIZE),
            fd,
        )
    };
    for number in [libc::SYS_ppoll, libc::SYS_restart_syscall] {
        assert!(on(number, 7, &[0x1000, 2]), "{number}");
        assert!(!on(number, 7, &[0x1000, 1]), "{number}");
        assert!(!on(number, 9, &[0x1000, 2]), "{number}");
    }
    // A list that cannot be read may contain any descriptor; but a restarted call need not be a poll at all.
    assert!(on(libc::SYS_ppoll, 9, &[0x1000, 3]));
    assert!(on(libc::SYS_ppoll, 9, &[0x1000, u64::MAX]));
    assert!(!on(libc::SYS_ppoll, 9, &[0, 0]));
    assert!(!on(
        libc::SYS_restart_syscall,
        9,
        &[0x1000, 0x7fff_1234_5678]
    ));

    let sets = |address: u64, len: usize| match (address, len) {
        (0x2000, 1) => Some(vec![0b1000_0000]),
        (0x2000, 2) => Some(vec![0b1000_0000, 0]),
        _ => None,
    };
    let on_with = |table_size, fd, arguments: &[u64]| {
        uses(
            &SyscallFds::of(1, &call(libc::SYS_pselect6, arguments), &sets, table_size),
            fd,
        )
    };
    let on = |fd, arguments: &[u64]| on_with(u32::MAX, fd, arguments);
    assert!(on(7, &[8, 0x2000, 0, 0]));
    assert!(on(7, &[8, 0, 0, 0x2000]));
    assert!(!on(7, &[7, 0x2000, 0, 0]));
    assert!(!on(6, &[8, 0x2000, 0, 0]));
    assert!(!on(8, &[9, 0x2000, 0, 0]));
    assert!(on(8, &[9, 0x3000, 0, 0]), "cannot be read");
    assert!(!on(7, &[0, 0, 0, 0]));
    assert!(on(9, &[0x7fff_ffff, 0, 0, 0]), "too long to be read");
    // Only as many bits as the table has slots are read.
    assert!(on_with(8, 7, &[0x7fff_ffff, 0x2000, 0, 0]));
    assert!(!on_with(16, 9, &[0x7fff_ffff, 0x2000, 0, 0]));
}

#[test]
fn a_futex_wait_is_not_a_list() {
    const FUTEX_WAIT_BITSET_PRIVATE: u64 = 137;
    let on = |entries: &[(i32, u16)], count| {
        let list: Vec<u8> = entries
            .iter()
            .flat_map(|(fd, events)| {
                [&fd.to_ne_bytes()[..], &events.to_ne_bytes(), &[0; 2]].concat()
            })
            .collect();
        let memory = |_, len: usize| list.get(..len).map(<[u8]>::to_vec);
        let call = call(libc::SYS_restart_syscall, &[0x1000, count]);
        uses(&SyscallFds::of(1, &call, &memory, TABLE_SIZE), 7)
    };
    assert!(on(&[(7, 0)], 1));
    // How programs mark an unused entry.
    assert!(on(&[(-1, 0), (!7, 1), (7, 0x2001)], 3));
    // Memory at a futex, with a 7 in the right place.
    let mut memory = vec![(0, 0); 200];
    memory[3].0 = 7;
    assert!(
        on(&memory, FUTEX_WAIT_BITSET_PRIVATE),
        "cannot be distinguished"
    );
    memory[100] = (0x7f12, 0x3456);
    assert!(!on(&memory, FUTEX_WAIT_BITSET_PRIVATE), "an address");
    memory[100] = (i32::MIN, 0);
    assert!(!on(&memory, FUTEX_WAIT_BITSET_PRIVATE), "not a descriptor");
    memory[100] = (1, 0x0800);
    assert!(!on(&memory, FUTEX_WAIT_BITSET_PRIVATE), "not an event");
}

#[test]
fn calls_that_a_stop_would_end_short() {
    let all = u64::from(libc::MSG_WAITALL.cast_unsigned());
    let short = |number, arguments: &[u64]| call(number, arguments).can_end_short();
    assert!(short(libc::SYS_write, &[3, 0x1000, 200_000]));
    assert!(!short(libc::SYS_write, &[3, 0x1000, 1]));
    assert!(short(libc::SYS_sendto, &[3, 0x1000, 2, 0]));
    assert!(short(libc::SYS_sendmsg, &[3, 0x1000, 0]));
    assert!(short(libc::SYS_sendfile, &[3, 4, 0, 4096]));
    assert!(short(libc::SYS_splice, &[3, 0, 4, 0, 4096]));
    assert!(!short(libc::SYS_splice, &[3, 0, 4, 0, 1]));
    assert!(short(libc::SYS_recvfrom, &[3, 0x1000, 1000, all]));
    assert!(!short(libc::SYS_recvfrom, &[3, 0x1000, 1000, 0]));
    assert!(short(libc::SYS_recvmsg, &[3, 0x1000, all]));
    assert!(short(libc::SYS_recvmmsg, &[3, 0x1000, 8, 0]));
    assert!(!short(libc::SYS_recvmmsg, &[3, 0x1000, 8, 0x10000]));
    assert!(!short(libc::SYS_read, &[3, 0x1000, 1000]));
    assert!(!short(libc::SYS_epoll_pwait, &[3]));
}

#[test]
fn a_call_with_spurious_wake_ups_has_no_risk() {
    let risk = |number, arguments: &[u64]| call(number, arguments).false_return_risk();
    assert_eq!(
        risk(libc::SYS_futex, &[0x1000, 0x80]),
        FalseReturnRisk::ZeroOnly
    );
    assert_eq!(
        risk(libc::SYS_futex, &[0x1000, 0x189]),
        FalseReturnRisk::ZeroOnly
    );
    // FUTEX_LOCK_PI: 0 means that it has the lock.
    assert_eq!(
        risk(libc::SYS_futex, &[0x1000, 0x86]),
        FalseReturnRisk::High
    );
    assert_eq!(risk(libc::SYS_epoll_pwait, &[3]), FalseReturnRisk::Low);
    let restarted = |second| risk(libc::SYS_restart_syscall, &[0x7f12_3456_7000, second]);
    assert_eq!(
        restarted(0x7f12_3456_7010),
        FalseReturnRisk::AnyResult,
        "nanosleep with a remainder"
    );
    assert_eq!(
        restarted(0),
        FalseReturnRisk::AnyResult,
        "nanosleep without"
    );
    assert_eq!(restarted(2), FalseReturnRisk::Low, "poll of two");
    assert_eq!(risk(libc::SYS_accept4, &[3]), FalseReturnRisk::High);
    assert!(FalseReturnRisk::AnyResult < FalseReturnRisk::ZeroOnly);
    assert!(
        FalseReturnRisk::ZeroOnly < FalseReturnRisk::Low
            && FalseReturnRisk::Low < FalseReturnRisk::High
    );
    assert!(FalseReturnRisk::High < FalseReturnRisk::Unknown);
}

#[test]
fn calls_of_threads_are_parsed() {
    let line = "232 0x4 0x7ffd1000 0x80 0xffffffffffffffff 0x0 0x8 0x7ffd0f00 0x7f0012345678\n";
    let call = Syscall::parse(line).unwrap();
    assert_eq!(
        (call.number, call.arguments[..3].to_vec()),
        (232, vec![4, 0x7ffd_1000, 0x80])
    );
    for none in ["running\n", "-1 0x7ffd0f00 0x7f0012345678\n", "", "232 0x4"] {
        assert_eq!(Syscall::parse(none), None, "{none}");
    }
}
