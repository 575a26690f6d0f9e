//! `fin-wait-1-orphan`: as `fin-wait-1`, but the application has closed. Kernels before 6.11 must not abort it.

use anyhow::Result;

use super::{Expect, Scenario, Stage};
use crate::Conn;
use crate::kernel::TcpState;

pub(super) const SCENARIO: Scenario = Scenario {
    expect: Expect {
        state: TcpState::FinWait1,
        send_q: 1..=1,
        inode: false,
        owners: 0,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "fin-wait-1-orphan",
        "FIN-WAIT-1: the application has closed, the peer is silent; no process has a descriptor",
        build,
    )
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let mut conns = stage.with_silent_peer()?;
    stage.close_in_app(&mut conns)?;
    Ok(conns)
}
