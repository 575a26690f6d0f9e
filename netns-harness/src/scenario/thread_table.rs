//! `thread-table`: only a thread with a descriptor table of its own has the descriptor. `/proc/PID/fd` does not show it.

use anyhow::Result;

use super::{Expect, Scenario, Stage, app_fds};
use crate::Conn;

pub(super) const SCENARIO: Scenario = Scenario {
    expect: Expect {
        // As ss(8) sees it.
        owners: 0,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "thread-table",
        "CLOSE-WAIT: only a thread with a descriptor table of its own has the descriptor",
        build,
    )
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let mut conns = stage.leaked()?;
    stage.app().leave_to_thread(&app_fds(&conns))?;
    conns.iter_mut().for_each(|conn| conn.app_fd = None);
    Ok(conns)
}
