//! `unread`: the peer has sent bytes and finished, and the application has not read them, as with an idle pool.

use super::{Expect, Scenario, Stage, peer_fds};

const GOODBYE: &[u8] = b"goodbye";

pub(super) const SCENARIO: Scenario = Scenario {
    // The FIN counts as one byte.
    expect: Expect {
        recv_q: 8..=8,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "unread",
        "CLOSE-WAIT: the peer has sent a few bytes and finished, and the application has not read them",
        build,
    )
};

fn build(stage: &Stage<'_>) -> anyhow::Result<Vec<crate::Conn>> {
    let conns = stage.connected()?;
    stage.peer().send(&peer_fds(&conns), GOODBYE)?;
    stage.finish_in_peer(&conns)?;
    Ok(conns)
}
