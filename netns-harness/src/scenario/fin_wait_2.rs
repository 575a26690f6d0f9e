//! `fin-wait-2`: the application has finished, and the peer never does.

use anyhow::Result;

use super::{Expect, LEAKY_APP, Scenario, Sharing, Stage, app_fds};
use crate::Conn;
use crate::agent::How;
use crate::kernel::TcpState;

pub(super) const SCENARIO: Scenario = Scenario {
    name: "fin-wait-2",
    summary: "FIN-WAIT-2: the application has shut down and waits for the peer, which does not finish",
    hidden: false,
    app: LEAKY_APP,
    sharing: Sharing::Freely,
    expect: Expect {
        state: TcpState::FinWait2,
        ..Expect::CLOSE_WAIT
    },
    deadline: None,
    build,
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let conns = stage.connected()?;
    stage.app().shutdown(&app_fds(&conns), How::Write)?;
    Ok(conns)
}
