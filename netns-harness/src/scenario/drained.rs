//! `drained`: the application has read to the end and not closed. The classic leak.

use super::Scenario;

pub(super) const SCENARIO: Scenario = Scenario::new(
    "drained",
    "CLOSE-WAIT: the application has read to the end and still holds the descriptor",
    |stage| stage.leaked(),
);
