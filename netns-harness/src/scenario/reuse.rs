//! `reuse`: clients with fixed ports have connected twice, so each 4-tuple had another connection before.

use std::net::SocketAddr;

use anyhow::{Result, ensure};

use super::{STEP, Scenario, Stage, app_fds, peer_fds};
use crate::Conn;
use crate::agent::{Dial, End, SocketOption};

/// Port of the first client. The others have the following ports.
const FIRST_PORT: u16 = 40_000;

pub(super) const SCENARIO: Scenario = Scenario::new(
    "reuse",
    "CLOSE-WAIT: the second connections of clients with fixed ports, on the same 4-tuples as the first",
    build,
);

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let from = SocketAddr::new(stage.pair.peer_address, FIRST_PORT);
    let dial = Dial {
        from: Some(from),
        ..Dial::default()
    };
    let first = stage.connected_by(dial)?;
    // A reset leaves no TIME-WAIT on either side.
    let fds = peer_fds(&first);
    stage
        .peer()
        .set_option(&fds, SocketOption::Linger(Some(0)))?;
    stage.peer().close(&fds)?;
    let fds = app_fds(&first);
    for drained in stage.app().drain(&fds, STEP)? {
        ensure!(
            drained.end == End::Failed(libc::ECONNRESET),
            "not reset by the peer: {drained:?}"
        );
    }
    stage.app().close(&fds)?;
    let conns = stage.connected_by(dial)?;
    stage.finish_in_peer(&conns)?;
    stage.read_to_end(stage.app(), &app_fds(&conns))?;
    Ok(conns)
}
