//! `scm-rights`: the descriptor is in a Unix socket's buffer, sent and not received: the socket lives and nobody has it.

use anyhow::Result;

use super::{Expect, LEAKY_APP, Scenario, Sharing, Stage, app_fds};
use crate::Conn;

pub(super) const SCENARIO: Scenario = Scenario {
    name: "scm-rights",
    summary: "CLOSE-WAIT: its descriptor is in flight over a Unix socket, so no process has it",
    hidden: false,
    app: LEAKY_APP,
    sharing: Sharing::Freely,
    expect: Expect {
        owners: 0,
        ..Expect::CLOSE_WAIT
    },
    deadline: None,
    build,
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let mut conns = stage.leaked()?;
    stage.app().put_in_flight(&app_fds(&conns))?;
    conns.iter_mut().for_each(|conn| conn.app_fd = None);
    Ok(conns)
}
