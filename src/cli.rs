//! What the operator typed. Each value is parsed here; what the whole means is in [`crate::config`].

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use clap::{ArgAction, ColorChoice, Parser};
use globset::{Glob, GlobMatcher};
use ipnet::{IpNet, Ipv4Net};
use nix::unistd::{Uid, User};

use crate::diagnosis::Cause;
use crate::injector::MethodName;
use crate::selectors::UnitName;
use crate::tcp::TcpState;

const AFTER_HELP: &str = "\
Without a selector cwkill lists what is stuck and never acts. With one it acts, unless --dry-run.
Different selectors must all match; of one selector's values, any.

Examples:
  cwkill                                   list what is stuck, whose it is, and why
  cwkill --port 8080 --dry-run             show what would be done to each socket
  cwkill --port 8080                       do it, verify it, report it
  cwkill --process 'java*' --min-age 1h    only sockets of java, stuck for at least an hour
  cwkill 'sport = :8080 and dst 10.0.0.0/8'
                                           any filter of ss(8)

Exit status: 0 all matched sockets are closed (or something was listed), 1 nothing matched,
2 wrong usage, 3 could not do the job at all, 4 some matched sockets are not closed.";

/// Close TCP sockets stuck in CLOSE-WAIT without killing the process that leaks them.
#[derive(Debug, Parser)]
#[command(name = "cwkill", version, after_help = AFTER_HELP, max_term_width = 100)]
pub struct Args {
    /// Local ports: 8080 or 8080,8443 or 9000-9100
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = port_range)]
    #[arg(help_heading = SELECTORS)]
    pub port: Vec<RangeInclusive<u16>>,

    /// Peer ports
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = port_range)]
    #[arg(help_heading = SELECTORS)]
    pub peer_port: Vec<RangeInclusive<u16>>,

    /// Local address or network
    #[arg(long, value_name = "ADDR[/LEN]", value_delimiter = ',', value_parser = network)]
    #[arg(help_heading = SELECTORS)]
    pub local: Vec<IpNet>,

    /// Peer address or network
    #[arg(long, value_name = "ADDR[/LEN]", value_delimiter = ',', value_parser = network)]
    #[arg(help_heading = SELECTORS)]
    pub peer: Vec<IpNet>,

    /// Sockets of this process (of its listener, if never accepted)
    #[arg(short, long, value_name = "PID", value_delimiter = ',', value_parser = pid)]
    #[arg(help_heading = SELECTORS)]
    pub pid: Vec<i32>,

    /// Sockets of processes with this name: java or 'php-fpm*'
    #[arg(long, value_name = "GLOB", value_parser = glob)]
    #[arg(help_heading = SELECTORS)]
    pub process: Vec<GlobMatcher>,

    /// Sockets of this systemd unit: nginx, nginx.service or 'php*'
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = unit)]
    #[arg(help_heading = SELECTORS)]
    pub unit: Vec<UnitName>,

    /// Sockets of this container: its id, 8 digits of it or more, or its name where the cgroup has one
    #[arg(long, value_name = "ID|NAME", value_delimiter = ',', value_parser = container)]
    #[arg(help_heading = SELECTORS)]
    pub container: Vec<String>,

    /// Sockets of processes in this cgroup or below
    #[arg(long, value_name = "PATH", value_parser = cgroup)]
    #[arg(help_heading = SELECTORS)]
    pub cgroup: Vec<String>,

    /// Sockets of this user
    #[arg(long, value_name = "NAME|UID", value_delimiter = ',', value_parser = user)]
    #[arg(help_heading = SELECTORS)]
    pub user: Vec<u32>,

    /// States [default: close-wait]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = state)]
    #[arg(help_heading = SELECTORS)]
    pub state: Vec<TcpState>,

    /// Sockets stuck for at least this long: 90s, 15m, 2h
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    #[arg(help_heading = SELECTORS)]
    pub min_age: Option<Duration>,

    /// Causes: not-accepted, unread, drained, sending, handshake, orphan
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = cause)]
    #[arg(help_heading = SELECTORS)]
    pub cause: Vec<Cause>,

    /// Connections over IPv4, on sockets of either family
    #[arg(short = '4', long, conflicts_with = "ipv6")]
    #[arg(help_heading = SELECTORS)]
    pub ipv4: bool,

    /// Connections over IPv6
    #[arg(short = '6', long)]
    #[arg(help_heading = SELECTORS)]
    pub ipv6: bool,

    /// Look into this network namespace (does not make it act by itself)
    #[arg(
        short = 'N',
        long,
        value_name = "NAME|PATH|PID",
        conflicts_with = "all_netns"
    )]
    #[arg(help_heading = SELECTORS)]
    pub netns: Option<String>,

    /// Look into every network namespace (does not make it act by itself)
    #[arg(long)]
    #[arg(help_heading = SELECTORS)]
    pub all_netns: bool,

    /// Everything that is stuck
    #[arg(long)]
    #[arg(help_heading = SELECTORS)]
    pub all: bool,

    /// Sockets that match this filter of ss(8): 'sport = :8080 and dst 10.0.0.0/8'
    #[arg(value_name = "EXPRESSION")]
    pub expression: Vec<String>,

    /// Show what would be done, and do nothing
    #[arg(short = 'n', long, visible_alias = "dryrun")]
    #[arg(help_heading = ACTION)]
    pub dry_run: bool,

    /// Methods to try in this order: probe, shutdown, destroy, rst [default: auto, the last three]
    #[arg(long, value_name = "auto|LIST", value_delimiter = ',', value_parser = method)]
    #[arg(help_heading = ACTION)]
    pub method: Vec<MethodChoice>,

    /// How long a socket gets to close before the next method [default: 1s]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    #[arg(help_heading = ACTION)]
    pub grace: Option<Duration>,

    /// Allow the loss of bytes still queued to a peer
    #[arg(long)]
    #[arg(help_heading = ACTION)]
    pub discard_unsent: bool,

    /// Act on at most N sockets, the oldest first
    #[arg(long, value_name = "N", value_parser = kills)]
    #[arg(help_heading = ACTION)]
    pub max_kills: Option<usize>,

    /// Print one JSON document
    #[arg(long, conflicts_with = "jsonl")]
    #[arg(help_heading = OUTPUT)]
    pub json: bool,

    /// Print one JSON object a line, one line a socket
    #[arg(long)]
    #[arg(help_heading = OUTPUT)]
    pub jsonl: bool,

    /// Leave out the header of the table
    #[arg(short = 'H', long)]
    #[arg(help_heading = OUTPUT)]
    pub no_header: bool,

    /// Print errors only
    #[arg(short, long, conflicts_with_all = ["json", "jsonl", "verbose"])]
    #[arg(help_heading = OUTPUT)]
    pub quiet: bool,

    /// Print every owner and every attempt
    #[arg(short, long, action = ArgAction::SetTrue)]
    #[arg(help_heading = OUTPUT)]
    pub verbose: bool,

    /// Colour the table; NO_COLOR is respected
    #[arg(long, value_name = "WHEN", default_value_t = ColorChoice::Auto)]
    #[arg(help_heading = OUTPUT)]
    pub color: ColorChoice,
}

const SELECTORS: &str = "Selectors";
const ACTION: &str = "Action";
const OUTPUT: &str = "Output";

/// A value of `--method`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MethodChoice {
    /// The default order.
    Auto,
    /// This one.
    Only(MethodName),
}

fn port_range(text: &str) -> Result<RangeInclusive<u16>, String> {
    let port = |text: &str| match text.parse::<u16>() {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(format!(
            "`{text}` is no port from 1 to 65535; give 8080 or 8080,8443 or 9000-9100"
        )),
    };
    match text.split_once('-') {
        None => port(text).map(|port| port..=port),
        Some((first, last)) => {
            let (first, last) = (port(first)?, port(last)?);
            if first > last {
                return Err(format!("the range is empty; give {last}-{first}"));
            }
            Ok(first..=last)
        }
    }
}

fn network(text: &str) -> Result<IpNet, String> {
    let parsed = match text.contains('/') {
        true => text.parse::<IpNet>().ok(),
        false => text.parse::<IpAddr>().ok().map(IpNet::from),
    };
    let network = parsed.ok_or("give 192.0.2.1 or 192.0.2.0/24 or 2001:db8::/32")?;
    // Sockets that speak IPv4 through an IPv6 socket count as IPv4.
    if let IpNet::V6(v6) = network
        && let Some(v4) = v6.addr().to_ipv4_mapped()
        && let Some(length) = v6.prefix_len().checked_sub(96)
    {
        return Ok(Ipv4Net::new_assert(v4, length).into());
    }
    Ok(network)
}

fn pid(text: &str) -> Result<i32, String> {
    match text.parse() {
        Ok(pid) if pid > 0 => Ok(pid),
        _ => Err("give a process number, 4711; for a name use --process".into()),
    }
}

fn glob(text: &str) -> Result<GlobMatcher, String> {
    match Glob::new(text) {
        Ok(glob) if !text.is_empty() => Ok(glob.compile_matcher()),
        Ok(_) => Err("give a name or a pattern, java or 'php-fpm*'".into()),
        Err(error) => Err(format!("{}; give java or 'php-fpm*'", error.kind())),
    }
}

fn unit(text: &str) -> Result<UnitName, String> {
    match UnitName::new(text) {
        Ok(unit) if !text.is_empty() => Ok(unit),
        Ok(_) => Err("give a unit, nginx or nginx.service or 'php*'".into()),
        Err(error) => Err(format!("{}; give nginx or 'php*'", error.kind())),
    }
}

fn container(text: &str) -> Result<String, String> {
    match text.is_empty() {
        true => Err("give an id, 3f4a9b2c1d0e, or a name".into()),
        false => Ok(text.to_owned()),
    }
}

/// A path in a hierarchy of cgroups; one as seen below the usual mount point is taken as well.
fn cgroup(text: &str) -> Result<String, String> {
    // Of cgroup v1, every hierarchy is mounted in a directory with the name of its controllers.
    const HIERARCHIES: [&str; 17] = [
        "unified",
        "systemd",
        "blkio",
        "cpu",
        "cpuacct",
        "cpu,cpuacct",
        "cpuset",
        "devices",
        "freezer",
        "hugetlb",
        "memory",
        "misc",
        "net_cls",
        "net_cls,net_prio",
        "net_prio",
        "perf_event",
        "pids",
    ];
    let path = match text.strip_prefix("/sys/fs/cgroup") {
        None => text,
        Some(below) => {
            let (first, rest) = match below.trim_start_matches('/').split_once('/') {
                Some((first, _)) => (first, &below[1 + first.len()..]),
                None => (below.trim_start_matches('/'), "/"),
            };
            match HIERARCHIES.contains(&first) {
                true => rest,
                false if below.is_empty() => "/",
                false => below,
            }
        }
    };
    match path.starts_with('/') {
        true => Ok(path.to_owned()),
        false => Err("give a path, /system.slice/nginx.service".into()),
    }
}

fn user(text: &str) -> Result<u32, String> {
    if let Ok(uid) = text.parse() {
        return Ok(Uid::from_raw(uid).as_raw());
    }
    match User::from_name(text) {
        Ok(Some(user)) => Ok(user.uid.as_raw()),
        Ok(None) => Err("no such user here; give www-data or 33".into()),
        Err(errno) => Err(format!("cannot look the user up: {errno}; give the uid")),
    }
}

fn state(text: &str) -> Result<TcpState, String> {
    text.parse()
        .map_err(|()| "give close-wait or close-wait,last-ack".into())
}

fn cause(text: &str) -> Result<Cause, String> {
    text.parse()
        .map_err(|()| "give some of not-accepted,unread,drained,sending,handshake,orphan".into())
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}; give 500ms, 90s, 15m or 2h"))
}

fn method(text: &str) -> Result<MethodChoice, String> {
    match text {
        "auto" => Ok(MethodChoice::Auto),
        _ => text
            .parse()
            .map(MethodChoice::Only)
            .map_err(|()| "give auto, or some of probe,shutdown,destroy,rst".into()),
    }
}

fn kills(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count) if count > 0 => Ok(count),
        _ => Err("give a number from 1 on; to do nothing use --dry-run".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn ports_and_ranges() {
        assert_eq!(port_range("8080"), Ok(8080..=8080));
        assert_eq!(port_range("1-65535"), Ok(1..=65535));
        for bad in ["", "0", "65536", "80x", "-", "5-", "-5", "9-1", "1-2-3"] {
            assert!(port_range(bad).is_err(), "{bad}");
        }
        assert!(port_range("9100-9000").unwrap_err().contains("9000-9100"));
    }

    #[test]
    fn networks_are_canonical() {
        let text = |t: &str| network(t).map(|n| n.to_string());
        assert_eq!(text("10.0.0.1"), Ok("10.0.0.1/32".into()));
        assert_eq!(text("::ffff:10.0.0.1"), Ok("10.0.0.1/32".into()));
        assert_eq!(text("::ffff:10.0.0.0/104"), Ok("10.0.0.0/8".into()));
        assert_eq!(text("::ffff:0.0.0.0/80"), Ok("::ffff:0.0.0.0/80".into()));
        assert_eq!(text("2001:db8::/32"), Ok("2001:db8::/32".into()));
        for bad in ["", "10.0.0", "10.0.0.1/33", "fe80::/129", "host"] {
            assert!(network(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_that_mean_nothing_are_refused() {
        for bad in ["0", "-1", "java", ""] {
            assert!(pid(bad).is_err(), "{bad}");
            assert!(kills(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn cgroups_are_paths_in_a_hierarchy() {
        for (text, path) in [
            ("/", "/"),
            ("/system.slice", "/system.slice"),
            ("/sys/fs/cgroup", "/"),
            ("/sys/fs/cgroup/", "/"),
            (
                "/sys/fs/cgroup/system.slice/a.service",
                "/system.slice/a.service",
            ),
            ("/sys/fs/cgroup/unified/system.slice", "/system.slice"),
            ("/sys/fs/cgroup/cpu,cpuacct/docker/x", "/docker/x"),
            ("/sys/fs/cgroup/memory", "/"),
        ] {
            assert_eq!(cgroup(text).as_deref(), Ok(path), "{text}");
        }
        for bad in ["", "system.slice", "/sys/fs/cgroupx"] {
            assert!(cgroup(bad).is_err(), "{bad}");
        }
        assert!(container("").is_err() && unit("").is_err() && unit("a[").is_err());
    }
}
