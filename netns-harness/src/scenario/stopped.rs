//! `stopped`: the application is under SIGSTOP: it does nothing about anything.

use anyhow::Result;

use super::{Expect, LEAKY_APP, Scenario, Sharing, Stage};
use crate::Conn;

pub(super) const SCENARIO: Scenario = Scenario {
    name: "stopped",
    summary: "CLOSE-WAIT: the application is stopped by SIGSTOP",
    hidden: false,
    app: LEAKY_APP,
    sharing: Sharing::Never,
    expect: Expect::CLOSE_WAIT,
    deadline: None,
    build,
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let conns = stage.leaked()?;
    stage.app().stop()?;
    Ok(conns)
}
