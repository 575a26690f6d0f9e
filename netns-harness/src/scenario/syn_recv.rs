//! `syn-recv`: the peer has knocked and does not answer the answer.

use anyhow::Result;

use super::{Expect, STEP, Scenario, Stage};
use crate::Conn;
use crate::agent::{Dial, Endpoint};
use crate::kernel::TcpState;

pub(super) const SCENARIO: Scenario = Scenario {
    expect: Expect {
        state: TcpState::SynRecv,
        inode: false,
        owners: 0,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "syn-recv",
        "SYN-RECV: the peer never completes the handshake; no process has it",
        build,
    )
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let dial = Dial {
        drop_incoming: true,
        ..Dial::default()
    };
    let ends = stage
        .peer()
        .connect(stage.pair.app_address, stage.count, dial, STEP)?;
    Ok(ends.iter().map(Endpoint::without_app).collect())
}
