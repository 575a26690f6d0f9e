//! `mptcp`: an MPTCP connection that the peer has finished. The MPTCP socket is in CLOSE-WAIT, and its subflow in ESTABLISHED.

use anyhow::Result;

use super::{App, Expect, How, LEAKY_APP, Scenario, Sharing, Stage, app_fds, peer_fds};
use crate::Conn;
use crate::agent::Dial;
use crate::kernel::TcpState;

pub(super) const SCENARIO: Scenario = Scenario {
    app: App {
        mptcp: true,
        ..LEAKY_APP
    },
    sharing: Sharing::Never,
    // Of the subflow.
    expect: Expect {
        state: TcpState::Established,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "mptcp",
        "CLOSE-WAIT of an MPTCP socket: the application has read to the end; the subflow is in ESTABLISHED",
        build,
    )
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let conns = stage.connected_by(Dial {
        mptcp: true,
        ..Dial::default()
    })?;
    stage.peer().send(&peer_fds(&conns), b"hello")?;
    stage.peer().shutdown(&peer_fds(&conns), How::Write)?;
    stage.read_to_end(stage.app(), &app_fds(&conns))?;
    Ok(conns)
}
