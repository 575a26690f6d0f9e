//! Three hosts: a client, a server, and a router between them, which has a link to each.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};

use crate::host::Host;
use crate::lab::Family;
use crate::rtnetlink;

/// The link of the client and of the server to the router.
const LINK: &str = "eth0";
/// What makes a host forward packets.
const FORWARDING: [&str; 2] = ["ipv4/ip_forward", "ipv6/conf/all/forwarding"];

/// The hosts. They are removed when this is dropped or this process ends, for whatever reason. The router has no rules: a test adds
/// those that it needs with nft(8).
#[derive(Debug)]
pub struct Routed {
    /// Its link is `client` on the router.
    pub client: Host,
    /// It forwards both families.
    pub router: Host,
    /// Its link is `server` on the router.
    pub server: Host,
}

/// An end of a link to the router.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The network 10.79.1.0/24 and fd79:0:0:1::/64.
    Client,
    /// The network 10.79.2.0/24 and fd79:0:0:2::/64.
    Server,
}

impl Side {
    /// The name of its link on the router.
    #[must_use]
    pub fn link(self) -> &'static str {
        match self {
            Side::Client => "client",
            Side::Server => "server",
        }
    }

    /// The address of the host on this side, as in packets.
    #[must_use]
    pub fn host(self, family: Family) -> IpAddr {
        self.address(family, 2)
    }

    /// The address of the router on this side.
    #[must_use]
    pub fn router(self, family: Family) -> IpAddr {
        self.address(family, 1)
    }

    fn address(self, family: Family, host: u8) -> IpAddr {
        let network = match self {
            Side::Client => 1,
            Side::Server => 2,
        };
        match family {
            Family::V4 | Family::Mapped => Ipv4Addr::new(10, 79, network, host).into(),
            Family::V6 => Ipv6Addr::new(0xfd79, 0, 0, network.into(), 0, 0, 0, host.into()).into(),
        }
    }
}

impl Routed {
    /// Makes the hosts, with addresses and routes of both families.
    ///
    /// # Errors
    /// The kernel refuses a network namespace; see [`crate::ensure_privileges`].
    pub fn new() -> Result<Self> {
        let [client, router, server] = [Host::new()?, Host::new()?, Host::new()?];
        router.within(|| {
            FORWARDING.iter().try_for_each(|name| {
                let path = format!("/proc/sys/net/{name}");
                fs::write(&path, "1").with_context(|| format!("write {path}"))
            })
        })?;
        for (side, host) in [(Side::Client, &client), (Side::Server, &server)] {
            router.join(side.link(), host, LINK)?;
            let families = [Family::V4, Family::V6];
            router.within(|| set_up(side.link(), families.map(|family| side.router(family))))?;
            host.within(|| {
                set_up(LINK, families.map(|family| side.host(family)))?;
                let mut gateways = families.iter().map(|family| side.router(*family));
                gateways.try_for_each(rtnetlink::add_default_route)
            })?;
        }
        Ok(Self {
            client,
            router,
            server,
        })
    }
}

fn set_up(link: &str, [v4, v6]: [IpAddr; 2]) -> Result<()> {
    rtnetlink::set_link(link, true)?;
    rtnetlink::add_address(link, v4, 24)?;
    rtnetlink::add_address(link, v6, 64)
}
