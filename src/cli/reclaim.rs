//! Giving descriptors back: the options of `--reclaim`, and the command `cwkill reclaim`.

use std::time::Duration;

use globset::GlobMatcher;

use super::{Logging, Output, values};
use crate::selectors::UnitName;

const AFTER_HELP: &str = "\
Without a selector it lists descriptors of TCP sockets whose connection is
over. With one it closes them inside their processes, unless --dry-run.

Reclaiming changes the process, not the kernel. The program does not know that
its descriptor is gone: if it closes or uses the number later, and the kernel
has given it to a new connection, it hits that one. Go and Java do this by
themselves, when they collect a connection object that nothing refers to.
So servers in Go, Java and Node are only touched with --reclaim-force; let them
collect their garbage first (jcmd PID GC.run). See cwkill-reclaim(8).

Examples:
  cwkill reclaim                           list dead descriptors, and whether they may be taken
  cwkill reclaim --pid 4711 --dry-run      the same of one process
  cwkill reclaim --pid 4711                close them there

Exit status: 0 all of them are closed (or something was listed), 1 there are
none, 2 wrong usage, 3 could not do the job at all, 4 some are left.";

/// What may be done to the owner of a descriptor.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Reclaiming")]
pub struct Reclaiming {
    /// Take only descriptors of sockets that have been quiet for at least this long [default: 1m]
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    pub reclaim_age: Option<Duration>,

    /// Take them whatever speaks against it: an epoll set (Go, Node), finalizers (Java), a system call, the age
    #[arg(long)]
    pub reclaim_force: bool,

    /// How long a process may be stopped for it [default: 100ms]
    #[arg(long, value_name = "DURATION", value_parser = values::stop_limit)]
    pub stop_limit: Option<Duration>,
}

/// The arguments of `cwkill reclaim`.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct ReclaimArgs {
    /// Whose descriptors.
    #[command(flatten)]
    pub owners: OwnerSelection,

    /// Show what would be done, and do nothing
    #[arg(
        short = 'n',
        long,
        visible_alias = "dryrun",
        help_heading = "Reclaiming"
    )]
    pub dry_run: bool,

    /// What may be done.
    #[command(flatten)]
    pub reclaiming: Reclaiming,

    /// Where it is recorded.
    #[command(flatten, next_help_heading = "Reclaiming")]
    pub logging: Logging,

    /// How to tell.
    #[command(flatten)]
    pub output: Output,
}

/// The selectors that a dead socket can be told by: it has no addresses any more, only owners.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Selectors")]
pub struct OwnerSelection {
    /// Descriptors of this process
    #[arg(short, long, value_name = "PID", value_delimiter = ',', value_parser = values::pid)]
    pub pid: Vec<i32>,

    /// Descriptors of processes with this name: java or 'php-fpm*'
    #[arg(long, value_name = "GLOB", value_parser = values::glob)]
    pub process: Vec<GlobMatcher>,

    /// Descriptors of processes of this systemd unit: nginx, nginx.service or 'php*'
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = values::unit)]
    pub unit: Vec<UnitName>,

    /// Descriptors of processes of this container: its id, 8 digits of it or more, or its name
    #[arg(long, value_name = "ID|NAME", value_delimiter = ',', value_parser = values::container)]
    pub container: Vec<String>,

    /// Descriptors of processes in this cgroup or below
    #[arg(long, value_name = "PATH", value_parser = values::cgroup)]
    pub cgroup: Vec<String>,

    /// Every process
    #[arg(long)]
    pub all: bool,
}
