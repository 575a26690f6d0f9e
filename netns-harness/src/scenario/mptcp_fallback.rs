//! `mptcp-fallback`: the application connects with MPTCP to a server that only knows TCP. The server has sent bytes and finished, and
//! the application has not read them. The kernel moves them from the subflow to the MPTCP socket.

use std::net::SocketAddr;

use anyhow::Result;

use super::{BATCH, Expect, How, STEP, Scenario, Stage, peer_fds};
use crate::Conn;
use crate::agent::Dial;
use crate::lab::join_ends;

pub(super) const SCENARIO: Scenario = Scenario {
    // Of the subflow.
    expect: Expect::CLOSE_WAIT,
    ..Scenario::new(
        "mptcp-fallback",
        "CLOSE-WAIT: the application has connected with MPTCP to port 9090 of a peer that only knows TCP, and has not read",
        build,
    )
};

/// The port of the peer's server.
const PORT: u16 = 9090;

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let peer_address = stage.pair.peer_address;
    let backlog = i32::try_from(BATCH)?;
    let server = stage
        .peer()
        .listen(SocketAddr::new(peer_address, PORT), false, backlog)?;
    let dial = Dial {
        mptcp: true,
        ..Dial::default()
    };
    let to = SocketAddr::new(stage.pair.peer_address_of_app(), PORT);
    let mut conns = Vec::with_capacity(stage.count);
    while conns.len() < stage.count {
        let size = BATCH.min(stage.count - conns.len());
        let app_ends = stage.app().connect(to, size, dial, STEP)?;
        let peer_ends = stage.peer().accept(server, size, STEP)?;
        // Seen from the peer, whose ends all have the same local address.
        let seen_from_peer = join_ends(&peer_ends, &app_ends)?.into_iter();
        conns.extend(seen_from_peer.map(|conn| Conn {
            local: conn.peer,
            peer: conn.local,
            app_fd: conn.peer_fd,
            peer_fd: conn.app_fd,
            sent: 0,
        }));
    }
    let fds = peer_fds(&conns);
    stage.peer().send(&fds, b"goodbye")?;
    stage.peer().shutdown(&fds, How::Write)?;
    stage.peer().close(&[server])?;
    Ok(conns)
}
