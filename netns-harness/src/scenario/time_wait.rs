//! `time-wait`: both sides have finished, the application first. The kernel keeps the socket for a minute.

use anyhow::Result;

use super::{Expect, Scenario, Stage, peer_fds};
use crate::Conn;
use crate::kernel::TcpState;

pub(super) const SCENARIO: Scenario = Scenario {
    expect: Expect {
        state: TcpState::TimeWait,
        inode: false,
        owners: 0,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "time-wait",
        "TIME-WAIT: the application closed first; no process has a descriptor, and the kernel drops the socket after 60 s",
        build,
    )
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let mut conns = stage.connected()?;
    stage.close_in_app(&mut conns)?;
    let fds = peer_fds(&conns);
    stage.read_to_end(stage.peer(), &fds)?;
    stage.peer().close(&fds)?;
    conns.iter_mut().for_each(|conn| conn.peer_fd = None);
    Ok(conns)
}
