//! `drained`: the application has read to the end and forgotten to close. The classic leak.

use super::{Expect, LEAKY_APP, Scenario, Sharing};

pub(super) const SCENARIO: Scenario = Scenario {
    name: "drained",
    summary: "CLOSE-WAIT: the application has read to the end and still holds the descriptor",
    hidden: false,
    app: LEAKY_APP,
    sharing: Sharing::Freely,
    expect: Expect::CLOSE_WAIT,
    deadline: None,
    build: |stage| stage.leaked(),
};
