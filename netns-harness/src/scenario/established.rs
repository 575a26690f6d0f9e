//! `established`: bystanders. They carry data, and must still do so after `cwkill` has closed other sockets.

use super::{Expect, Scenario};
use crate::kernel::TcpState;

pub(super) const SCENARIO: Scenario = Scenario {
    expect: Expect {
        state: TcpState::Established,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "established",
        "ESTABLISHED: bystander connections, which must survive",
        |stage| stage.connected(),
    )
};
