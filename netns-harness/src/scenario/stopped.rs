//! `stopped`: the application is under SIGSTOP: it does nothing about anything.

use anyhow::Result;

use super::{Scenario, Sharing, Stage};
use crate::Conn;

pub(super) const SCENARIO: Scenario = Scenario {
    sharing: Sharing::Never,
    ..Scenario::new(
        "stopped",
        "CLOSE-WAIT: the application is stopped by SIGSTOP",
        build,
    )
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let conns = stage.leaked()?;
    stage.app().stop()?;
    Ok(conns)
}
