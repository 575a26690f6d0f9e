//! `last-ack`: both sides have finished, and the peer does not acknowledge the application's FIN.

use anyhow::Result;

use super::{Expect, Scenario, Stage, peer_fds};
use crate::Conn;
use crate::agent::SocketOption;
use crate::kernel::TcpState;

pub(super) const SCENARIO: Scenario = Scenario {
    expect: Expect {
        state: TcpState::LastAck,
        send_q: 1..=1,
        inode: false,
        owners: 0,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "last-ack",
        "LAST-ACK: the application closed after the peer, which is silent; no process has a descriptor",
        build,
    )
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let mut conns = stage.leaked()?;
    let drop_incoming = SocketOption::DropIncoming(true);
    stage.peer().set_option(&peer_fds(&conns), drop_incoming)?;
    stage.close_in_app(&mut conns)?;
    Ok(conns)
}
