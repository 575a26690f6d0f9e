//! The arguments of `cwkill daemon`.

use std::path::PathBuf;
use std::time::Duration;

use super::values;
use crate::finder::way::UseIterator;

const AFTER_SHORT_HELP: &str = "\
Metrics, the service manager, all options: cwkill daemon --help, man cwkill-daemon";

const AFTER_HELP: &str = "\
The daemon counts the sockets in CLOSE-WAIT, their owners and causes, and serves the numbers to \
Prometheus. It closes only what a policy of its configuration with mode = \"act\" selects.

Examples:
  cwkill daemon                            serve metrics on 127.0.0.1:9979
  cwkill daemon --once --observe           one sweep, as a listing, without acts
  cwkill daemon --check-config             what the configuration does, in words
  cwkill daemon --once --observe --textfile /var/lib/prometheus/node-exporter
                                           from a timer, for node_exporter

Exit status: 0 stopped by a signal, 2 wrong usage or a wrong configuration, 3 could not start; with \
--once that of cwkill: 0 something was listed, 1 nothing matched, 3 could not run at all, or a policy \
could not act, 4 not everything could be seen, or a policy failed to close a socket.";

#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_SHORT_HELP, after_long_help = AFTER_HELP)]
pub struct DaemonArgs {
    /// Read the configuration from this file, and then from the directory with its name and .d
    /// [default: /etc/cwkill/daemon.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Sweep once, print what was found, carry out the policies, and exit
    #[arg(long, conflicts_with = "check_config")]
    pub once: bool,

    /// Read the configuration, say what each policy would do and how many sockets it matches now, and exit
    #[arg(long)]
    pub check_config: bool,

    /// Close the circuit breaker of this policy, and let it act again on sockets that it could not close
    #[arg(long, value_name = "NAME", conflicts_with_all = ["once", "check_config"])]
    pub reset: Option<String>,

    /// Close nothing: every policy only observes, whatever its mode
    #[arg(long, conflicts_with = "reset")]
    pub observe: bool,

    /// From the start of a sweep to the start of the next, instead of the configured time: 30s, 5m
    #[arg(long, value_name = "DURATION", value_parser = values::sweep_interval)]
    pub interval: Option<Duration>,

    /// Write the metrics to cwkill.prom in this directory, for the textfile collector of node_exporter,
    /// instead of the configured one
    #[arg(long, value_name = "DIR")]
    pub textfile: Option<PathBuf>,

    /// Read the names of containers below this directory, instead of the configured one
    #[arg(long, value_name = "DIR", value_parser = values::host_root, hide_short_help = true)]
    pub host_root: Option<PathBuf>,

    /// Read the descriptors of all processes by an iterator in the kernel instead of /proc
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = UseIterator::Auto, hide_short_help = true)]
    pub bpf: UseIterator,
}
