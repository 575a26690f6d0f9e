//! `must-fail`: expects a state that is never reached. If it succeeds, the harness checks nothing.

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
        "expects unread bytes where there are none, to prove that a wrong state is detected",
        |stage| stage.leaked(),
    )
};
