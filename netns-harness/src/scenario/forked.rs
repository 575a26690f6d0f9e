//! `forked`: one socket with three owners, as after a fork. Closing it in one process does not close the connection.

use super::{Expect, Scenario, Stage, app_fds};

pub(super) const SCENARIO: Scenario = Scenario {
    expect: Expect {
        owners: 3,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "forked",
        "CLOSE-WAIT: three processes share the socket, and one has read to the end",
        build,
    )
};

fn build(stage: &Stage<'_>) -> anyhow::Result<Vec<crate::Conn>> {
    let conns = stage.leaked()?;
    stage.app().share(&app_fds(&conns), 2)?;
    Ok(conns)
}
