//! `ktls`: TLS in the kernel (kTLS) is on in both directions at the application's sockets. Needs the module tls.
//!
//! The application has read to the end, and the kernel still counts the FIN as an unread byte: the read of kTLS does not pass it
//! (net/tls/tls_sw.c, tls_sw_recvmsg).

use anyhow::Result;

use super::{Expect, Scenario, Stage, app_fds};
use crate::Conn;
use crate::agent::SocketOption;

pub(super) const SCENARIO: Scenario = Scenario {
    // Not every kernel has the module.
    hidden: true,
    expect: Expect {
        recv_q: 1..=1,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "ktls",
        "CLOSE-WAIT: TLS in the kernel, read to the end; needs the module tls",
        build,
    )
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let conns = stage.connected()?;
    stage
        .app()
        .set_option(&app_fds(&conns), SocketOption::KernelTls)?;
    stage.finish_in_peer(&conns)?;
    stage.read_to_end(stage.app(), &app_fds(&conns))?;
    Ok(conns)
}
