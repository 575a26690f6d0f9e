//! `stopped`: SIGSTOP has stopped the application, so it cannot react.

use anyhow::Result;

use super::{Scenario, Sharing, Stage};
use crate::Conn;

pub(super) const SCENARIO: Scenario = Scenario {
    sharing: Sharing::Never,
    ..Scenario::new(
        "stopped",
        "CLOSE-WAIT: SIGSTOP has stopped the application",
        build,
    )
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let conns = stage.leaked()?;
    stage.app().stop()?;
    Ok(conns)
}
