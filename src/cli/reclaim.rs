//! Closing dead descriptors: the options of `--reclaim`, and the arguments of `cwkill reclaim`.

use std::ops::RangeInclusive;
use std::time::Duration;

use clap::Arg;

use super::values::{self, List};
use super::{Logging, Output, OwnerSelection};

const AFTER_SHORT_HELP: &str = "\
Without a selector it lists the descriptors of connections that are over. With one it closes them \
inside their processes; --dry-run only shows it. All options: cwkill reclaim --help";

const AFTER_HELP: &str = "\
Without a selector it lists descriptors of TCP sockets whose connection is \
over. With one it closes them inside their processes, unless --dry-run.

Reclaiming changes the process, not the kernel. The program does not know that \
its descriptor is gone: if it closes or uses the number later, and the kernel \
has given it to a new connection, it hits that one. Go and Java do this by \
themselves, when they collect a connection object that nothing refers to. \
So servers in Go, Java and Node are only touched with --reclaim-force. The last \
lines of a run say what to do first, for example to run jcmd PID GC.run twice. \
See cwkill-reclaim(8).

Examples:
  cwkill reclaim                           list dead descriptors
  cwkill reclaim --pid 4711 --dry-run      the same for one process
  cwkill reclaim --pid 4711                close them there
  cwkill reclaim --port 8080               those of connections to 8080

Exit status: 0 all of them are closed (or something was listed), 1 there are \
none (0 with --ok-if-none), 2 wrong usage, 3 could not run at all, 4 some are still open.";

/// The limits for closing descriptors in their owners.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Reclaiming")]
pub struct Reclaiming {
    /// Close only descriptors of sockets that have been quiet for at least this long [default: 1m]
    #[arg(long, hide_short_help = true, value_name = "DURATION", value_parser = values::duration)]
    pub reclaim_age: Option<Duration>,

    /// Ignore the safety checks
    ///
    /// They are: an epoll set (Go, Node.js), finalizers (Java, .NET), a system call, an unfinished transfer, an io_uring, unread bytes
    /// (which are lost), the age. /dev/null replaces the standard descriptors 0, 1 and 2.
    #[arg(long, hide_short_help = true)]
    pub reclaim_force: bool,

    /// Maximum time for which a process may be stopped [default: 100ms]
    #[arg(long, hide_short_help = true, value_name = "DURATION", value_parser = values::positive_duration)]
    pub stop_limit: Option<Duration>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_SHORT_HELP, after_long_help = AFTER_HELP, mut_args(of_descriptors))]
pub struct ReclaimArgs {
    /// Descriptors of sockets with these local ports: 8080,8443 or https
    ///
    /// Without another selector, only in processes of the network namespace that cwkill runs in.
    #[arg(long, value_name = "LIST", value_parser = values::list(values::port_range), help_heading = "Selectors")]
    pub port: Vec<List<RangeInclusive<u16>>>,

    #[command(flatten)]
    pub owners: OwnerSelection,

    /// Only these numbers, in the processes of --pid: 7,9
    #[arg(long, value_name = "LIST", value_parser = values::list(values::descriptor), requires = "pid", help_heading = "Selectors")]
    pub fd: Vec<List<i32>>,

    /// Show the plan and do nothing
    #[arg(
        short = 'n',
        long,
        visible_alias = "dryrun",
        help_heading = "Reclaiming"
    )]
    pub dry_run: bool,

    /// Put /dev/null in the place of each descriptor
    ///
    /// It is not closed then: for a number that is closed, poll(2) returns at once.
    #[arg(long, help_heading = "Reclaiming")]
    pub replace: bool,

    #[command(flatten)]
    pub reclaiming: Reclaiming,

    #[command(flatten, next_help_heading = "Reclaiming")]
    pub logging: Logging,

    #[command(flatten)]
    pub output: Output,
}

/// Replaces the help of options that is about sockets: here it is about descriptors, because the sockets are closed already.
fn of_descriptors(argument: Arg) -> Arg {
    let help = match argument.get_id().as_str() {
        "pid" => "Descriptors of this process",
        "process" => "Descriptors of processes with this name: java or 'php-fpm*'",
        "unit" => "Descriptors of processes of this systemd unit: nginx or 'php*'",
        "container" => "Descriptors of processes of this container: name or id",
        "pod" => "Descriptors of processes of this pod: web-5c9 or 'shop/web-*'",
        "namespace" => "Descriptors of processes of the pods of this kubernetes namespace",
        "compose_service" => "Descriptors of processes of this service of docker compose",
        "cgroup" => "Descriptors of processes in this cgroup or below",
        "all" => "Every process",
        "jsonl" => "Print one JSON object per descriptor, one per line",
        "reclaim_age" | "reclaim_force" | "stop_limit" => return argument.hide_short_help(false),
        _ => return argument,
    };
    argument.help(help).long_help(None::<&str>)
}

impl Reclaiming {
    /// The first given option that makes sense only if descriptors are closed. With `drains`, backlogs are drained, for which owners
    /// are stopped too.
    pub fn given(&self, drains: bool) -> Option<&'static str> {
        [
            ("--reclaim-age", self.reclaim_age.is_some()),
            ("--reclaim-force", self.reclaim_force),
            ("--stop-limit", self.stop_limit.is_some() && !drains),
        ]
        .into_iter()
        .find_map(|(option, given)| given.then_some(option))
    }
}
