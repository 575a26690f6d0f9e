//! `syn-sent`: the application has sent a SYN and receives no answer.

use std::net::SocketAddr;

use anyhow::Result;

use super::{Expect, STEP, Scenario, Stage};
use crate::Conn;
use crate::agent::Dial;
use crate::kernel::TcpState;

pub(super) const SCENARIO: Scenario = Scenario {
    expect: Expect {
        state: TcpState::SynSent,
        // The SYN.
        send_q: 1..=1,
        ..Expect::CLOSE_WAIT
    },
    ..Scenario::new(
        "syn-sent",
        "SYN-SENT: a bystander; the application connects to a peer that never answers",
        build,
    )
};

/// A port without listener. The application does not receive the RST.
const DISCARD: u16 = 9;

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let dial = Dial {
        drop_incoming: true,
        ..Dial::default()
    };
    let to = SocketAddr::new(stage.pair.peer_address_of_app(), DISCARD);
    let ends = stage.app().connect(to, stage.count, dial, STEP)?;
    let conns = ends.iter().map(|end| Conn {
        local: end.local,
        peer: end.peer,
        app_fd: Some(end.fd),
        peer_fd: None,
        sent: 0,
    });
    Ok(conns.collect())
}
