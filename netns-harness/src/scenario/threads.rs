//! `threads`: the application has many threads, which share the descriptor.

use anyhow::Result;

use super::{Scenario, Stage};
use crate::Conn;

pub(super) const SCENARIO: Scenario = Scenario::new(
    "threads",
    "CLOSE-WAIT: the application has 50 threads and its main thread",
    build,
);

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    stage.app().start_threads(50)?;
    stage.leaked()
}
