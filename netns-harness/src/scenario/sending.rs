//! `sending`: the peer has finished and reads nothing, and megabytes are in the send queue. Closing the socket loses data.

use anyhow::Result;

use super::{Expect, Scenario, Stage, app_fds};
use crate::Conn;
use crate::agent::Dial;

/// SO_RCVBUF of the peer in bytes. The kernel raises it to its minimum.
const WINDOW: usize = 1024;

/// Minimum of queued bytes per connection.
const MIN_QUEUED: u32 = 32 << 10;

/// Approximate sum of queued bytes.
const TOTAL: u64 = 64 << 20;

pub(super) const SCENARIO: Scenario = Scenario {
    expect: Expect {
        send_q: MIN_QUEUED..=u32::MAX,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "sending",
        "CLOSE-WAIT: the peer has finished and reads nothing, with up to 2 MiB in the send queue",
        build,
    )
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let dial = Dial {
        recv_buffer: Some(WINDOW),
        ..Dial::default()
    };
    let mut conns = stage.connected_by(dial)?;
    stage.finish_in_peer(&conns)?;
    let fds = app_fds(&conns);
    stage.read_to_end(stage.app(), &fds)?;
    // With many connections, TCP memory is the limit.
    let each = (TOTAL / stage.count as u64).clamp(u64::from(MIN_QUEUED) * 2, 2 << 20);
    for (conn, sent) in conns.iter_mut().zip(stage.app().fill(&fds, 0, each)?) {
        conn.sent = sent;
    }
    Ok(conns)
}
