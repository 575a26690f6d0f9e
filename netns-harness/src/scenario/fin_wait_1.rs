//! `fin-wait-1`: the application has finished, and the peer does not acknowledge its FIN.

use anyhow::Result;

use super::{Expect, Scenario, Stage, app_fds};
use crate::Conn;
use crate::agent::How;
use crate::kernel::TcpState;

pub(super) const SCENARIO: Scenario = Scenario {
    expect: Expect {
        state: TcpState::FinWait1,
        // The FIN.
        send_q: 1..=1,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "fin-wait-1",
        "FIN-WAIT-1: the application has shut down and holds the descriptor, the peer is silent",
        build,
    )
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let conns = stage.with_silent_peer()?;
    stage.app().shutdown(&app_fds(&conns), How::Write)?;
    Ok(conns)
}
