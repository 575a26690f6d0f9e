//! `scm-rights`: the descriptor is in the buffer of a Unix socket, sent and not received. The socket exists without owner.

use anyhow::Result;

use super::{Expect, Scenario, Stage, app_fds};
use crate::Conn;

pub(super) const SCENARIO: Scenario = Scenario {
    expect: Expect {
        owners: 0,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "scm-rights",
        "CLOSE-WAIT: the descriptor is in flight over a Unix socket, so no process has it",
        build,
    )
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let mut conns = stage.leaked()?;
    stage.app().put_in_flight(&app_fds(&conns))?;
    conns.iter_mut().for_each(|conn| conn.app_fd = None);
    Ok(conns)
}
