//! `silent-peer`: the peer's host is up and the link is, but no segment gets through to it: a firewall that drops.

use anyhow::Result;

use super::{Expect, LEAKY_APP, Scenario, Sharing, Stage, peer_fds};
use crate::Conn;
use crate::agent::SocketOption;

pub(super) const SCENARIO: Scenario = Scenario {
    name: "silent-peer",
    summary: "CLOSE-WAIT: then the peer stopped hearing anything, as behind a firewall that drops",
    hidden: false,
    app: LEAKY_APP,
    sharing: Sharing::Freely,
    expect: Expect::CLOSE_WAIT,
    deadline: None,
    build,
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let conns = stage.leaked()?;
    let deaf = SocketOption::Deaf(true);
    stage.peer().set_option(&peer_fds(&conns), deaf)?;
    Ok(conns)
}
