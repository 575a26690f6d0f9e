use super::*;
use std::time::Duration;

#[test]
fn who_could_share_a_table() {
    let status =
        |uid, size, memory| format!("Name:\tx\nUid:\t{uid}\t{uid}\nFDSize:\t{size}\n{memory}");
    let owner = status(7, 64, "VmSize:\t9 kB\n");
    assert!(could_share(&owner, &owner));
    // It may have changed its user.
    assert!(could_share(&owner, &status(8, 64, "VmSize:\t9 kB\n")));
    assert!(!could_share(&owner, &status(7, 128, "VmSize:\t9 kB\n")));
    assert!(!could_share(&owner, &status(7, 64, "Threads:\t1\n")));
}

#[test]
fn a_first_thread_that_has_exited_is_detected() {
    let status = |state, threads| format!("Name:\tx\nState:\t{state}\nThreads:\t{threads}\n");
    assert!(leader_exited(&status("Z (zombie)", 2)));
    assert!(!leader_exited(&status("Z (zombie)", 1)), "all threads have");
    assert!(!leader_exited(&status("S (sleeping)", 2)));
}

#[test]
fn a_process_runs_until_it_has_ended() {
    let proc = ProcFs::default();
    let own = i32::try_from(std::process::id()).unwrap();
    let start_time = proc.start_time(own).unwrap();
    assert!(is_running(&proc, own, start_time));
    assert!(
        !is_running(&proc, own, start_time + 1),
        "another process by now"
    );
    let mut child = std::process::Command::new("cat")
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let start_time = proc.start_time(pid).unwrap();
    assert!(is_running(&proc, pid, start_time));
    drop(child.stdin.take());
    let until = std::time::Instant::now() + Duration::from_secs(20);
    while is_running(&proc, pid, start_time) {
        assert!(std::time::Instant::now() < until);
        std::thread::sleep(Duration::from_millis(1));
    }
    // A zombie is still listed.
    assert_eq!(proc.start_time(pid), Some(start_time));
    child.wait().unwrap();
    assert!(!is_running(&proc, pid, start_time));
}

#[test]
fn programs_of_32_bits_are_known_by_their_auxiliary_vector() {
    let words64 = |words: &[u64]| {
        words
            .iter()
            .flat_map(|w| w.to_ne_bytes())
            .collect::<Vec<_>>()
    };
    let words32 = |words: &[u32]| {
        words
            .iter()
            .flat_map(|w| w.to_ne_bytes())
            .collect::<Vec<_>>()
    };
    // AT_SYSINFO_EHDR, AT_HWCAP, AT_PAGESZ, AT_NULL.
    let vector = [33, 0x7ffd_f7fc_1000, 16, 0xbfeb_fbff, 6, 4096, 0, 0];
    assert!(!is_32bit(&words64(&vector)));
    assert!(is_32bit(&words32(&[
        32,
        0xf7f9_0550,
        33,
        0xf7f9_0000,
        6,
        4096,
        0,
        0
    ])));
    // Without vDSO.
    assert!(is_32bit(&words32(&[16, 0xbfeb_fbff, 6, 4096, 0, 0])));
    assert!(!is_32bit(&[]));
}

#[test]
fn fields_of_a_status_are_parsed() {
    let status = "Name:\tx\nTracerPid:\t31\nSeccomp:\t2\nSeccomp_filters:\t1\n";
    assert_eq!(status_field(status, "TracerPid:"), Some(31));
    assert_eq!(status_field(status, "Seccomp:"), Some(2));
    assert_eq!(status_field::<i32>(status, "Speculation:"), None);
}

/// The kernel cuts a name after 15 bytes, which can leave half a character.
#[test]
fn a_name_that_is_not_utf8_hides_nothing() {
    let root = tempfile::tempdir().unwrap();
    let task = root.path().join("7/task/8");
    fs::create_dir_all(&task).unwrap();
    let name = b"\xd0\xbf\xd0";
    fs::write(task.join("stat"), [b"8 (", &name[..], b") S 1"].concat()).unwrap();
    fs::write(task.join("comm"), [&name[..], b"\n"].concat()).unwrap();
    let rest = b"\nState:\tS (sleeping)\nTracerPid:\t9\nFDSize:\t64\nThreads:\t1\n";
    let status = [b"Name:\t", &name[..], rest].concat();
    fs::write(task.join("status"), &status).unwrap();
    fs::write(root.path().join("7/status"), &status).unwrap();
    let call = format!("{} 0x3 0x1000 0x80 0x0 0x0 0x0 0x0 0x0\n", libc::SYS_write);
    fs::write(task.join("syscall"), call).unwrap();

    let proc = ProcFs::at(root.path());
    let process = InspectedProcess {
        proc: &proc,
        pid: 7,
        start_time: 0,
        pidfd: File::open("/dev/null").unwrap().into(),
        fd_dir: File::open(root.path()).unwrap(),
    };
    assert_eq!(process.ensure_leader(), Ok(()));
    assert_eq!(process.tracer().unwrap(), Some(9));
    assert_eq!(process.table_size(), 64);
    let calls = process.syscalls().unwrap();
    assert_eq!(process.transfer(&calls), Some((8, libc::SYS_write)));
}
