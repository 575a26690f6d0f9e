//! `half-closed`: only the peer has finished, which is legal and common. A bystander that looks stuck.

use std::time::Duration;

use anyhow::Result;

use super::{Expect, Scenario, Stage, app_fds};
use crate::Conn;

pub(super) const SCENARIO: Scenario = Scenario {
    expect: Expect {
        send_q: 0..=4096,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "half-closed",
        "CLOSE-WAIT: a bystander; the peer has finished, and the application still sends",
        build,
    )
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let conns = stage.leaked()?;
    stage
        .app()
        .start_sending(&app_fds(&conns), Duration::from_millis(20))?;
    Ok(conns)
}
