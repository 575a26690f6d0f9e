//! `threads`: the application has many threads, all of which share the descriptor.

use anyhow::Result;

use super::{Expect, LEAKY_APP, Scenario, Sharing, Stage};
use crate::Conn;

pub(super) const SCENARIO: Scenario = Scenario {
    name: "threads",
    summary: "CLOSE-WAIT: the application has 50 threads beside its main one",
    hidden: false,
    app: LEAKY_APP,
    sharing: Sharing::Freely,
    expect: Expect::CLOSE_WAIT,
    deadline: None,
    build,
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    stage.app().start_threads(50)?;
    stage.leaked()
}
