//! `peer-gone`: the peer's machine is unplugged, so nothing answers, not even to ARP.

use anyhow::Result;

use super::{Scenario, Sharing, Stage};
use crate::Conn;

pub(super) const SCENARIO: Scenario = Scenario {
    sharing: Sharing::Never,
    ..Scenario::new(
        "peer-gone",
        "CLOSE-WAIT: the peer's link went down afterwards",
        build,
    )
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let conns = stage.leaked()?;
    stage.pair.set_link(false)?;
    Ok(conns)
}
