//! `vrf`: the application's link is in a VRF, so its accepted sockets are bound to the VRF. Needs the module vrf.

use std::fs;

use anyhow::{Context as _, Result};
use nix::ifaddrs::getifaddrs;

use super::{Scenario, Sharing, Stage};
use crate::{Conn, rtnetlink};

/// The routing table of the VRF.
const TABLE: u32 = 10;
const NAME: &str = "vrf0";

pub(super) const SCENARIO: Scenario = Scenario {
    // Not every kernel has the module.
    hidden: true,
    sharing: Sharing::Never,
    ..Scenario::new(
        "vrf",
        "CLOSE-WAIT: bound to a VRF (l3mdev), read to the end; needs the module vrf",
        build,
    )
};

fn build(stage: &Stage<'_>) -> Result<Vec<Conn>> {
    stage.app_host.within(|| put_into_vrf(stage))?;
    stage.leaked()
}

fn put_into_vrf(stage: &Stage<'_>) -> Result<()> {
    let address = stage.pair.app_address.ip();
    let of_address = |interface: &nix::ifaddrs::InterfaceAddress| {
        let has = interface.address.as_ref();
        has.and_then(|it| {
            let v4 = it.as_sockaddr_in().map(|it| it.ip().into());
            v4.or_else(|| it.as_sockaddr_in6().map(|it| it.ip().into()))
        }) == Some(address)
    };
    let link = getifaddrs()?.find(of_address).context("no link")?;
    let link = link.interface_name;
    // A listener that is not bound also accepts connections of the VRF. The accepted sockets are bound to it.
    fs::write("/proc/sys/net/ipv4/tcp_l3mdev_accept", "1")?;
    // The kernel takes the link down and up, and would drop its IPv6 addresses.
    fs::write(
        format!("/proc/sys/net/ipv6/conf/{link}/keep_addr_on_down"),
        "1",
    )?;
    rtnetlink::add_vrf(NAME, TABLE)?;
    rtnetlink::set_link(NAME, true)?;
    rtnetlink::set_controller(&link, NAME)
}
