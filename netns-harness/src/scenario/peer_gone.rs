//! `peer-gone`: the peer's machine is unplugged: nothing answers, not even to ARP.

use anyhow::Result;

use super::{Expect, LEAKY_APP, Scenario, Sharing, Stage};
use crate::Conn;

pub(super) const SCENARIO: Scenario = Scenario {
    name: "peer-gone",
    summary: "CLOSE-WAIT: then the peer's link went down",
    hidden: false,
    app: LEAKY_APP,
    sharing: Sharing::Never,
    expect: Expect::CLOSE_WAIT,
    deadline: None,
    build,
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    let conns = stage.leaked()?;
    stage.pair.set_link(false)?;
    Ok(conns)
}
