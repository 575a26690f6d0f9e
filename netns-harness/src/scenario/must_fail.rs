//! `must-fail`: claims a state that does not come about. If this one succeeds, the harness checks nothing.

use std::time::Duration;

use super::{Expect, Scenario};

pub(super) const SCENARIO: Scenario = Scenario {
    hidden: true,
    expect: Expect {
        recv_q: 2..=2,
        ..Expect::CLOSE_WAIT
    },
    deadline: Some(Duration::from_millis(300)),
    ..Scenario::new(
        "must-fail",
        "claims unread bytes where there are none: proves that a wrong state is noticed",
        |stage| stage.leaked(),
    )
};
