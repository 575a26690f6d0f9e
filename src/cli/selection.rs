//! The options that select sockets and network namespaces.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use globset::GlobMatcher;
use ipnet::IpNet;

use super::values::{self, List};
use crate::filter::containers::{ContainerName, NamePattern, PodName};
use crate::filter::selectors::UnitName;
use crate::finder::way::UseIterator;
use crate::model::Cause;
use crate::tcp::TcpState;

/// The selectors of every command that finds stuck sockets.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Selectors")]
pub struct Selection {
    /// Local ports: 8080,8443 or 9000-9100 or https
    #[arg(long, value_name = "LIST", value_parser = values::list(values::port_range))]
    pub port: Vec<List<RangeInclusive<u16>>>,

    /// Peer ports
    #[arg(long, value_name = "LIST", value_parser = values::list(values::port_range), hide_short_help = true)]
    pub peer_port: Vec<List<RangeInclusive<u16>>>,

    /// Local addresses or networks
    #[arg(long, value_name = "ADDR[/LEN]", value_parser = values::list(values::network), hide_short_help = true)]
    pub local: Vec<List<IpNet>>,

    /// Peer addresses or networks
    #[arg(long, value_name = "ADDR[/LEN]", value_parser = values::list(values::network))]
    pub peer: Vec<List<IpNet>>,

    #[command(flatten)]
    pub owners: OwnerSelection,

    /// Sockets of this user
    #[arg(long, visible_alias = "uid", value_name = "NAME|UID", value_parser = values::list(values::user), hide_short_help = true)]
    pub user: Vec<List<u32>>,

    /// States [default: close-wait]
    #[arg(long, value_name = "LIST", value_parser = values::states(), hide_possible_values = true, hide_short_help = true)]
    pub state: Vec<List<TcpState>>,

    /// Sockets stuck for at least this long: 90s, 15m
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    pub min_age: Option<Duration>,

    /// Sockets in which no data has moved in either direction for at least this long [default: 5s when cwkill
    /// acts or plans, else 0s]
    #[arg(long, value_name = "DURATION", value_parser = values::duration, hide_short_help = true)]
    pub min_idle: Option<Duration>,

    /// Causes: not-accepted, unread, drained, sending
    ///
    /// In other states than close-wait also handshake and orphan.
    #[arg(long, value_name = "LIST", value_parser = values::causes(), hide_possible_values = true, hide_short_help = true)]
    pub cause: Vec<List<Cause>>,

    /// Sockets whose local address is no longer on this host, for example after a virtual IP has moved
    #[arg(long, hide_short_help = true)]
    pub address_gone: bool,

    /// Connections over IPv4, on sockets of either family
    #[arg(short = '4', long, conflicts_with = "ipv6", hide_short_help = true)]
    pub ipv4: bool,

    /// Connections over IPv6
    #[arg(short = '6', long, hide_short_help = true)]
    pub ipv6: bool,

    /// Use this network namespace (never acts by itself)
    #[arg(
        short = 'N',
        long,
        value_name = "NAME|PATH|PID",
        value_parser = values::netns,
        conflicts_with = "all_netns"
    )]
    pub netns: Option<String>,

    /// Use all network namespaces (never acts by itself)
    #[arg(long)]
    pub all_netns: bool,

    /// Read the descriptors of all processes by an iterator in the kernel instead of /proc
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = UseIterator::Auto, help_heading = "Search", hide_short_help = true)]
    pub bpf: UseIterator,

    /// As for ss(8): 'sport = :80 and dst 10.0.0.0/8'
    #[arg(value_name = "EXPRESSION")]
    pub expression: Vec<String>,
}

/// The selectors by owner. `cwkill reclaim` has only these, with other help texts. The kernel no longer reports the peer of
/// a dead socket. It usually reports the local address; `cwkill reclaim` shows it, and does not select by it.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Selectors")]
pub struct OwnerSelection {
    /// Sockets of this process and of its listeners
    #[arg(short, long, value_name = "PID", value_parser = values::list(values::pid))]
    pub pid: Vec<List<i32>>,

    /// Sockets of processes of this name: java,'php*'
    #[arg(long, value_name = "GLOB", value_parser = values::list(values::glob))]
    pub process: Vec<List<GlobMatcher>>,

    /// Sockets of this systemd unit: nginx or 'php*'
    #[arg(long, value_name = "NAME", value_parser = values::list(values::unit))]
    pub unit: Vec<List<UnitName>>,

    /// Sockets of this container: web, 'web-*', 3f4a9b2c
    ///
    /// The first 8 digits of the id are enough. The name comes from files of docker, podman, containerd, CRI-O and the kubelet.
    #[arg(long, value_name = "NAME|ID", value_parser = values::list(values::container))]
    pub container: Vec<List<ContainerName>>,

    /// Sockets of this pod: web-5c9 or 'shop/web-*'
    #[arg(long, value_name = "[NAMESPACE/]NAME", value_parser = values::list(values::pod), hide_short_help = true)]
    pub pod: Vec<List<PodName>>,

    /// Sockets of the pods of this kubernetes namespace
    #[arg(long, value_name = "NAME", value_parser = values::list(values::namespace), hide_short_help = true)]
    pub namespace: Vec<List<NamePattern>>,

    /// Sockets of the containers of this service of docker compose
    #[arg(long, value_name = "NAME", value_parser = values::list(values::compose_service), hide_short_help = true)]
    pub compose_service: Vec<List<NamePattern>>,

    /// Sockets of processes in this cgroup or below
    #[arg(long, value_name = "PATH", value_parser = values::cgroup, hide_short_help = true)]
    pub cgroup: Vec<String>,

    /// Read the names of containers below this directory
    #[arg(long, value_name = "DIR", value_parser = values::host_root, default_value = "/", hide_default_value = true, help_heading = "Search", hide_short_help = true)]
    pub host_root: PathBuf,

    /// Every stuck socket of the searched namespaces
    #[arg(long, display_order = LAST_IN_HELP)]
    pub all: bool,
}

/// The position in the help text after all other selectors.
const LAST_IN_HELP: usize = 999;
