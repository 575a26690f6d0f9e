//! The command line. Each value is parsed here; [`crate::config`] validates their combination.

mod check;
mod daemon;
mod diagnose;
mod doctor;
mod gateway;
mod hints;
mod misplaced;
mod option_errors;
mod reclaim;
mod selection;
mod trace;
pub(crate) mod values;

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, ColorChoice, Parser, Subcommand};

pub use check::CheckArgs;
pub use daemon::DaemonArgs;
pub use diagnose::DiagnoseArgs;
pub use doctor::DoctorArgs;
pub use gateway::{ForwardedActing, ForwardedSelection, GatewayArgs};
pub use hints::better_error;
pub use misplaced::Misplaced;
pub(crate) use option_errors::example_value;
pub use reclaim::{ReclaimArgs, Reclaiming};
pub use selection::{OwnerSelection, Selection};
pub use trace::TraceArgs;
pub use values::{List, flat};

use crate::model::Method;

const AFTER_SHORT_HELP: &str = "\
Without a selector it lists. With a port, an address, an owner, an expression or --all it closes \
what matches; -n only shows it. All options: cwkill --help";

const AFTER_HELP: &str = "\
Without a selector, cwkill lists the stuck sockets and never acts. With a port, an address, an \
owner, an expression or --all it closes what matches, unless --dry-run is given. --state, \
--min-age, --min-idle, --address-gone, --cause, --user, -4, -6, --netns and --all-netns never make \
it act by themselves. A socket must match all selectors, and one value of each.

Examples:
  cwkill                                   list the stuck sockets and causes
  cwkill --port 8080 --dry-run             show the plan for each socket
  cwkill --port 8080                       close them, verify and report
  cwkill --process 'java*' --min-age 1h    those stuck for an hour or more
  cwkill 'sport = :8080 and dst 10.0.0.0/8'
                                           what this filter of ss(8) matches

Exit status: 0 all matched sockets are closed (or something was listed), 1 nothing matched (0 with \
--ok-if-none), 2 wrong usage, 3 could not run at all, 4 some sockets that match or may match are \
not closed, or a process spins. Sockets over --max-kills do not count.";

const DOCTOR_HELP: &str = "\
Tries every method on connections of its own over loopback, and touches nothing else.

Exit status: 0 auto works fully, 1 in part (or it could not be tried), 2 wrong usage, 3 not at all.";

/// Close TCP sockets stuck in CLOSE-WAIT, not the process that leaks them.
#[derive(Debug, Parser)]
#[command(name = "cwkill", version, max_term_width = 100)]
#[command(after_help = AFTER_SHORT_HELP, after_long_help = AFTER_HELP)]
#[command(args_conflicts_with_subcommands = true, propagate_version = true)]
pub struct Cli {
    /// The arguments without a command: list or close.
    #[command(flatten)]
    pub args: Args,
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show who leaks, why, how fast, and what to do next; never acts
    Diagnose(DiagnoseArgs),
    /// Show which line of code leaves sockets stuck; never acts
    // Without the feature it only says so.
    #[cfg_attr(not(feature = "trace"), command(hide = true))]
    Trace(TraceArgs),
    /// Compare the stuck sockets with thresholds, as a monitoring plugin
    Check(CheckArgs),
    /// Check which methods work on this host and what to fix
    #[command(after_long_help = DOCTOR_HELP)]
    Doctor(DoctorArgs),
    /// Close descriptors of dead sockets inside the leaking processes
    Reclaim(ReclaimArgs),
    /// Sweep at intervals, serve Prometheus metrics, close by policy
    Daemon(DaemonArgs),
    /// List and end connections between other hosts, on their router
    Gateway(GatewayArgs),
    /// Print the completion script for a shell
    Completions {
        /// The shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
}

/// The arguments of `cwkill` without a command.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub selection: Selection,
    #[command(flatten)]
    pub acting: Acting,
    #[command(flatten)]
    pub output: Output,
    /// At most N rows [default: one screen, in a pipe all]
    #[arg(
        long,
        value_name = "N|all",
        value_parser = values::limit,
        conflicts_with_all = ["json", "jsonl", "quiet"],
        help_heading = "Output",
        hide_short_help = true
    )]
    pub limit: Option<Limit>,
}

/// A value of `--limit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// At most so many rows.
    Rows(usize),
    /// Every socket.
    All,
}

/// The options that say how cwkill acts on the sockets.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Action")]
pub struct Acting {
    /// Show the plan and do nothing
    #[arg(short = 'n', long, visible_alias = "dryrun")]
    pub dry_run: bool,

    /// Do not ask before closing for several processes
    ///
    /// cwkill asks only on a terminal, and not with --all.
    #[arg(short, long)]
    pub yes: bool,

    /// Methods to try, in this order [default: auto]
    ///
    /// The methods are probe, shutdown, destroy and rst. auto is shutdown, then destroy, then rst.
    #[arg(long, value_name = "auto|LIST", value_parser = values::methods(), hide_possible_values = true)]
    pub method: Vec<List<MethodChoice>>,

    /// How long a socket gets to close before the next method [default: 1s]
    #[arg(long, value_name = "DURATION", value_parser = values::duration, hide_short_help = true)]
    pub grace: Option<Duration>,

    /// Skip the search for owning processes: faster, but `shutdown` is unavailable
    #[arg(long, hide_short_help = true)]
    pub no_owners: bool,

    /// Also close connections that are in use, ESTABLISHED ones too
    #[arg(long, hide_short_help = true, conflicts_with = "min_idle")]
    pub active: bool,

    /// Allow the loss of bytes still queued to a peer
    #[arg(long, hide_short_help = true)]
    pub discard_unsent: bool,

    /// Close sockets even if a process would spin (use a whole processor) afterwards
    #[arg(long, hide_short_help = true)]
    pub allow_spin: bool,

    /// Act on at most N sockets, the oldest first
    #[arg(long, value_name = "N", value_parser = values::kills)]
    pub max_kills: Option<usize>,

    /// Afterwards, watch for new stuck sockets for this long and report their rate
    #[arg(
        long,
        value_name = "DURATION",
        value_parser = values::positive_duration,
        conflicts_with_all = ["dry_run", "quiet"], hide_short_help = true)]
    pub watch_refill: Option<Duration>,

    /// Go on with the sockets that come, until Ctrl-C, --for or --max-kills
    ///
    /// Connections with `--state established` are closed in use or not, unless --min-idle or --min-age is given.
    #[arg(long, hide_short_help = true)]
    pub watch: bool,

    /// End the watch after this time: 90s, 15m, 2h
    #[arg(long = "for", value_name = "DURATION", value_parser = values::positive_duration, hide_short_help = true)]
    pub watch_for: Option<Duration>,

    /// Afterwards, accept and close the dead connections in the backlogs, so that new clients get in. Stops the owners briefly
    #[arg(long, conflicts_with = "no_owners", hide_short_help = true)]
    pub drain_backlog: bool,

    #[command(flatten)]
    pub logging: Logging,

    /// Afterwards, close the descriptors of the closed sockets inside their processes; see `cwkill reclaim --help`
    #[arg(long, conflicts_with = "no_owners", hide_short_help = true)]
    pub reclaim: bool,

    #[command(flatten)]
    pub reclaiming: Reclaiming,
}

/// The options of the audit log.
#[derive(Debug, clap::Args)]
pub struct Logging {
    /// Record every act in: journald, stderr or none [default: journald when run by systemd, else stderr with -v]
    #[arg(long, value_name = "WHERE", value_parser = values::log_target, hide_short_help = true)]
    pub log: Option<LogTarget>,

    /// Append a JSON line for every act to this file
    #[arg(long, value_name = "PATH", hide_short_help = true)]
    pub log_file: Option<PathBuf>,
}

impl Logging {
    /// The first given option that makes sense only if cwkill acts.
    pub(crate) fn given(&self) -> Option<&'static str> {
        match (self.log, &self.log_file) {
            (Some(_), _) => Some("--log"),
            (None, Some(_)) => Some("--log-file"),
            (None, None) => None,
        }
    }
}

/// The options for the format of the results.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Output")]
pub struct Output {
    /// Print one JSON document
    #[arg(long, conflicts_with = "jsonl")]
    pub json: bool,

    /// Print one JSON object per socket, one per line
    #[arg(long, hide_short_help = true)]
    pub jsonl: bool,

    /// Omit the header of the table
    #[arg(short = 'H', long, hide_short_help = true)]
    pub no_header: bool,

    /// Print errors only
    #[arg(short, long, conflicts_with_all = ["json", "jsonl", "verbose"], hide_short_help = true)]
    pub quiet: bool,

    /// Exit with 0 instead of 1 if nothing matched
    #[arg(long, hide_short_help = true)]
    pub ok_if_none: bool,

    /// A row for each socket, with every owner and attempt
    #[arg(short, long, action = ArgAction::SetTrue)]
    pub verbose: bool,

    /// Colour the table; NO_COLOR is respected
    #[arg(long, value_name = "WHEN", default_value_t = ColorChoice::Auto, hide_short_help = true)]
    pub color: ColorChoice,
}

/// A value of `--log`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogTarget {
    Journald,
    /// One line per record on standard error.
    Stderr,
    None,
}

/// A value of `--method`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MethodChoice {
    /// The default methods in their default order.
    Auto,
    Only(Method),
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// clap breaks long lines, so a paragraph is one line, and a line of a table or an example must fit.
    #[test]
    fn what_stands_after_the_options_fits_a_terminal_of_80_columns() {
        let root = Cli::command();
        for command in std::iter::once(&root).chain(root.get_subcommands()) {
            let texts = [command.get_after_help(), command.get_after_long_help()];
            for text in texts.into_iter().flatten().map(ToString::to_string) {
                let is_prose = |line: &str| !line.is_empty() && !line.starts_with("  ");
                let lines: Vec<&str> = text.lines().collect();
                for line in lines.iter().filter(|line| !is_prose(line)) {
                    assert!(line.len() <= 80, "{}: {line}", command.get_name());
                }
                for pair in lines.windows(2) {
                    let is_broken = is_prose(pair[0]) && is_prose(pair[1]);
                    assert!(!is_broken, "{}: {pair:?}", command.get_name());
                }
            }
        }
    }

    #[test]
    fn the_help_of_reclaim_speaks_of_descriptors() {
        let command = Cli::command();
        let reclaim = command.find_subcommand("reclaim").unwrap();
        for argument in reclaim.get_arguments() {
            let help = argument.get_help().unwrap().to_string();
            assert!(!help.starts_with("Sockets of"), "{argument}: {help}");
            assert_ne!(help, "Everything that is stuck", "{argument}");
        }
    }
}
