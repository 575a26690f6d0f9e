//! `ktls-partial`: TLS in the kernel at both ends, and the application has read a record in part. Needs the module tls.
//!
//! The rest of the record is decrypted and waits in kTLS, where TCP does not count it (net/tls/tls_sw.c, process_rx_list).

use anyhow::Result;

use super::{Expect, STEP, Scenario, Sharing, Stage, app_fds, peer_fds};
use crate::Conn;
use crate::agent::SocketOption;

pub(super) const SCENARIO: Scenario = Scenario {
    // Not every kernel has the module.
    hidden: true,
    sharing: Sharing::Never,
    expect: Expect {
        recv_q: 1..=1,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "ktls-partial",
        "CLOSE-WAIT: TLS in the kernel, a record read in part; needs the module tls",
        build,
    )
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let conns = stage.connected()?;
    let tls = SocketOption::KernelTls;
    stage.app().set_option(&app_fds(&conns), tls)?;
    stage.peer().set_option(&peer_fds(&conns), tls)?;
    stage.peer().send(&peer_fds(&conns), b"a whole record")?;
    for fd in app_fds(&conns) {
        let got = stage.app().recv(fd, 7, STEP)?;
        anyhow::ensure!(got == crate::Recv::Data(b"a whole".to_vec()), "{got:?}");
    }
    stage.finish_in_peer(&conns)?;
    Ok(conns)
}
