//! `not-accepted`: the peer has connected, sent and finished, and the application has not accepted. No descriptor exists.

use super::{Expect, STEP, Scenario, Sharing, Stage, peer_fds};
use crate::Conn;
use crate::agent::{Dial, Endpoint};

const HELLO: &[u8] = b"anybody?";

pub(super) const SCENARIO: Scenario = Scenario {
    sharing: Sharing::Last,
    expect: Expect {
        recv_q: 9..=9,
        inode: false,
        owners: 0,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "not-accepted",
        "CLOSE-WAIT: still in the accept queue of the listener, so no process has a descriptor",
        build,
    )
};

pub(super) fn build(stage: &Stage<'_>) -> anyhow::Result<Vec<Conn>> {
    let ends = stage
        .peer()
        .connect(stage.pair.app_address, stage.count, Dial::default(), STEP)?;
    let conns: Vec<Conn> = ends.iter().map(Endpoint::without_app).collect();
    stage.peer().send(&peer_fds(&conns), HELLO)?;
    stage.finish_in_peer(&conns)?;
    Ok(conns)
}
