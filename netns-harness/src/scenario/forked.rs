//! `forked`: one socket, three owners, as after a fork: closing it in one process does nothing.

use super::{Expect, Scenario, Stage, app_fds};

pub(super) const SCENARIO: Scenario = Scenario {
    expect: Expect {
        owners: 3,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "forked",
        "CLOSE-WAIT: one socket shared by three processes, read to the end by one",
        build,
    )
};

fn build(stage: &Stage<'_>) -> anyhow::Result<Vec<crate::Conn>> {
    let conns = stage.leaked()?;
    stage.app().share(&app_fds(&conns), 2)?;
    Ok(conns)
}
