//! Behaviour of the kernel that cwkill relies on. A failure here means that this kernel behaves differently, not that
//! cwkill is wrong.

use anyhow::Result;
use netns_harness::{Family, Recv, TcpState};

use crate::support::{PATIENCE, at, connections, count, cwkill, in_state, lab};
use crate::trial::{Test, each_family};

pub const TESTS: &[Test] = &[
    each_family!(a_fin_counts_as_one_unread_byte),
    each_family!(shutdown_loses_no_unread_data),
    each_family!(destroy_loses_no_unread_data),
    each_family!(rst_loses_no_unread_data),
    each_family!(a_closed_socket_keeps_its_descriptor),
    each_family!(our_fin_counts_as_one_unsent_byte),
    each_family!(the_listener_survives_a_destroy_with_a_cookie),
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
