//! Behaviour of the kernel that cwkill relies on. A failure here means that this kernel behaves differently, not that
//! cwkill is wrong.

use std::io::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::time::Instant;

use anyhow::{Context, Result};
use netns_harness::{Family, Host, How, Lab, Leak, Recv, SocketOption, TcpState};
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use crate::support::{CWKILL, PATIENCE, at, connections, count, cwkill, in_state, lab, ran};
use crate::trial::{Test, each_family};

pub const TESTS: &[Test] = &[
    each_family!(a_fin_counts_as_one_unread_byte),
    each_family!(shutdown_loses_no_unread_data),
    each_family!(destroy_loses_no_unread_data),
    each_family!(rst_loses_no_unread_data),
    each_family!(a_closed_socket_keeps_its_descriptor),
    each_family!(our_fin_counts_as_one_unsent_byte),
    each_family!(the_listener_survives_a_destroy_with_a_cookie),
    each_family!(before_the_first_byte_the_kernel_counts_from_the_handshake),
    each_family!(a_fin_is_an_ack_and_no_data),
    each_family!(an_answer_to_a_keepalive_is_an_ack_and_no_data),
    each_family!(a_keepalive_of_the_peer_is_neither),
    each_family!(an_answer_to_a_window_probe_is_an_ack_and_no_data),
    each_family!(a_retransmission_counts_as_data),
    each_family!(sockstat_counts_the_sockets_of_a_namespace),
    each_family!(a_duplicate_keeps_the_entry_in_an_epoll_set),
];

fn a_fin_counts_as_one_unread_byte(family: Family) -> Result<()> {
    let (lab, leak) = lab("established", family, 1)?;
    leak.peer()
        .shutdown(&leak.peer_fds(), netns_harness::How::Write)?;
    lab.wait_for(PATIENCE, || Ok(in_state(&lab, TcpState::CloseWait)? == 1))?;
    assert_eq!(connections(&lab)?[0].recv_q, 1);
    assert_eq!(leak.app().recv(leak.app_fds()[0], 10, PATIENCE)?, Recv::Eof);
    assert_eq!(connections(&lab)?[0].recv_q, 0);
    Ok(())
}

/// After a method has closed the socket: what the application's second read returns, and the errno of its next write.
fn aftermath(family: Family, method: &str) -> Result<(Recv, Option<i32>)> {
    let (lab, leak) = lab("unread", family, 1)?;
    let fd = leak.app_fds()[0];
    cwkill(&lab, &format!("--all --method {method}"))?.exits(0);
    let first = leak.app().recv(fd, 1000, PATIENCE)?;
    assert!(
        matches!(first, Recv::Data(ref data) if !data.is_empty()),
        "{first:?}"
    );
    let then = leak.app().recv(fd, 1000, PATIENCE)?;
    let send = leak.app().send(&[fd], b"x").err();
    let errno = send.and_then(|error| {
        error
            .chain()
            .find_map(|cause| cause.downcast_ref::<std::io::Error>()?.raw_os_error())
    });
    Ok((then, errno))
}

fn shutdown_loses_no_unread_data(family: Family) -> Result<()> {
    assert_eq!(
        aftermath(family, "shutdown")?,
        (Recv::Eof, Some(libc::EPIPE))
    );
    Ok(())
}

fn destroy_loses_no_unread_data(family: Family) -> Result<()> {
    let wanted = (Recv::Eof, Some(libc::ECONNABORTED));
    assert_eq!(aftermath(family, "destroy")?, wanted);
    Ok(())
}

fn rst_loses_no_unread_data(family: Family) -> Result<()> {
    assert_eq!(aftermath(family, "rst")?, (Recv::Eof, Some(libc::EPIPE)));
    Ok(())
}

fn a_closed_socket_keeps_its_descriptor(family: Family) -> Result<()> {
    for method in ["shutdown", "destroy", "rst"] {
        let (lab, leak) = lab("drained", family, 1)?;
        let inode = connections(&lab)?[0].inode;
        cwkill(&lab, &format!("--all --method {method}"))?.exits(0);
        let link = format!("/proc/{}/fd/{}", leak.app().pid(), leak.app_fds()[0]);
        let target = std::fs::read_link(link)?;
        assert_eq!(
            target.to_string_lossy().into_owned(),
            format!("socket:[{inode}]")
        );
    }
    Ok(())
}

fn our_fin_counts_as_one_unsent_byte(family: Family) -> Result<()> {
    let (lab, leak) = lab("drained", family, 1)?;
    leak.pair().set_link(false)?;
    cwkill(&lab, "--all --method shutdown --grace 0s")?.exits(4);
    let row = connections(&lab)?.remove(0);
    assert_eq!((row.state, row.send_q), (TcpState::LastAck, 1));
    Ok(())
}

fn the_listener_survives_a_destroy_with_a_cookie(family: Family) -> Result<()> {
    let (lab, leak) = lab("unread", family, 3)?;
    let sockets = cwkill(&lab, "--all --method destroy --json")?
        .exits(0)
        .sockets();
    assert_eq!(at(&sockets[0], "/result/method"), "destroy");
    assert_eq!(in_state(&lab, TcpState::Listen)?, 1);
    let _more = lab.start("established", family, count(1))?;
    assert!(leak.app().is_alive());
    Ok(())
}

/// The age and the idle time of the one connection in `state` on `host`, in milliseconds; `None` if it is in another state.
fn times(host: &Host, state: &str) -> Result<Option<(u64, u64)>> {
    let command = host
        .command(CWKILL)
        .args(["-n", "--json", "--no-owners", "--state", state]);
    let ran = ran(command)?;
    let sockets = ran.sockets();
    let Some(socket) = sockets.first() else {
        return Ok(None);
    };
    let millis = |name: &str| socket[name].as_u64().context("no time");
    Ok(Some((millis("age_ms")?, millis("idle_ms")?)))
}

/// Waits until the age and the idle time of the stuck socket are as `wanted`, and returns them.
fn wait_for_times(lab: &Lab, wanted: impl Fn(u64, u64) -> bool) -> Result<(u64, u64)> {
    let mut last = None;
    lab.wait_for(PATIENCE, || {
        last = times(lab.app_host(), "close-wait")?;
        Ok(last.is_some_and(|(age, idle)| wanted(age, idle)))
    })
    .with_context(|| format!("age and idle time {last:?}"))?;
    last.context("no socket")
}

/// On both ends, the accepted and the connected one.
fn before_the_first_byte_the_kernel_counts_from_the_handshake(family: Family) -> Result<()> {
    let began = Instant::now();
    let (lab, leak) = lab("established", family, 1)?;
    for host in [lab.app_host(), &leak.pair().peer_host] {
        lab.wait_for(PATIENCE, || {
            Ok(times(host, "established")?.is_some_and(|(_, idle)| idle >= 300))
        })?;
        let (_, idle) = times(host, "established")?.context("it is open")?;
        let longest = u64::try_from(began.elapsed().as_millis())?;
        assert!(idle <= longest, "{idle} of {longest} ms");
    }
    Ok(())
}

fn a_fin_is_an_ack_and_no_data(family: Family) -> Result<()> {
    let (lab, leak) = lab("established", family, 1)?;
    lab.wait_for(PATIENCE, || {
        let open = times(lab.app_host(), "established")?;
        Ok(open.is_some_and(|(_, idle)| idle >= 500))
    })?;
    leak.peer().shutdown(&leak.peer_fds(), How::Write)?;
    wait_for_times(&lab, |age, idle| idle >= age + 500)?;
    Ok(())
}

/// Probes every second.
const KEEPALIVE: SocketOption = SocketOption::KeepAlive {
    idle_s: 1,
    interval_s: 1,
    probes: 100,
};

fn an_answer_to_a_keepalive_is_an_ack_and_no_data(family: Family) -> Result<()> {
    let (lab, leak) = lab("drained", family, 1)?;
    wait_for_times(&lab, |age, _| age >= 200)?;
    leak.app().set_option(&leak.app_fds(), KEEPALIVE)?;
    wait_for_times(&lab, |age, idle| idle >= age + 2000)?;
    Ok(())
}

/// Its sequence number is one too low, so the kernel answers it and looks at nothing else in it.
fn a_keepalive_of_the_peer_is_neither(family: Family) -> Result<()> {
    let (lab, leak) = lab("drained", family, 1)?;
    leak.peer().set_option(&leak.peer_fds(), KEEPALIVE)?;
    let timers = |leak: &Leak| -> Result<usize> {
        let shown = ran(leak.pair().peer_host.command("ss").args(["-Htnoi"]))?.exits(0);
        Ok(shown.stdout.matches("timer:(keepalive").count())
    };
    lab.wait_for(PATIENCE, || Ok(timers(&leak)? == 1))?;
    wait_for_times(&lab, |age, _| age >= 3500)?;
    assert!(in_state(&lab, TcpState::CloseWait)? == 1);
    Ok(())
}

fn an_answer_to_a_window_probe_is_an_ack_and_no_data(family: Family) -> Result<()> {
    let (lab, _leak) = lab("sending", family, 1)?;
    wait_for_times(&lab, |age, idle| idle >= age + 2000)?;
    Ok(())
}

fn a_retransmission_counts_as_data(family: Family) -> Result<()> {
    let (lab, leak) = lab("drained", family, 1)?;
    leak.pair().set_link(false)?;
    leak.app().send(&leak.app_fds(), b"lost")?;
    let (_, before) = wait_for_times(&lab, |_, idle| idle >= 100)?;
    wait_for_times(&lab, |age, idle| idle < before && age > idle)?;
    Ok(())
}

/// While cwkill has a duplicate of a socket, the owner's epoll set names the descriptor that the owner has closed. The entry goes with the
/// duplicate. Source: fs/eventpoll.c, eventpoll_release_file, which the last reference to a file calls.
fn a_duplicate_keeps_the_entry_in_an_epoll_set(family: Family) -> Result<()> {
    const LOOKS: usize = 20;
    let lab = Lab::new()?;
    lab.app_host().within(|| {
        let (listens, connects) = match family {
            Family::V4 => ("127.0.0.1:0", "127.0.0.1"),
            Family::V6 => ("[::1]:0", "::1"),
            Family::Mapped => ("[::]:0", "127.0.0.1"),
        };
        let listener = TcpListener::bind(listens)?;
        let to = SocketAddr::new(connects.parse()?, listener.local_addr()?.port());
        let mut peer = TcpStream::connect(to)?;
        let (accepted, _) = listener.accept()?;
        let closed = accepted.as_raw_fd();
        let name = u64::try_from(closed)?;
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = epoll::EventData::new_u64(name);
        epoll::add(&set, &accepted, data, epoll::EventFlags::IN)?;
        let ready = || -> Result<Vec<u64>> {
            let mut events = Vec::with_capacity(LOOKS);
            let now = Timespec::default();
            epoll::wait(&set, spare_capacity(&mut events), Some(&now))?;
            Ok(events.iter().map(|event| event.data.u64()).collect())
        };
        // As cwkill makes it.
        let own = pidfd_open(getpid(), PidfdFlags::empty())?;
        let duplicate = pidfd_getfd(&own, closed, PidfdGetfdFlags::empty())?;
        drop(accepted);
        peer.write_all(b"more")?;
        lab.wait_for(PATIENCE, || Ok(!ready()?.is_empty()))?;
        for _ in 0..LOOKS {
            assert_eq!(ready()?, [name]);
        }
        drop(duplicate);
        // Another test may be starting a process, which has all descriptors for a moment.
        lab.wait_for(PATIENCE, || Ok(ready()?.is_empty()))
    })
}

/// cwkill lists all TCP sockets of a namespace for the overview only if this number is small.
fn sockstat_counts_the_sockets_of_a_namespace(family: Family) -> Result<()> {
    const SOCKETS: usize = 50;
    let lab = Lab::new()?;
    let used = || -> Result<usize> {
        let output = lab
            .app_host()
            .command("cat")
            .arg("/proc/self/net/sockstat")
            .output()?;
        let text = String::from_utf8(output.stdout)?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("sockets: used "));
        Ok(line.with_context(|| text.clone())?.trim().parse()?)
    };
    let before = used()?;
    let leak = lab.start("drained", family, count(SOCKETS))?;
    let during = used()?;
    assert!(during >= before + SOCKETS, "{before}, {during}");
    // Those of other hosts are not among them: the peer has as many.
    assert!(during < before + 2 * SOCKETS, "{before}, {during}");
    drop(leak);
    Ok(())
}
