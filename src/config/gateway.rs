//! The configuration of `cwkill gateway`.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use clap::ColorChoice;
use ipnet::IpNet;

use super::{Action, Format, LogOptions, invalid, usage};
use crate::cli::{ForwardedActing, ForwardedSelection, GatewayArgs, Output, flat};
use crate::conntrack::ConntrackState;
use crate::filter::forwarded::ForwardedSelectors;
use crate::filter::selectors::{IpVersion, Selectors};
use crate::filter::{self, Expression, Services};
use crate::model::ForwardedAct;

/// The default of `--rate`.
const DEFAULT_RATE: u32 = 20_000;

#[derive(Clone, Debug)]
pub struct GatewayConfig {
    pub selectors: ForwardedSelectors,
    pub action: Action,
    /// What to do to the connections; `None` in a listing.
    pub act: Option<ForwardedAct>,
    pub max_kills: Option<usize>,
    pub watch: Option<Watch>,
    /// Packets a second.
    pub rate: u32,
    pub log: LogOptions,
    pub format: Format,
    pub no_header: bool,
    /// Also show what few need of an entry.
    pub verbose: bool,
    pub color: ColorChoice,
    /// Notes for the operator, one per line.
    pub notes: Vec<String>,
}

/// Whether to go on with the connections that come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watch {
    /// For how long; `None`: until Ctrl-C.
    pub duration: Option<Duration>,
}

impl GatewayConfig {
    /// Validates the combination of the arguments.
    ///
    /// # Errors
    /// It is not valid. The message names the arguments and gives a valid example.
    pub fn from_args(args: GatewayArgs) -> Result<Self, clap::Error> {
        let GatewayArgs {
            selection,
            acting,
            output,
        } = args;
        let mut notes = Vec::new();
        let all = selection.all;
        let selectors = selectors(selection, &mut notes)?;
        let act = match (acting.probe, acting.cut) {
            (true, _) => Some(ForwardedAct::Probe),
            (false, true) => Some(ForwardedAct::Cut),
            (false, false) => None,
        };
        let action = match (act, acting.dry_run) {
            (_, true) => Action::DryRun,
            (Some(_), false) => Action::Act,
            (None, false) => Action::List,
        };
        check_watch(&selectors, act, &acting, &output)?;
        check(&selectors, all, act, action, &acting)?;
        Ok(GatewayConfig {
            action,
            act,
            max_kills: acting.max_kills,
            watch: acting.watch.then_some(Watch {
                duration: acting.watch_for,
            }),
            rate: acting.rate.unwrap_or(DEFAULT_RATE),
            log: LogOptions::from_args(acting.logging, output.verbose),
            selectors,
            format: output.format(),
            no_header: output.no_header,
            verbose: output.verbose,
            color: output.color,
            notes,
        })
    }
}

/// Checks that the options make sense with `--watch`.
fn check_watch(
    selectors: &ForwardedSelectors,
    act: Option<ForwardedAct>,
    acting: &ForwardedActing,
    output: &Output,
) -> Result<(), clap::Error> {
    let message = match acting.watch {
        false if acting.watch_for.is_some() => {
            "--for says how long to watch: add --watch, for example --host 192.0.2.1 --cut --active --watch --for 10m"
        }
        false => return Ok(()),
        true if act == Some(ForwardedAct::Probe) => {
            "--watch goes on with new connections, and nobody has forgotten a new one: give --cut instead of --probe, or \
             start --probe from a timer"
        }
        true if output.json => {
            "--json is one document, which a watch would never end: give --jsonl for one object per connection, as it comes"
        }
        true if !selectors.original.min_age.is_zero() => {
            "--watch goes on with new connections, and a new one has no age: give --active instead of --min-age, or start it \
             from a timer without --watch"
        }
        true => return Ok(()),
    };
    Err(usage(message))
}

/// Checks that the options of an act make sense together.
fn check(
    selectors: &ForwardedSelectors,
    all: bool,
    act: Option<ForwardedAct>,
    action: Action,
    acting: &ForwardedActing,
) -> Result<(), clap::Error> {
    let names_one = !selectors.connections.is_empty();
    // One that such a selector leaves out would count as one without an entry, and be cut unchecked.
    let is_narrowed = !selectors.states.is_empty()
        || !selectors.zones.is_empty()
        || selectors.original.ip_version.is_some();
    if names_one && (all || is_narrowed || selects_otherwise(selectors)) {
        return Err(usage(
            "--connection names one connection, and takes no other selector but --min-age; for example --connection 10.9.1.2:40000,10.9.2.2:443",
        ));
    }
    let Some(act) = act else {
        let given = [
            ("--active", acting.active),
            ("--max-kills", acting.max_kills.is_some()),
            ("--rate", acting.rate.is_some()),
        ];
        let given = given
            .into_iter()
            .find_map(|(option, given)| given.then_some(option));
        return match given.or_else(|| acting.logging.given()) {
            Some(option) => Err(usage(&format!(
                "{option} says how to act: add --cut or --probe, for example --host 192.0.2.1 --probe"
            ))),
            None => Ok(()),
        };
    };
    if !(all || names_one || selects_otherwise(selectors)) && action == Action::Act {
        return Err(usage(&format!(
            "--{} needs a selector: add one for the connections to end, for example --host 192.0.2.1, or --all for every \
             forwarded connection",
            act.name()
        )));
    }
    let may_be_in_use =
        selectors.states.is_empty() || selectors.states.contains(&ConntrackState::Established);
    let is_careful = acting.active || !selectors.original.min_age.is_zero();
    if act == ForwardedAct::Cut && action == Action::Act && may_be_in_use && !is_careful {
        if acting.watch {
            return Err(usage(
                "a watch ends connections as soon as they are open, and an ESTABLISHED one may be in use: say that with --active, \
                 or give other states, for example --conntrack-state close-wait",
            ));
        }
        return Err(usage(
            "an ESTABLISHED connection may be in use: say how long no packet must have passed, for example --min-age 1h, or \
             --active for any, or give other states, for example --conntrack-state close-wait",
        ));
    }
    Ok(())
}

/// Whether a selector besides `--connection` says which connections. States, zones, families and ages only narrow.
fn selects_otherwise(selectors: &ForwardedSelectors) -> bool {
    let original = &selectors.original;
    !(original.local.is_empty()
        && original.peer.is_empty()
        && original.ports.is_empty()
        && original.peer_ports.is_empty()
        && selectors.hosts.is_empty()
        && selectors.nat_sources.is_empty()
        && selectors.nat_destinations.is_empty()
        && selectors.marks.is_empty()
        && original.expression == Expression::TRUE)
}

fn selectors(
    selection: ForwardedSelection,
    notes: &mut Vec<String>,
) -> Result<ForwardedSelectors, clap::Error> {
    let ForwardedSelection {
        src,
        dst,
        sport,
        dport,
        host,
        nat_src,
        nat_dst,
        mark,
        zone,
        conntrack_state,
        min_age,
        ipv4,
        ipv6,
        connection,
        all: _,
        expression: words,
    } = selection;
    Ok(ForwardedSelectors {
        original: Selectors {
            local: flat(src),
            peer: flat(dst),
            ports: flat(sport),
            peer_ports: flat(dport),
            ip_version: match (ipv4, ipv6) {
                (true, _) => Some(IpVersion::V4),
                (_, true) => Some(IpVersion::V6),
                _ => None,
            },
            min_age: min_age.unwrap_or_default(),
            expression: expression(&words, notes)?,
            ..Selectors::default()
        },
        hosts: flat(host),
        nat_sources: flat(nat_src),
        nat_destinations: flat(nat_dst),
        marks: flat(mark),
        zones: flat(zone).into_iter().collect(),
        states: flat(conntrack_state).into_iter().collect(),
        connections: connection,
    })
}

/// The expression, which must be about addresses and ports only.
fn expression(words: &[String], notes: &mut Vec<String>) -> Result<Expression, clap::Error> {
    if words.is_empty() {
        return Ok(Expression::TRUE);
    }
    let text = words.join(" ");
    if let Some(advice) = advice_for_word(&text) {
        return Err(invalid(&format!(
            "`{text}` alone can mean many things: {advice}"
        )));
    }
    let parsed = filter::parse(&text, &Services::of_this_host())
        .map_err(|error| invalid(&format!("the expression is wrong at {error}")))?;
    if let Some(word) = parsed.expression.word_about_a_socket() {
        let instead = match word {
            "state" => {
                "for a state of conntrack use --conntrack-state, for example --conntrack-state close-wait"
            }
            _ => "a forwarded connection has none; for example 'src 10.0.0.0/8 and dport = :443'",
        };
        return Err(invalid(&format!(
            "`{word}` is about a socket of this host: {instead}"
        )));
    }
    notes.extend(parsed.warning);
    Ok(parsed.expression)
}

/// What to write instead of an address or a port without a keyword.
fn advice_for_word(text: &str) -> Option<String> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        let (ip, port) = (address.ip(), address.port());
        return Some(format!(
            "for a server --dst {ip} --dport {port}, for a client --src {ip} --sport {port}"
        ));
    }
    if text.parse::<IpAddr>().is_ok() || text.parse::<IpNet>().is_ok() {
        return Some(format!(
            "for either end use --host {text}, for one of them --src {text} or --dst {text}"
        ));
    }
    let port = text.strip_prefix(':').unwrap_or(text).parse::<u16>().ok()?;
    Some(format!(
        "for the port of a server use --dport {port}, for that of a client --sport {port}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use crate::filter::forwarded::Mark;
    use clap::Parser;

    fn config(words: &[&str]) -> Result<GatewayConfig, clap::Error> {
        let words = ["cwkill", "gateway"].iter().chain(words);
        match Cli::try_parse_from(words)?.command {
            Some(Command::Gateway(args)) => GatewayConfig::from_args(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn selectors_are_about_the_original_direction() {
        let line = "--src 10.0.0.0/8 --dst 192.0.2.1,192.0.2.2 --sport 1024-65535 --dport 80,443 -4 --min-age 1h";
        let words: Vec<&str> = line.split(' ').collect();
        let selected = config(&words).unwrap().selectors.original;
        assert_eq!(selected.local, ["10.0.0.0/8".parse().unwrap()]);
        assert_eq!(selected.peer.len(), 2);
        assert_eq!(selected.ports, [1024..=65535]);
        assert_eq!(selected.peer_ports, [80..=80, 443..=443]);
        assert_eq!(selected.ip_version, Some(IpVersion::V4));
        assert_eq!(selected.min_age, Duration::from_secs(3600));
        // As the same selectors are named elsewhere.
        let line = "--local 10.0.0.0/8 --peer 192.0.2.1 --port 5 --peer-port 80";
        let words: Vec<&str> = line.split(' ').collect();
        let selected = config(&words).unwrap().selectors.original;
        assert_eq!(selected.ports, [5..=5]);
        assert_eq!((selected.local.len(), selected.peer.len()), (1, 1));
        assert_eq!(selected.peer_ports, [80..=80]);
    }

    #[test]
    fn what_only_conntrack_knows_can_be_selected() {
        let line = "--host fd00::/8 --nat-src 192.0.2.1 --nat-dst 10.9.2.2 --mark 0x10/0xf0,7 --zone 3,4 --conntrack-state close-wait,established";
        let words: Vec<&str> = line.split(' ').collect();
        let selected = config(&words).unwrap().selectors;
        assert_eq!(selected.hosts, ["fd00::/8".parse().unwrap()]);
        assert_eq!(
            (selected.nat_sources.len(), selected.nat_destinations.len()),
            (1, 1)
        );
        let mark = |value, mask| Mark { value, mask };
        assert_eq!(selected.marks, [mark(0x10, 0xf0), mark(7, u32::MAX)]);
        assert_eq!(selected.zones, [3, 4].into());
        use ConntrackState::{CloseWait, Established};
        assert_eq!(selected.states, [Established, CloseWait].into());
    }

    #[test]
    fn only_probe_and_cut_act_and_only_on_what_is_selected() {
        let of = |line: &str| config(&line.split_whitespace().collect::<Vec<_>>());
        for line in [
            "",
            "--host 192.0.2.1",
            "--all",
            "--min-age 1h",
            "--connection 10.0.0.1:1,10.0.0.2:2",
        ] {
            assert_eq!(of(line).unwrap().action, Action::List, "{line}");
        }
        for line in [
            "--host 192.0.2.1 --probe",
            "--all --probe --max-kills 5",
            "--all --cut --active",
            "--dport 443 --cut --min-age 1h",
            "--src 10.0.0.0/8 --cut --conntrack-state close-wait,fin-wait",
            "--mark 1 --cut --active --rate 100",
            "--connection 10.0.0.1:1,10.0.0.2:2 --cut --active",
        ] {
            assert_eq!(of(line).unwrap().action, Action::Act, "{line}");
            let dry = format!("{line} -n");
            assert_eq!(of(&dry).unwrap().action, Action::DryRun, "{dry}");
        }
        assert_eq!(of("--cut -n").unwrap().action, Action::DryRun);
        for (line, good) in [
            ("--cut --active", "--host 192.0.2.1"),
            ("--probe", "--all"),
            (
                "--probe --min-age 1h -4 --zone 7 --conntrack-state established",
                "--host 192.0.2.1",
            ),
            ("--host 192.0.2.1 --cut", "--active"),
            (
                "--host 192.0.2.1 --cut --conntrack-state established,close-wait",
                "--min-age 1h",
            ),
            ("--connection 10.0.0.1:1,10.0.0.2:2 --cut", "--active"),
            (
                "--connection 10.0.0.1:1,10.0.0.2:2 --all --probe",
                "--connection 10.9.1.2:40000",
            ),
            (
                "--connection 10.0.0.1:1,10.0.0.2:2 --cut --conntrack-state close-wait",
                "--connection 10.9.1.2:40000",
            ),
            (
                "--connection 10.0.0.1:1,10.0.0.2:2 --cut --active --zone 7",
                "--connection 10.9.1.2:40000",
            ),
            (
                "--connection 10.0.0.1:1,10.0.0.2:2 -6",
                "--connection 10.9.1.2:40000",
            ),
            ("--host 192.0.2.1 --max-kills 5", "--cut"),
            ("--active", "--cut or --probe"),
            ("--log-file /tmp/x", "--probe"),
            ("--all --probe --cut", "--cut"),
        ] {
            let error = of(line).unwrap_err().to_string();
            assert!(error.contains(good), "{line}: {error}");
        }
    }

    #[test]
    fn a_watch_goes_on_with_new_connections() {
        let of = |line: &str| config(&line.split_whitespace().collect::<Vec<_>>());
        let minute = Some(Duration::from_secs(60));
        for (line, duration) in [
            ("--host 192.0.2.1 --cut --active --watch", None),
            ("--all --cut --active --watch --for 1m --jsonl", minute),
            ("--all --cut --watch --conntrack-state close-wait", None),
            ("--cut --watch -n", None),
            ("--watch", None),
        ] {
            assert_eq!(of(line).unwrap().watch, Some(Watch { duration }), "{line}");
        }
        assert_eq!(of("--all --cut --active").unwrap().watch, None);
        for (line, good) in [
            ("--host 192.0.2.1 --cut --watch", "--active"),
            ("--cut --active --watch", "--host 192.0.2.1"),
            ("--host 192.0.2.1 --cut --active --for 10m", "--watch"),
            ("--host 192.0.2.1 --probe --watch", "--cut"),
            ("--host 192.0.2.1 --cut --active --watch --json", "--jsonl"),
            ("--host 192.0.2.1 --cut --min-age 1h --watch", "--active"),
            ("--watch --max-kills 5", "--cut"),
        ] {
            let error = of(line).unwrap_err().to_string();
            assert!(error.contains(good), "{line}: {error}");
        }
    }

    #[test]
    fn an_expression_is_about_addresses_and_ports() {
        assert!(config(&["src 10/8 and dport = :443"]).is_ok());
        for (words, good) in [
            ("state established", "--conntrack-state"),
            ("dport = :80 or dev eth0", "dport = :443"),
            ("autobound", "dport = :443"),
            ("443", "--dport 443"),
            (":443", "--dport 443"),
            ("10.9.1.2", "--host 10.9.1.2"),
            ("10.9.1.0/24", "--host 10.9.1.0/24"),
            ("10.9.1.2:443", "--dst 10.9.1.2 --dport 443"),
            ("dport = :80x", "8080"),
        ] {
            let error = config(&[words]).unwrap_err().to_string();
            assert!(error.contains(good), "{words}: {error}");
        }
    }
}
