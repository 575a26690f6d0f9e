//! The configuration of each command: validated arguments, with defaults.

mod check;
mod gateway;
mod reclaim;
mod scope;

use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{ColorChoice, CommandFactory, Parser};

use crate::cli::{Acting, Args, Cli, Logging, MethodChoice, Output, flat};
use crate::filter::Scope;
use crate::filter::selectors::{IN_USE_WITHIN, Selectors};
use crate::injector::engine;
use crate::injector::plan::Policy;
use crate::model::Method;
use crate::privileges::Privileges;
use crate::proc::OWNER_OPTIONS;
use crate::proc::netns::NetnsScope;
use crate::reclaim::ReclaimRules;
use crate::tcp::TcpState;
use reclaim::reclaim_rules;

pub use crate::cli::{Limit, LogTarget};
pub use gateway::{GatewayConfig, Watch};
pub use reclaim::{DEFAULT_RECLAIM_AGE, DEFAULT_RECLAIM_RULES, ReclaimConfig};

/// The options of the audit log.
#[derive(Clone, Debug, Default)]
pub struct LogOptions {
    /// The log that the operator chose. `None`: the journal if systemd runs cwkill, otherwise standard error if `verbose`.
    pub target: Option<LogTarget>,
    /// A file to append to.
    pub file: Option<PathBuf>,
    /// Whether the operator asked for details (`-v`).
    pub verbose: bool,
}

impl LogOptions {
    fn from_args(args: Logging, verbose: bool) -> Self {
        LogOptions {
            target: args.log,
            file: args.log_file,
            verbose,
        }
    }
}

/// Whether a run acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// List the stuck sockets.
    List,
    /// Show the plan of each socket.
    DryRun,
    Act,
}

/// The format of the results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Table,
    /// One JSON document.
    Json,
    /// One JSON object per line.
    JsonLines,
    /// No output.
    Quiet,
}

/// The configuration of `cwkill` without a command.
#[derive(Clone, Debug)]
pub struct Config {
    pub selectors: Selectors,
    pub netns: NetnsScope,
    pub action: Action,
    /// Whether a selector says which sockets to act on.
    pub selects: bool,
    /// Whether an option narrows the selection. Such an option alone does not make cwkill act.
    pub narrows: bool,
    /// Whether to ask on a terminal before closing sockets of several processes.
    pub asks: bool,
    /// Whether to find the owners of the sockets.
    pub owners: bool,
    pub policy: Policy,
    /// The time that a socket gets to close before the next method.
    pub grace: Duration,
    /// Whether to go on with the sockets that come.
    pub watch: Option<Watch>,
    /// The time for which to watch for new stuck sockets after the act.
    pub watch_refill: Option<Duration>,
    pub log: LogOptions,
    /// If present, drain the backlogs; their owners are stopped for at most this time.
    pub drain_backlogs: Option<Duration>,
    /// If present, close the descriptors of closed sockets in their owners.
    pub reclaim: Option<ReclaimRules>,
    pub format: Format,
    pub no_header: bool,
    /// The rows to print. `None`: one screen on a terminal, else all.
    pub limit: Option<Limit>,
    /// A listing marks the sockets in which data has moved within this time.
    pub mark_in_use: Duration,
    /// Show every owner and every attempt.
    pub verbose: bool,
    pub color: ColorChoice,
    /// Notes for the operator, printed before cwkill acts, one per line.
    pub notes: Vec<String>,
}

const DEFAULT_GRACE: Duration = Duration::from_secs(1);

impl Config {
    /// The rules for the engine.
    pub fn rules(&self, privileges: &Privileges) -> engine::Rules<'_> {
        engine::Rules {
            grace: self.grace,
            discard_unsent: self.policy.discard_unsent,
            selectors: &self.selectors,
            kernel_version: privileges.kernel_version,
            destroyer: None,
        }
    }

    /// That of `cwkill` without arguments, in the namespaces of `netns`.
    pub fn of_listing(netns: NetnsScope) -> Self {
        let cli = Cli::try_parse_from(["cwkill"]).expect("arguments are not needed");
        let config = Config::from_args(cli.args).expect("arguments are not needed");
        Config { netns, ..config }
    }

    /// The configuration of an act by a policy of the daemon: nothing is printed, and nobody is asked.
    pub fn of_policy(
        selectors: Selectors,
        netns: NetnsScope,
        methods: Vec<Method>,
        reclaims: bool,
    ) -> Self {
        let listing = Config::of_listing(netns);
        Config {
            mark_in_use: selectors.min_idle,
            selectors,
            action: Action::Act,
            selects: true,
            policy: Policy {
                methods,
                has_min_time: true,
                ..listing.policy
            },
            reclaim: reclaims.then_some(DEFAULT_RECLAIM_RULES),
            format: Format::Quiet,
            ..listing
        }
    }

    /// Validates the combination of the arguments.
    ///
    /// # Errors
    /// It is not valid. The message names the arguments and gives a valid example.
    pub fn from_args(args: Args) -> Result<Self, clap::Error> {
        let Args {
            selection,
            acting,
            output,
            limit,
        } = args;
        let names_targets = selection.names_targets();
        let names_some = selection.names_some();
        let narrowing = selection.narrowing_option();
        let asks = !selection.owners.all && !acting.yes;
        check_watch(&acting, &output, limit)?;
        let min_idle = selection.min_idle;
        let Scope {
            mut selectors,
            netns,
            notes,
        } = Scope::from_args(selection)?;
        let has_min_time = !(selectors.min_age.is_zero() && selectors.min_idle.is_zero());
        let expression_selects = selectors.expression.says_more_than_states();
        let selects = names_targets || expression_selects;
        if !selects
            && !acting.dry_run
            && let Some(option) = acting.acting_option()
        {
            // With it, --all means less than every stuck socket.
            let (but, left) = narrowing.map_or_else(Default::default, |narrowing| {
                (
                    format!(", and {narrowing} alone is not enough"),
                    format!(" that {narrowing} leaves"),
                )
            });
            return Err(usage(&format!(
                "{option} needs a selector{but}: add one for the sockets to close, for example --port 8080, \
                 or --all for every stuck socket{left}"
            )));
        }
        let action = match (selects, acting.dry_run) {
            (_, true) => Action::DryRun,
            (true, false) => Action::Act,
            (false, false) => Action::List,
        };
        let takes_open = selectors.states.contains(TcpState::Established);
        // Who watches for open connections wants the new ones, which are in use.
        let takes_new = acting.watch && takes_open;
        if action == Action::Act && takes_open && !has_min_time {
            let option = match (acting.active, acting.watch) {
                (true, _) => "--active",
                (false, true) => "--watch",
                (false, false) => {
                    return Err(usage(
                        "an ESTABLISHED connection may be in use: say how long it must have been idle, for example --min-idle 1h, \
                         or --active for any",
                    ));
                }
            };
            if !(names_some || expression_selects) {
                return Err(usage(&format!(
                    "{option} would end every open connection of this host, also that by which its operator is connected: name an \
                     address, a port or a process, for example --peer 192.0.2.7"
                )));
            }
        }
        if action != Action::List {
            let unless_given = match takes_new || acting.active {
                true => Duration::ZERO,
                false => IN_USE_WITHIN,
            };
            selectors.min_idle = min_idle.unwrap_or(unless_given);
        }
        let methods = methods(&flat(acting.method))?;
        if acting.no_owners {
            if selectors.selects_owners() {
                return Err(usage(&format!(
                    "--no-owners cannot be combined with a selector of owners ({OWNER_OPTIONS}); select sockets by --port or an \
                     expression"
                )));
            }
            if acting.reclaim {
                return Err(usage(
                    "--reclaim closes descriptors in the owners: omit --no-owners",
                ));
            }
            if methods.iter().all(|method| method.needs_descriptor()) {
                return Err(usage(
                    "--method shutdown works through the descriptor of an owner: omit --no-owners, or give --method destroy",
                ));
            }
        }
        let rules = reclaim_rules(&acting.reclaiming);
        let needs_reclaim = acting.reclaiming.given(acting.drain_backlog);
        Ok(Config {
            netns,
            action,
            selects,
            narrows: narrowing.is_some(),
            asks,
            owners: !acting.no_owners,
            policy: Policy {
                methods,
                discard_unsent: acting.discard_unsent,
                max_kills: acting.max_kills,
                has_min_time: has_min_time || acting.active || takes_new,
                allow_spin: acting.allow_spin,
                frees_epoll_members: acting.reclaim && acting.reclaiming.reclaim_force,
            },
            grace: acting.grace.unwrap_or(DEFAULT_GRACE),
            watch: acting.watch.then_some(Watch {
                duration: acting.watch_for,
            }),
            watch_refill: acting.watch_refill,
            log: LogOptions::from_args(acting.logging, output.verbose),
            drain_backlogs: acting.drain_backlog.then_some(rules.stop_limit),
            reclaim: match (acting.reclaim, needs_reclaim) {
                (true, _) => Some(rules),
                (false, None) => None,
                (false, Some(option)) => {
                    return Err(usage(&format!(
                        "{option} says how to reclaim: give --reclaim as well, or use `cwkill reclaim`"
                    )));
                }
            },
            format: output.format(),
            no_header: output.no_header,
            limit,
            mark_in_use: min_idle.unwrap_or(IN_USE_WITHIN),
            verbose: output.verbose,
            color: output.color,
            selectors,
            notes,
        })
    }
}

/// Checks that the options make sense with `--watch`.
fn check_watch(acting: &Acting, output: &Output, limit: Option<Limit>) -> Result<(), clap::Error> {
    let message = match acting.watch {
        false if acting.watch_for.is_some() => {
            "--for says how long to watch: add --watch, for example --port 8080 --watch --for 10m"
        }
        false => return Ok(()),
        true if output.json => {
            "--json is one document, which a watch would never end: give --jsonl for one object per socket, as it comes"
        }
        true if acting.watch_refill.is_some() => {
            "--watch-refill counts the sockets that come after one act, and --watch closes them: give one of them"
        }
        true if acting.drain_backlog => "--drain-backlog is done once: run it without --watch",
        true if limit.is_some() => {
            "--limit is about one table, and --watch prints a row for each socket as it comes: omit --limit"
        }
        true => return Ok(()),
    };
    Err(usage(message))
}

impl Acting {
    /// The first given option that makes sense only if cwkill acts.
    fn acting_option(&self) -> Option<&'static str> {
        [
            ("--method", !self.method.is_empty()),
            ("--grace", self.grace.is_some()),
            ("--active", self.active),
            ("--discard-unsent", self.discard_unsent),
            ("--allow-spin", self.allow_spin),
            ("--max-kills", self.max_kills.is_some()),
            ("--watch", self.watch),
            ("--watch-refill", self.watch_refill.is_some()),
            ("--reclaim", self.reclaim),
            ("--yes", self.yes),
            ("--drain-backlog", self.drain_backlog),
        ]
        .into_iter()
        .find_map(|(option, given)| given.then_some(option))
        .or_else(|| self.logging.given())
    }
}

impl Output {
    pub(crate) fn format(&self) -> Format {
        match (self.json, self.jsonl, self.quiet) {
            (true, _, _) => Format::Json,
            (_, true, _) => Format::JsonLines,
            (_, _, true) => Format::Quiet,
            _ => Format::Table,
        }
    }
}

/// The methods of `--method` in order, without duplicates.
pub(crate) fn methods(choices: &[MethodChoice]) -> Result<Vec<Method>, clap::Error> {
    let mut methods = Vec::new();
    for choice in choices {
        match choice {
            MethodChoice::Auto if choices.len() == 1 => return Ok(Method::AUTO.to_vec()),
            MethodChoice::Auto => {
                return Err(usage(
                    "--method auto cannot be combined with others; give --method auto or --method shutdown,destroy,rst",
                ));
            }
            MethodChoice::Only(method) if !methods.contains(method) => methods.push(*method),
            MethodChoice::Only(_) => {}
        }
    }
    match methods.is_empty() {
        true => Ok(Method::AUTO.to_vec()),
        false => Ok(methods),
    }
}

/// An error in the value of an argument.
pub(crate) fn invalid(message: &str) -> clap::Error {
    Cli::command().error(ErrorKind::ValueValidation, message)
}

/// An error in the combination of arguments.
pub(crate) fn usage(message: &str) -> clap::Error {
    Cli::command().error(ErrorKind::ArgumentConflict, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(line: &str) -> Result<Config, clap::Error> {
        let words = std::iter::once("cwkill").chain(line.split_whitespace());
        Config::from_args(Cli::try_parse_from(words)?.args)
    }

    /// The options that say which sockets to close.
    const SELECTORS: [&str; 13] = [
        "--all",
        "--port 1",
        "--peer-port 1",
        "--local 127.0.0.1",
        "--peer ::1",
        "--pid 1",
        "--process x",
        "--unit nginx",
        "--container web",
        "--pod shop/web-*",
        "--namespace shop",
        "--compose-service web",
        "--cgroup /system.slice",
    ];

    /// A valid value of an option that takes one.
    fn value_of(option: &str) -> &'static str {
        match option {
            "user" => "0",
            "state" => "last-ack",
            "cause" => "unread",
            "method" => "auto",
            "netns" => "1",
            "host-root" | "log-file" => "/",
            "log" => "none",
            "max-kills" | "limit" => "3",
            "bpf" | "color" => "never",
            "min-age" | "min-idle" | "grace" | "watch-refill" | "for" | "reclaim-age"
            | "stop-limit" => "1m",
            other => panic!("give a valid value of --{other} here"),
        }
    }

    /// The command line has more options with time. A new one is a selector only if it stands in the list above.
    #[test]
    fn no_other_option_makes_it_act() {
        let command = Cli::command();
        let long = |argument: &clap::Arg| argument.get_long().map(str::to_owned);
        let is_selector = |name: &str| {
            let of = |line: &&str| line.split(' ').next() == Some(&format!("--{name}"));
            SELECTORS.iter().any(of)
        };
        let others: Vec<String> = command
            .get_arguments()
            .filter(|argument| !["help", "version"].contains(&argument.get_id().as_str()))
            .filter_map(|argument| {
                let name = long(argument).filter(|name| !is_selector(name))?;
                Some(match argument.get_action().takes_values() {
                    true => format!("--{name} {}", value_of(&name)),
                    false => format!("--{name}"),
                })
            })
            .collect();
        assert!(others.len() > 30, "{others:?}");
        for first in &others {
            for second in others.iter().chain([&String::new()]) {
                // Some need a selector, and some exclude each other.
                if let Ok(config) = config(&format!("{first} {second}")) {
                    assert_ne!(config.action, Action::Act, "{first} {second}");
                }
            }
        }
    }

    #[test]
    fn a_watch_takes_open_connections_in_use_or_not() {
        let minute = Duration::from_secs(60);
        for (line, min_idle) in [
            ("--port 8080 --watch", IN_USE_WITHIN),
            ("--port 8080 --watch -n", IN_USE_WITHIN),
            (
                "--peer 10.1.2.3 --state established --watch",
                Duration::ZERO,
            ),
            (
                "--peer 10.1.2.3 --state established --watch --min-idle 1m --for 1m",
                minute,
            ),
        ] {
            let config = config(line).unwrap();
            assert_eq!(config.selectors.min_idle, min_idle, "{line}");
            let duration = line.contains("--for").then_some(minute);
            assert_eq!(config.watch, Some(Watch { duration }), "{line}");
        }
        for (line, good) in [
            ("--watch", "--port 8080"),
            ("--port 1 --for 1m", "--watch"),
            ("--port 1 --watch --json", "--jsonl"),
            ("--port 1 --watch --watch-refill 1m", "--watch-refill"),
            ("--port 1 --watch --drain-backlog", "--drain-backlog"),
            ("--port 1 --watch --limit 3", "--limit"),
            ("--port 1 --state established", "--min-idle 1h"),
        ] {
            let error = config(line).unwrap_err().to_string();
            assert!(error.contains(good), "{line}: {error}");
        }
    }

    #[test]
    fn only_a_selector_makes_it_act() {
        for line in ["", "--json", "-v", "-H", "--color never", "--min-idle 1m"] {
            assert_eq!(config(line).unwrap().action, Action::List, "{line}");
        }
        // Every combination of the options that only narrow.
        let narrowing = [
            "--user 0",
            "--min-age 0s",
            "--min-idle 1m",
            "--host-root /",
            "--address-gone",
            "--cause unread",
            "-4",
            "-6",
            "--bpf never",
            "-N 1",
            "--all-netns",
            "--state last-ack",
            "state close-wait",
        ];
        for set in 0..1_u32 << narrowing.len() {
            let chosen = |index: &usize| set & 1 << index != 0;
            let chosen = (0..narrowing.len()).filter(chosen);
            let line: Vec<&str> = chosen.map(|index| narrowing[index]).collect();
            // Two ways to name states are refused, and so are two families and two ways to name namespaces.
            if let Ok(config) = config(&line.join(" ")) {
                assert_eq!(config.action, Action::List, "{line:?}");
            }
        }
        for line in SELECTORS.iter().copied().chain([
            "sport = :80",
            "state close-wait sport = :80",
            "--min-age 1h --port 1",
        ]) {
            assert_eq!(config(line).unwrap().action, Action::Act, "{line}");
            let dry = format!("{line} -n");
            assert_eq!(config(&dry).unwrap().action, Action::DryRun, "{dry}");
        }
        for line in ["-n", "--dry-run", "--dryrun", "-n --method destroy"] {
            assert_eq!(config(line).unwrap().action, Action::DryRun, "{line}");
        }
    }

    #[test]
    fn an_act_leaves_alone_what_is_in_use() {
        let min_idle = |line| config(line).unwrap().selectors.min_idle;
        assert_eq!(min_idle("--port 1"), IN_USE_WITHIN);
        assert_eq!(min_idle("--dry-run"), IN_USE_WITHIN);
        assert_eq!(min_idle(""), Duration::ZERO);
        for line in [
            "--all --min-idle 10m",
            "--min-idle 10m",
            "-n --min-idle 10m",
        ] {
            assert_eq!(min_idle(line), Duration::from_secs(600), "{line}");
        }
        assert_eq!(min_idle("--all --min-idle 0s"), Duration::ZERO);
        assert_eq!(min_idle("--all --active"), Duration::ZERO);
    }

    #[test]
    fn open_connections_are_only_closed_by_age_or_idle_time() {
        for line in [
            "--state established",
            "state connected",
            "--state established --min-age 0s",
            "--state established --min-idle 0s",
        ] {
            let error = config(&format!("--port 1 {line}")).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
            assert!(error.to_string().contains("--min-idle 1h"), "{error}");
        }
        for line in [
            "--port 1 --state established --min-age 1h",
            "--port 1 --state established --min-idle 1h",
            "--port 1 --state established --active",
            "--port 1 --state established -n",
            "--state established",
        ] {
            assert!(config(line).is_ok(), "{line}");
        }
    }

    /// The connection by which the operator works on the host is one of them.
    #[test]
    fn open_connections_of_everybody_are_never_ended_at_once() {
        for line in [
            "--all --state established --active",
            "--all --state established --active --yes",
            "--all --state close-wait,established --active",
            "--all --state established --active --min-age 0s",
            "--all --state established --watch",
            "--all --state established --watch --min-idle 0s",
            "--all --state established --user 0 --active",
            "--all --state established -4 --netns 1 --watch",
            "--all state connected --active",
        ] {
            let error = config(line).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
            assert!(error.to_string().contains("--peer 192.0.2.7"), "{error}");
        }
        for line in [
            "--all --state established --active -n",
            "--all --state established --active --min-age 1h",
            "--all --state established --watch --min-idle 1h",
            "--all --state close-wait --active",
            "--all --watch",
            "--all --port 1 --state established --active",
            "--process x --state established --watch",
            "sport = :80 --state established --active",
        ] {
            assert!(config(line).is_ok(), "{line}");
        }
    }

    #[test]
    fn an_act_without_a_selector_is_refused() {
        for line in [
            "--method destroy",
            "--grace 2s",
            "--active",
            "--discard-unsent",
            "--allow-spin",
            "--max-kills 3",
            "--watch-refill 5s",
            "--yes",
        ] {
            for narrowing in ["", "--min-age 1h", "state last-ack"] {
                let error = config(&format!("{line} {narrowing}")).unwrap_err();
                assert_eq!(error.exit_code(), 2, "{line}");
                assert!(error.to_string().contains("--port 8080"), "{error}");
            }
        }
    }

    #[test]
    fn an_expression_says_which_states() {
        let states = |line| config(line).unwrap().selectors.states;
        let (close_wait, last_ack) = (TcpState::CloseWait, TcpState::LastAck);
        assert_eq!(states("sport = :80"), close_wait.into());
        assert_eq!(states("state last-ack sport = :80"), last_ack.into());
        assert_eq!(states("sport = :80 --state last-ack"), last_ack.into());
        for (line, part) in [
            ("state close-wait --state close-wait", "--state and `state`"),
            ("state close-wait or sport = :80", "every state"),
            ("sport = :8O80 -n", "column 9"),
            ("10.78.1.1:8080", "--local 10.78.1.1 --port 8080"),
            ("[2001:db8::1]:443", "--peer 2001:db8::1 --peer-port 443"),
        ] {
            let error = config(line).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn an_expression_that_can_be_misread_gets_a_note() {
        let notes = |line| config(line).unwrap().notes;
        assert!(notes("sport 80 or sport 443 or dst 10/8").is_empty());
        assert_eq!(notes("sport 80 or sport 443 and dst 10/8").len(), 1);
    }

    #[test]
    fn what_needs_owners_does_not_go_without_them() {
        let error = |line| config(line).unwrap_err().to_string();
        assert!(error("--no-owners --pid 7").contains("--port"));
        assert!(error("--no-owners --all --method shutdown").contains("--method destroy"));
        assert!(!config("--no-owners --all").unwrap().owners);
        assert!(config("--all").unwrap().owners);
    }

    #[test]
    fn methods_keep_their_order() {
        use Method::{Destroy, Shutdown};
        let methods = |line| config(line).map(|c| c.policy.methods);
        assert_eq!(methods("--all").unwrap(), Method::AUTO);
        assert_eq!(methods("--all --method auto").unwrap(), Method::AUTO);
        let swapped = "--all --method destroy,shutdown,destroy";
        assert_eq!(methods(swapped).unwrap(), [Destroy, Shutdown]);
        assert!(methods("--all --method auto,destroy").is_err());
        assert!(methods("--all --method kill").is_err());
    }
}
