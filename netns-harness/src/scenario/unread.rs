//! `unread`: the peer has said something and finished; the application has not read it. An idle pool, a stuck worker.

use super::{Expect, Scenario, Stage, peer_fds};

const GOODBYE: &[u8] = b"goodbye";

pub(super) const SCENARIO: Scenario = Scenario {
    // The FIN counts as one.
    expect: Expect {
        recv_q: 8..=8,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "unread",
        "CLOSE-WAIT: the peer sent a few bytes and finished, the application has not read them",
        build,
    )
};

fn build(stage: &Stage<'_>) -> anyhow::Result<Vec<crate::Conn>> {
    let conns = stage.connected()?;
    stage.peer().send(&peer_fds(&conns), GOODBYE)?;
    stage.finish_in_peer(&conns)?;
    Ok(conns)
}
