//! `peer-vanished`: the peer's host has forgotten the connection, as after a reboot, and answers with RST.

use anyhow::Result;

use super::{Scenario, Stage, peer_fds};
use crate::Conn;

pub(super) const SCENARIO: Scenario = Scenario::new(
    "peer-vanished",
    "CLOSE-WAIT: the peer's host has forgotten the connection and answers every segment with RST",
    build,
);

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let mut conns = stage.leaked()?;
    stage.peer().forget(&peer_fds(&conns))?;
    conns.iter_mut().for_each(|conn| conn.peer_fd = None);
    Ok(conns)
}
