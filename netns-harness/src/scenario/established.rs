//! `established`: innocents. They can carry data, and must still do so after anything that happens to the others.

use super::{Expect, LEAKY_APP, Scenario, Sharing};
use crate::kernel::TcpState;

pub(super) const SCENARIO: Scenario = Scenario {
    name: "established",
    summary: "ESTABLISHED: innocent connections, which must survive",
    hidden: false,
    app: LEAKY_APP,
    sharing: Sharing::Freely,
    expect: Expect {
        state: TcpState::Established,
        ..Expect::CLOSE_WAIT
    },
    deadline: None,
    build: |stage| stage.connected(),
};
