//! `must-fail`: claims a state that does not come about. If this one succeeds, the harness checks nothing.

use std::time::Duration;

use super::{Expect, LEAKY_APP, Scenario, Sharing};

pub(super) const SCENARIO: Scenario = Scenario {
    name: "must-fail",
    summary: "claims unread bytes where there are none: proves that a wrong state is noticed",
    hidden: true,
    app: LEAKY_APP,
    sharing: Sharing::Freely,
    expect: Expect {
        recv_q: 2..=2,
        ..Expect::CLOSE_WAIT
    },
    deadline: Some(Duration::from_millis(300)),
    build: |stage| stage.leaked(),
};
