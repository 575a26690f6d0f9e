//! `silent-peer`: the peer's host and the link are up, but no segment reaches the peer, as behind a firewall that drops.

use anyhow::Result;

use super::{Scenario, Stage, peer_fds};
use crate::Conn;
use crate::agent::SocketOption;

pub(super) const SCENARIO: Scenario = Scenario::new(
    "silent-peer",
    "CLOSE-WAIT: no segment reaches the peer any more, as behind a firewall that drops",
    build,
);

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let conns = stage.leaked()?;
    let drop_incoming = SocketOption::DropIncoming(true);
    stage.peer().set_option(&peer_fds(&conns), drop_incoming)?;
    Ok(conns)
}
