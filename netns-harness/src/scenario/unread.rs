//! `unread`: the peer has said something and finished; the application has not read it. An idle pool, a stuck worker.

use super::{Expect, LEAKY_APP, Scenario, Sharing, Stage, peer_fds};

const GOODBYE: &[u8] = b"goodbye";

pub(super) const SCENARIO: Scenario = Scenario {
    name: "unread",
    summary: "CLOSE-WAIT: the peer sent a few bytes and finished, the application has not read them",
    hidden: false,
    app: LEAKY_APP,
    sharing: Sharing::Freely,
    // The FIN counts as one.
    expect: Expect {
        recv_q: 8..=8,
        ..Expect::CLOSE_WAIT
    },
    deadline: None,
    build,
};

fn build(stage: &Stage<'_>) -> anyhow::Result<Vec<crate::Conn>> {
    let conns = stage.connected()?;
    stage.peer().send(&peer_fds(&conns), GOODBYE)?;
    stage.finish_in_peer(&conns)?;
    Ok(conns)
}
