//! `full-backlog`: the application accepts nothing, its backlog is full, and every client that waits in it has gone.

use super::{Scenario, Sharing, Stage, not_accepted};
use crate::Conn;

pub(super) const SCENARIO: Scenario = Scenario {
    sharing: Sharing::Last,
    expect: not_accepted::SCENARIO.expect,
    ..Scenario::new(
        "full-backlog",
        "CLOSE-WAIT: clients that have gone fill the backlog of the listener, so no new client gets in",
        build,
    )
};

fn build(stage: &Stage<'_>) -> anyhow::Result<Vec<Conn>> {
    let conns = not_accepted::build(stage)?;
    let fds = super::peer_fds(&conns);
    stage.peer().close(&fds)?;
    // The kernel queues one connection more than the limit (include/net/sock.h, sk_acceptq_is_full).
    let limit = i32::try_from(conns.len())? - 1;
    stage.app().set_backlog(stage.pair.listener, limit)?;
    Ok(conns
        .into_iter()
        .map(|conn| Conn {
            peer_fd: None,
            ..conn
        })
        .collect())
}
