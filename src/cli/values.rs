//! Parses the values of options. Each error message gives the reason and a valid example.

use std::ffi::OsStr;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use clap::Arg;
use clap::builder::{PossibleValue, TypedValueParser};
use globset::{Glob, GlobMatcher};
use ipnet::{IpNet, Ipv4Net};
use nix::unistd::{Uid, User};

use super::{Limit, LogTarget, MethodChoice};
use crate::check::threshold::Threshold;
use crate::conntrack::ConntrackState;
use crate::filter::Services;
use crate::filter::containers::{ContainerName, NamePattern, PodName};
use crate::filter::forwarded::Mark;
use crate::filter::selectors::UnitName;
use crate::model::{Cause, Method};
use crate::tcp::TcpState;

/// The values that one option has got, separated by commas.
#[derive(Clone, Debug)]
pub struct List<T>(Vec<T>);

/// The values of an option that was given any number of times, each time with a list.
pub fn flat<T>(lists: Vec<List<T>>) -> Vec<T> {
    lists.into_iter().flat_map(|list| list.0).collect()
}

/// Parses a list with the parser of one value. A comma at the end is ignored.
#[derive(Clone)]
pub(super) struct ListParser<T> {
    one: fn(&str) -> Result<T, String>,
    /// The values that a shell completes. Empty if there are too many.
    known: Vec<&'static str>,
}

pub(super) fn list<T>(one: fn(&str) -> Result<T, String>) -> ListParser<T> {
    ListParser {
        one,
        known: Vec::new(),
    }
}

impl<T> ListParser<T> {
    /// The same parser, for an option with few possible values.
    fn of(self, known: impl IntoIterator<Item = &'static str>) -> Self {
        ListParser {
            known: known.into_iter().collect(),
            ..self
        }
    }
}

impl<T: Clone + Send + Sync + 'static> TypedValueParser for ListParser<T> {
    type Value = List<T>;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&Arg>,
        value: &OsStr,
    ) -> Result<List<T>, clap::Error> {
        let one = self.one;
        let parse = move |text: &str| {
            parts(text)
                .into_iter()
                .map(one)
                .collect::<Result<_, _>>()
                .map(List)
        };
        TypedValueParser::parse_ref(&parse, command, argument, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let known = self.known.iter().map(PossibleValue::new);
        match self.known.is_empty() {
            true => None,
            false => Some(Box::new(known)),
        }
    }
}

/// A value in a message.
fn shown(text: &str) -> String {
    match text {
        "" => "an empty value".to_owned(),
        _ => format!("`{text}`"),
    }
}

/// The parts of a list. A comma between braces belongs to a pattern such as `{java,node}`.
fn parts(text: &str) -> Vec<&str> {
    let mut depth = 0_usize;
    let mut parts: Vec<&str> = text
        .split(|c| {
            match c {
                '{' => depth += 1,
                '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            c == ',' && depth == 0
        })
        .collect();
    if parts.len() > 1 && parts.last() == Some(&"") {
        parts.pop();
    }
    parts
}

pub(super) fn port_range(text: &str) -> Result<RangeInclusive<u16>, String> {
    let port = |text: &str| match text.parse::<u16>() {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(format!(
            "{} is not a port, and not a service in /etc/services; for example 8080 or 8080,8443 or 9000-9100 or https",
            shown(text)
        )),
    };
    // The name of a service can contain a dash.
    let is_name = text.starts_with(|c: char| c.is_ascii_alphabetic());
    if is_name && let Some(port) = Services::of_this_host().port(text) {
        return Ok(port..=port);
    }
    // `:8080` is how ss(8) writes a port.
    let text = text.strip_prefix(':').unwrap_or(text);
    match text.split_once('-') {
        None => port(text).map(|port| port..=port),
        Some((first, last)) => {
            let (first, last) = (port(first)?, port(last)?);
            if first > last {
                return Err(format!(
                    "the first port is greater than the last; for example {last}-{first}"
                ));
            }
            Ok(first..=last)
        }
    }
}

pub(super) fn network(text: &str) -> Result<IpNet, String> {
    let parsed = match text.contains('/') {
        true => text.parse::<IpNet>().ok(),
        false => text.parse::<IpAddr>().ok().map(IpNet::from),
    };
    let network = parsed.ok_or_else(|| {
        if let Ok(address) = text.parse::<SocketAddr>() {
            let (ip, port) = (address.ip(), address.port());
            return format!(
                "{} has a port: give the address alone, {ip}, and the port with --port {port} (of this host) or --peer-port {port}",
                shown(text)
            );
        }
        format!(
            "{} is not an address or a network; for example 192.0.2.1 or 192.0.2.0/24 or 2001:db8::/32",
            shown(text)
        )
    })?;
    // IPv4 connections on IPv6 sockets count as IPv4.
    if let IpNet::V6(v6) = network
        && let Some(v4) = v6.addr().to_ipv4_mapped()
        && let Some(length) = v6.prefix_len().checked_sub(96)
    {
        return Ok(Ipv4Net::new_assert(v4, length).into());
    }
    Ok(network)
}

pub(super) fn log_target(text: &str) -> Result<LogTarget, String> {
    match text {
        "journald" => Ok(LogTarget::Journald),
        "stderr" => Ok(LogTarget::Stderr),
        "none" => Ok(LogTarget::None),
        _ => Err("must be journald, stderr or none; for a file use --log-file PATH".into()),
    }
}

/// The number of a descriptor.
pub(super) fn descriptor(text: &str) -> Result<i32, String> {
    let number = text.parse().ok().filter(|number| *number >= 0);
    number.ok_or_else(|| format!("`{text}` is not the number of a descriptor; for example 7"))
}

pub(super) fn pid(text: &str) -> Result<i32, String> {
    match text.parse() {
        Ok(pid) if pid > 0 => Ok(pid),
        _ => Err(format!(
            "{} is not a process number; for example 4711; for a name use --process",
            shown(text)
        )),
    }
}

pub(crate) fn glob(text: &str) -> Result<GlobMatcher, String> {
    match Glob::new(text) {
        Ok(glob) if !text.is_empty() => Ok(glob.compile_matcher()),
        Ok(_) => Err("must not be empty; for example java or 'php-fpm*'".into()),
        Err(error) => Err(format!(
            "`{text}` is not a pattern: {}; for example java or 'php-fpm*'",
            error.kind()
        )),
    }
}

pub(crate) fn unit(text: &str) -> Result<UnitName, String> {
    match UnitName::new(text) {
        Ok(unit) if !text.is_empty() => Ok(unit),
        Ok(_) => Err("must not be empty; for example nginx or nginx.service or 'php*'".into()),
        Err(error) => Err(format!(
            "`{text}` is not a pattern: {}; for example nginx or 'php*'",
            error.kind()
        )),
    }
}

pub(super) fn container(text: &str) -> Result<ContainerName, String> {
    named(
        text,
        "my-leaky-app, 'web-*' or 3f4a9b2c1d0e",
        ContainerName::new,
    )
}

pub(super) fn pod(text: &str) -> Result<PodName, String> {
    let example = "web-5c9, 'web-*' or 'shop/web-*'";
    if text.split('/').any(str::is_empty) || text.matches('/').count() > 1 {
        return Err(format!(
            "`{text}` is not a pod, or a namespace and a pod; for example {example}"
        ));
    }
    named(text, example, PodName::new)
}

pub(super) fn namespace(text: &str) -> Result<NamePattern, String> {
    if text.contains('/') {
        return Err(format!(
            "`{text}` is not a namespace of kubernetes; for example shop. For a pod use --pod, for a network namespace --netns"
        ));
    }
    named(text, "shop or 'team-*'", NamePattern::new)
}

pub(super) fn compose_service(text: &str) -> Result<NamePattern, String> {
    named(text, "web or 'worker*'", NamePattern::new)
}

fn named<T>(
    text: &str,
    example: &str,
    parse: impl Fn(&str) -> Result<T, globset::Error>,
) -> Result<T, String> {
    match parse(text) {
        _ if text.is_empty() => Err(format!("must not be empty; for example {example}")),
        Ok(value) => Ok(value),
        Err(error) => Err(format!(
            "`{text}` is not a pattern: {}; for example {example}",
            error.kind()
        )),
    }
}

/// The root directory of a host, whose files name the containers.
pub(super) fn host_root(text: &str) -> Result<PathBuf, String> {
    match text.is_empty() {
        true => Err("must not be empty; for example /host".into()),
        false => Ok(text.into()),
    }
}

/// A path in a cgroup hierarchy. A path below the usual mount point, /sys/fs/cgroup, is accepted as well.
pub(super) fn cgroup(text: &str) -> Result<String, String> {
    // Each hierarchy of cgroup v1 is mounted in a directory that is named after its controllers.
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
        false => Err("must begin with /; for example /system.slice/nginx.service".into()),
    }
}

pub(crate) fn user(text: &str) -> Result<u32, String> {
    if let Ok(uid) = text.parse() {
        return Ok(Uid::from_raw(uid).as_raw());
    }
    match User::from_name(text) {
        Ok(Some(user)) => Ok(user.uid.as_raw()),
        Ok(None) => Err(format!(
            "{} is not a user of this host; for example www-data or 33",
            shown(text)
        )),
        Err(errno) => Err(format!(
            "cannot search for the user: {errno}; use the uid, for example 33"
        )),
    }
}

/// A network namespace.
pub(super) fn netns(text: &str) -> Result<String, String> {
    match text.is_empty() {
        true => Err(
            "must not be empty; for example 4711 (a process), a path, or a name that `ip netns` lists".into(),
        ),
        false => Ok(text.to_owned()),
    }
}

/// A list of states.
pub(super) fn states() -> ListParser<TcpState> {
    list(state).of(TcpState::names())
}

fn state(text: &str) -> Result<TcpState, String> {
    text.parse().map_err(|()| {
        format!(
            "{} is not a TCP state; must be one or more of {}",
            shown(text),
            TcpState::names().collect::<Vec<_>>().join(", ")
        )
    })
}

/// A list of states of conntrack.
pub(super) fn conntrack_states() -> ListParser<ConntrackState> {
    list(conntrack_state).of(ConntrackState::names())
}

fn conntrack_state(text: &str) -> Result<ConntrackState, String> {
    text.to_ascii_lowercase()
        .replace('_', "-")
        .parse()
        .map_err(|_| {
            format!(
                "{} is not a state of conntrack; must be one or more of {}",
                shown(text),
                ConntrackState::names().collect::<Vec<_>>().join(", ")
            )
        })
}

/// A mark, with a mask or without.
pub(super) fn mark(text: &str) -> Result<Mark, String> {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(hexadecimal) => u32::from_str_radix(hexadecimal, 16).ok(),
        None => text.parse().ok(),
    };
    let (value, mask) = match text.split_once('/') {
        Some((value, mask)) => (number(value), number(mask)),
        None => (number(text), Some(u32::MAX)),
    };
    match (value, mask) {
        (Some(value), Some(mask)) => Ok(Mark { value, mask }),
        _ => Err(format!(
            "{} is not a mark; for example 7 or 0x10 or 0x10/0xf0",
            shown(text)
        )),
    }
}

/// The addresses of the two ends of a connection.
pub(super) fn connection(text: &str) -> Result<[SocketAddr; 2], String> {
    let (one, other) = text.split_once(',').unwrap_or((text, ""));
    match (one.parse(), other.parse()) {
        (Ok(one), Ok(other)) if SocketAddr::is_ipv4(&one) == SocketAddr::is_ipv4(&other) => {
            Ok([one, other])
        }
        _ => Err(format!(
            "{} is not a connection, two addresses of one family with their ports; for example 10.9.1.2:40000,10.9.2.2:443 or \
             [fd00::1]:40000,[fd00::2]:443",
            shown(text)
        )),
    }
}

/// A number of packets a second.
pub(super) fn rate(text: &str) -> Result<u32, String> {
    let rate = text.parse().ok().filter(|rate| *rate > 0);
    rate.ok_or_else(|| {
        format!(
            "{} is not a number of packets a second; for example 1000",
            shown(text)
        )
    })
}

/// The number of a zone.
pub(super) fn zone(text: &str) -> Result<u16, String> {
    text.parse().map_err(|_| {
        format!(
            "{} is not a zone of conntrack, a number from 0 to 65535; for example 7",
            shown(text)
        )
    })
}

/// A list of causes.
pub(super) fn causes() -> ListParser<Cause> {
    list(cause).of(Cause::SELECTABLE.map(Cause::name))
}

fn cause(text: &str) -> Result<Cause, String> {
    text.parse()
        .ok()
        .filter(|cause| Cause::SELECTABLE.contains(cause))
        .ok_or_else(|| {
            let names = Cause::SELECTABLE.map(Cause::name).join(", ");
            format!(
                "{} is not a cause; must be one or more of {names}",
                shown(text)
            )
        })
}

pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| match text.parse::<u64>() {
        Ok(_) => format!("`{text}` has no unit; for example {text}s, 15m or 2h"),
        Err(_) => format!(
            "{} is not a duration; for example 500ms, 90s, 15m or 2h",
            shown(text)
        ),
    })
}

/// A duration that must not be zero.
pub(super) fn positive_duration(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("must be greater than zero, for example 100ms, 10s or 1m".into()),
        duration => Ok(duration),
    }
}

/// The time between two sweeps of the daemon, as its configuration allows it. Tests sweep more often, and less than this floor would be
/// taken for a typing error.
pub(super) fn sweep_interval(text: &str) -> Result<Duration, String> {
    let range = Duration::from_millis(10)..=Duration::from_secs(86_400);
    match duration(text)? {
        interval if range.contains(&interval) => Ok(interval),
        _ => Err("must be between a second and a day, for example 30s or 5m".into()),
    }
}

/// A threshold of a monitoring plugin.
pub(super) fn threshold(text: &str) -> Result<Threshold, String> {
    text.parse()
}

/// A time limit. Monitoring systems give a number of seconds.
pub(super) fn timeout(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<u32>().map(u64::from);
    let limit = seconds.map_or_else(
        |_| duration(text),
        |seconds| Ok(Duration::from_secs(seconds)),
    );
    match limit {
        Ok(limit) if !limit.is_zero() => Ok(limit),
        _ => Err(format!(
            "`{text}` is not a time limit; for example 10 (seconds) or 500ms"
        )),
    }
}

/// A list of methods.
pub(super) fn methods() -> ListParser<MethodChoice> {
    let names = Method::ALL.map(Method::name);
    list(method).of(std::iter::once("auto").chain(names))
}

fn method(text: &str) -> Result<MethodChoice, String> {
    match text {
        "auto" => Ok(MethodChoice::Auto),
        _ => text.parse().map(MethodChoice::Only).map_err(|_| {
            format!(
                "{} is not a method; must be auto, or one or more of {}",
                shown(text),
                Method::ALL.map(Method::name).join(", ")
            )
        }),
    }
}

pub(super) fn limit(text: &str) -> Result<Limit, String> {
    match text.parse() {
        Ok(rows) if rows > 0 => Ok(Limit::Rows(rows)),
        _ if text == "all" => Ok(Limit::All),
        _ => Err("must be a number of at least 1, for example 20, or all".into()),
    }
}

pub(super) fn kills(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count) if count > 0 => Ok(count),
        _ => Err(
            "must be a number of at least 1, for example 100; to do nothing use --dry-run".into(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_ranges() {
        assert_eq!(port_range("8080"), Ok(8080..=8080));
        assert_eq!(port_range(":8080"), Ok(8080..=8080));
        assert_eq!(port_range("1-65535"), Ok(1..=65535));
        for bad in ["", "0", "65536", "80x", "-", "5-", "-5", "9-1", "1-2-3"] {
            assert!(port_range(bad).is_err(), "{bad}");
        }
        assert!(port_range("9100-9000").unwrap_err().contains("9000-9100"));
    }

    #[test]
    fn lists_are_split_at_commas() {
        for (text, expected) in [
            ("a", &["a"][..]),
            ("a,b", &["a", "b"]),
            ("a,b,", &["a", "b"]),
            ("{a,b},c", &["{a,b}", "c"]),
            ("a}b,c", &["a}b", "c"]),
            ("", &[""]),
            (",", &[""]),
            ("a,,b", &["a", "", "b"]),
        ] {
            assert_eq!(parts(text), expected, "{text}");
        }
    }

    #[test]
    fn networks_are_canonical() {
        let text = |t: &str| network(t).map(|n| n.to_string());
        assert_eq!(text("10.0.0.1"), Ok("10.0.0.1/32".into()));
        assert_eq!(text("::ffff:10.0.0.1"), Ok("10.0.0.1/32".into()));
        assert_eq!(text("::ffff:10.0.0.0/104"), Ok("10.0.0.0/8".into()));
        assert_eq!(text("::ffff:0.0.0.0/80"), Ok("::ffff:0.0.0.0/80".into()));
        assert_eq!(text("2001:db8::/32"), Ok("2001:db8::/32".into()));
        for pasted in ["10.0.0.1:80", "[2001:db8::1]:80"] {
            let error = network(pasted).unwrap_err();
            assert!(error.contains("--port 80"), "{error}");
        }
        for bad in ["", "10.0.0", "10.0.0.1/33", "fe80::/129", "host"] {
            assert!(network(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn marks_have_masks() {
        let mark = |text| super::mark(text).map(|mark| (mark.value, mark.mask));
        assert_eq!(mark("7"), Ok((7, u32::MAX)));
        assert_eq!(mark("0x10/0xF0"), Ok((16, 240)));
        assert_eq!(mark("16/240"), Ok((16, 240)));
        for bad in ["", "0x", "-1", "7/", "/7", "7/8/9", "4294967296", "a"] {
            assert!(mark(bad).unwrap_err().contains("0x10/0xf0"), "{bad}");
        }
        for bad in ["", "-1", "65536", "x"] {
            assert!(zone(bad).unwrap_err().contains("for example 7"), "{bad}");
        }
        for bad in [
            "",
            "10.0.0.1:5",
            "10.0.0.1:5,10.0.0.2",
            "10.0.0.1:5,[::1]:6",
        ] {
            assert!(
                connection(bad).unwrap_err().contains("10.9.2.2:443"),
                "{bad}"
            );
        }
        assert!(connection("[::1]:5,[::2]:6").is_ok() && rate("0").is_err());
        assert_eq!(conntrack_state("CLOSE_WAIT"), Ok(ConntrackState::CloseWait));
        assert!(conntrack_state("shut").unwrap_err().contains("close-wait"));
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
