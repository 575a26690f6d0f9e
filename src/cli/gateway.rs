//! The arguments of `cwkill gateway`.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use clap::Arg;
use ipnet::IpNet;

use super::values::{self, List};
use super::{Logging, Output};
use crate::conntrack::ConntrackState;
use crate::filter::forwarded::Mark;

const AFTER_SHORT_HELP: &str = "\
Without --probe and --cut it lists the TCP connections between other hosts, from conntrack. \
All options: cwkill gateway --help";

const AFTER_HELP: &str = "\
It lists the TCP connections between other hosts that this host routes, with NAT both ways, from \
conntrack. --probe asks both ends and ends only what one of them has forgotten; --cut ends what \
matches. Both need a selector, and --dry-run only shows what they would do. --watch goes on with \
each connection that comes, as soon as it is open. Addresses and ports are \
those of the original direction: the source has opened the connection. Connections that end on this \
host are counted, and left to `cwkill`.

AGE is the time for which conntrack has seen no packet, at least. Where its timeout may be another \
one than that of the state, the time is unknown, and no --min-age matches.

Examples:
  cwkill gateway                           list all forwarded connections
  cwkill gateway --host 192.0.2.7          those of one host, at either end
  cwkill gateway --host 192.0.2.7 --cut --active
                                           end them, for example after a ban
  cwkill gateway 'src 10.0.0.0/8 and dport = :443' --min-age 1h --cut
                                           end quiet ones of a network
  cwkill gateway --all --probe             end what one end has forgotten
  cwkill gateway --host 192.0.2.7 --cut --active --watch --for 10m
                                           end them as they come

Exit status: 0 all that matched are ended (a probe: or alive; or something was listed), 1 nothing \
matched (0 with --ok-if-none), 2 wrong usage, 3 could not run at all, 4 some are not ended.";

#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_SHORT_HELP, after_long_help = AFTER_HELP, mut_args(of_connections))]
pub struct GatewayArgs {
    #[command(flatten)]
    pub selection: ForwardedSelection,

    #[command(flatten)]
    pub acting: ForwardedActing,

    #[command(flatten)]
    pub output: Output,
}

/// The selectors of connections that are routed through this host.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Selectors")]
pub struct ForwardedSelection {
    /// Addresses or networks of the source: the opener
    #[arg(long, alias = "local", value_name = "ADDR[/LEN]", value_parser = values::list(values::network))]
    pub src: Vec<List<IpNet>>,

    /// Addresses or networks of the destination, before NAT
    #[arg(long, alias = "peer", value_name = "ADDR[/LEN]", value_parser = values::list(values::network))]
    pub dst: Vec<List<IpNet>>,

    /// Ports of the source
    #[arg(long, alias = "port", value_name = "LIST", value_parser = values::list(values::port_range))]
    pub sport: Vec<List<RangeInclusive<u16>>>,

    /// Ports of the destination, before NAT: 80,443 or https
    #[arg(long, alias = "peer-port", value_name = "LIST", value_parser = values::list(values::port_range))]
    pub dport: Vec<List<RangeInclusive<u16>>>,

    /// Addresses or networks of either end, also after NAT
    #[arg(long, value_name = "ADDR[/LEN]", value_parser = values::list(values::network))]
    pub host: Vec<List<IpNet>>,

    /// Addresses or networks that NAT gives to the source
    #[arg(long, value_name = "ADDR[/LEN]", value_parser = values::list(values::network), hide_short_help = true)]
    pub nat_src: Vec<List<IpNet>>,

    /// Addresses or networks that NAT gives to the destination: the real server
    #[arg(long, value_name = "ADDR[/LEN]", value_parser = values::list(values::network), hide_short_help = true)]
    pub nat_dst: Vec<List<IpNet>>,

    /// Marks of conntrack: 7, 0x10, or 0x10/0xf0 for some of its bits
    #[arg(long, value_name = "VALUE[/MASK]", value_parser = values::list(values::mark), hide_short_help = true)]
    pub mark: Vec<List<Mark>>,

    /// Zones of conntrack
    #[arg(long, value_name = "LIST", value_parser = values::list(values::zone), hide_short_help = true)]
    pub zone: Vec<List<u16>>,

    /// States of conntrack: established, close-wait, fin-wait and others
    #[arg(long, value_name = "LIST", value_parser = values::conntrack_states(), hide_possible_values = true, hide_short_help = true)]
    pub conntrack_state: Vec<List<ConntrackState>>,

    /// Without a packet for at least this long: 90s, 15m, 2h
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    pub min_age: Option<Duration>,

    /// IPv4 connections
    #[arg(short = '4', long, conflicts_with = "ipv6", hide_short_help = true)]
    pub ipv4: bool,

    /// IPv6 connections
    #[arg(short = '6', long, hide_short_help = true)]
    pub ipv6: bool,

    /// This connection, also if conntrack does not know it: the addresses of both ends
    #[arg(long, value_name = "A:PORT,B:PORT", value_parser = values::connection, hide_short_help = true)]
    pub connection: Vec<[SocketAddr; 2]>,

    /// Every forwarded connection
    #[arg(long)]
    pub all: bool,

    /// A filter as for ss(8): 'src 10.0.0.0/8 and dport = :443'
    #[arg(value_name = "EXPRESSION")]
    pub expression: Vec<String>,
}

/// The options that say what to do to the connections.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Action")]
pub struct ForwardedActing {
    /// Ask both ends, and end only what one has forgotten
    #[arg(long, conflicts_with = "cut")]
    pub probe: bool,

    /// End what matches: reset both ends, and verify
    #[arg(long)]
    pub cut: bool,

    /// Also cut ESTABLISHED connections of any age
    #[arg(long)]
    pub active: bool,

    /// Show the plan and send nothing
    #[arg(short = 'n', long, visible_alias = "dryrun")]
    pub dry_run: bool,

    /// At most N connections, the longest quiet first
    #[arg(long, value_name = "N", value_parser = values::kills)]
    pub max_kills: Option<usize>,

    /// Go on with what comes, until Ctrl-C, --for or --max-kills
    #[arg(long)]
    pub watch: bool,

    /// End the watch after this time: 90s, 15m, 2h
    #[arg(long = "for", value_name = "DURATION", value_parser = values::positive_duration)]
    pub watch_for: Option<Duration>,

    /// Send at most N packets a second [default: 20000]
    #[arg(long, value_name = "N", value_parser = values::rate, hide_short_help = true)]
    pub rate: Option<u32>,

    #[command(flatten)]
    pub logging: Logging,
}

/// Replaces the help of options that is about sockets.
fn of_connections(argument: Arg) -> Arg {
    let help = match argument.get_id().as_str() {
        "jsonl" => "Print one JSON object per connection, one per line",
        "verbose" => "Also print status, zone, id and what is left of timeouts",
        _ => return argument,
    };
    argument.help(help).long_help(None::<&str>)
}
