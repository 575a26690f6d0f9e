//! `syn-recv`: the peer has sent a SYN and never answers the SYN-ACK.

use anyhow::Result;

use super::{Expect, STEP, Scenario, Stage, peer_fds};
use crate::Conn;
use crate::agent::{Dial, Endpoint};
use crate::kernel::TcpState;

pub(super) const SCENARIO: Scenario = Scenario {
    expect: Expect {
        state: TcpState::SynRecv,
        inode: false,
        owners: 0,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "syn-recv",
        "SYN-RECV: the peer never completes the handshake; no process has a descriptor",
        build,
    )
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let dial = Dial {
        drop_incoming: true,
        ..Dial::default()
    };
    let ends = stage
        .peer()
        .connect(stage.pair.app_address, stage.count, dial, STEP)?;
    let mut conns: Vec<Conn> = ends.iter().map(Endpoint::without_app).collect();
    stage.wait_in_app(&conns, TcpState::SynRecv)?;
    // Otherwise the peer's kernel sends the SYN again after a second, and a destroyed socket is back.
    let listeners = stage.peer().replace_by_listener(&peer_fds(&conns))?;
    for (conn, listener) in conns.iter_mut().zip(listeners) {
        conn.peer_fd = Some(listener);
    }
    Ok(conns)
}
