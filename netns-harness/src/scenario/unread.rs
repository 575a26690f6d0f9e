//! `unread`: the peer has said something and finished; the application has not read it. An idle pool, a stuck worker.

use super::{Expect, LEAKY_APP, Scenario, Sharing, Stage, peer_fds};
use crate::agent::How;

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
    let fds = peer_fds(&conns);
    stage.peer().send(&fds, GOODBYE)?;
    stage.peer().shutdown(&fds, How::Write)?;
    Ok(conns)
}
