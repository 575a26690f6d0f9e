//! `closing`: both sides have finished at the same time, and the peer does not acknowledge the application's FIN.

use anyhow::Result;

use super::{Expect, Scenario, Stage, app_fds, peer_fds};
use crate::Conn;
use crate::agent::How;
use crate::kernel::TcpState;

pub(super) const SCENARIO: Scenario = Scenario {
    expect: Expect {
        state: TcpState::Closing,
        send_q: 1..=1,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "closing",
        "CLOSING: both sides finished at the same time, the peer is silent, and the application holds the descriptor",
        build,
    )
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let conns = stage.with_silent_peer()?;
    let fds = app_fds(&conns);
    stage.app().shutdown(&fds, How::Write)?;
    stage.peer().shutdown(&peer_fds(&conns), How::Write)?;
    stage.read_to_end(stage.app(), &fds)?;
    Ok(conns)
}
