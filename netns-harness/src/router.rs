//! Three hosts: a client, a server, and a router between them, which has a link to each.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;

use crate::host::Host;
use crate::lab::Family;
use crate::rtnetlink;

/// The link of the client and of the server to the router.
const LINK: &str = "eth0";
/// The link between the client and the server, if there is one.
const PAST: &str = "past";
/// The VRF of the router, if there is one, and its routing table.
const VRF: (&str, u32) = ("red", 10);
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

/// The addresses that the router translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lowercase")]
pub enum Nat {
    /// None: the ends see the addresses of each other.
    None,
    /// The server sees the router as the client.
    Masquerade,
    /// The client sees the router as the server (DNAT).
    Redirect,
    /// Both of these.
    Both,
}

impl Nat {
    /// Each of them.
    pub const ALL: [Nat; 4] = [Nat::None, Nat::Masquerade, Nat::Redirect, Nat::Both];
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
        address(family, network, host)
    }
}

/// The address of a host in a network of a lab with a router.
#[must_use]
pub fn address(family: Family, network: u8, host: u8) -> IpAddr {
    match family {
        Family::V4 | Family::Mapped => Ipv4Addr::new(10, 79, network, host).into(),
        Family::V6 => Ipv6Addr::new(0xfd79, 0, 0, network.into(), 0, 0, 0, host.into()).into(),
    }
}

impl Routed {
    /// Makes the hosts, with addresses and routes of both families.
    ///
    /// # Errors
    /// The kernel refuses a network namespace; see [`crate::ensure_privileges`].
    pub fn new() -> Result<Self> {
        let [client, router, server] = [Host::new()?, Host::new()?, Host::new()?];
        router.within(forward)?;
        join(&router, Side::Client.link(), &client, 1)?;
        join(&router, Side::Server.link(), &server, 2)?;
        Ok(Self {
            client,
            router,
            server,
        })
    }

    /// Adds rules to the router with nft(8): those of `nat`, and one that drops what conntrack calls invalid. Where the client sees the
    /// router as the server, the first port of each pair leads to the second one, which is that of the server. Returns the addresses that
    /// clients connect to, one for each pair.
    ///
    /// # Errors
    /// nft(8) is missing or fails. It refuses a second call for the same family.
    pub fn translate(
        &self,
        family: Family,
        nat: Nat,
        ports: &[(u16, u16)],
    ) -> Result<Vec<SocketAddr>> {
        let (router, server) = (Side::Client.router(family), Side::Server.host(family));
        let ip = if server.is_ipv4() { "ip" } else { "ip6" };
        let masquerade = match nat {
            Nat::Masquerade | Nat::Both => "oifname server masquerade",
            Nat::None | Nat::Redirect => "",
        };
        let is_redirected = matches!(nat, Nat::Redirect | Nat::Both);
        let mut redirect = String::new();
        let mut addresses = Vec::with_capacity(ports.len());
        for &(public, port) in ports {
            let to = SocketAddr::new(server, port);
            if is_redirected {
                redirect += &format!("{ip} daddr {router} tcp dport {public} dnat to {to}\n");
            }
            addresses.push(match is_redirected {
                true => SocketAddr::new(router, public),
                false => to,
            });
        }
        let rules = format!(
            "create table {ip} gateway
            table {ip} gateway {{
                chain prerouting {{
                    type nat hook prerouting priority -100
                    {redirect}
                }}
                chain postrouting {{
                    type nat hook postrouting priority 100
                    {masquerade}
                }}
                chain forward {{
                    type filter hook forward priority 0
                    ct state invalid drop
                }}
            }}"
        );
        let output = self.router.command("nft").arg(rules).output()?;
        ensure!(
            output.status.success(),
            "nft ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(addresses)
    }

    /// Adds a host behind the router. Its link there is `link`, and its network, 10.79.N.0/24 and fd79:0:0:N::/64, has number `network`.
    ///
    /// # Errors
    /// As [`Routed::new`].
    pub fn add_host(&self, link: &str, network: u8) -> Result<Host> {
        let host = Host::new()?;
        join(&self.router, link, &host, network)?;
        Ok(host)
    }

    /// Adds a host behind the client, which then forwards. Its network has number `network`; see [`Routed::add_host`].
    ///
    /// # Errors
    /// As [`Routed::new`].
    pub fn add_host_behind_the_client(&self, network: u8) -> Result<Host> {
        let host = Host::new()?;
        self.client.within(forward)?;
        join(&self.client, "inner", &host, network)?;
        Ok(host)
    }

    /// Puts the links of the router to the client and to the server into a VRF. The main table then knows neither network. Needs the module vrf.
    ///
    /// # Errors
    /// As [`Routed::new`].
    pub fn use_vrf(&self) -> Result<()> {
        self.router.within(|| {
            let (vrf, table) = VRF;
            rtnetlink::add_vrf(vrf, table)?;
            rtnetlink::set_link(vrf, true)?;
            [Side::Client, Side::Server].iter().try_for_each(|side| {
                // The kernel takes the link down and up, and would drop its IPv6 addresses.
                let path = format!("/proc/sys/net/ipv6/conf/{}/keep_addr_on_down", side.link());
                fs::write(&path, "1").with_context(|| format!("write {path}"))?;
                rtnetlink::set_controller(side.link(), vrf)
            })
        })
    }

    /// Joins the client and the server by a link past the router. It is `past` on both, and has no addresses.
    ///
    /// # Errors
    /// As [`Routed::new`].
    pub fn add_link_past_the_router(&self) -> Result<()> {
        self.client.join(PAST, &self.server, PAST)?;
        for host in [&self.client, &self.server] {
            host.set_link(PAST, true)?;
        }
        Ok(())
    }
}

/// Makes the host of the calling thread forward packets.
fn forward() -> Result<()> {
    FORWARDING.iter().try_for_each(|name| {
        let path = format!("/proc/sys/net/{name}");
        fs::write(&path, "1").with_context(|| format!("write {path}"))
    })
}

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// Joins `host` to `router` by the network with this number.
fn join(router: &Host, link: &str, host: &Host, network: u8) -> Result<()> {
    router.join(link, host, LINK)?;
    let of = |host| FAMILIES.map(|family| address(family, network, host));
    router.within(|| set_up(link, of(1)))?;
    host.within(|| {
        set_up(LINK, of(2))?;
        of(1).into_iter().try_for_each(rtnetlink::add_default_route)
    })
}

fn set_up(link: &str, [v4, v6]: [IpAddr; 2]) -> Result<()> {
    rtnetlink::set_link(link, true)?;
    rtnetlink::add_address(link, v4, 24)?;
    rtnetlink::add_address(link, v6, 64)
}
