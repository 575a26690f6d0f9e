//! `fin-wait-2`: the application has finished, and the peer has not.

use anyhow::Result;

use super::{Expect, Scenario, Stage, app_fds};
use crate::Conn;
use crate::agent::How;
use crate::kernel::TcpState;

pub(super) const SCENARIO: Scenario = Scenario {
    expect: Expect {
        state: TcpState::FinWait2,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "fin-wait-2",
        "FIN-WAIT-2: the application has shut down and waits for the FIN of the peer",
        build,
    )
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let conns = stage.connected()?;
    stage.app().shutdown(&app_fds(&conns), How::Write)?;
    Ok(conns)
}
