//! The command `cwkill reclaim`: descriptors whose socket is already dead.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::ColorChoice;

use super::{ReclaimRules, ReclaimTarget, StopStats, judge, let_owners_react, reclaim};
use crate::audit;
use crate::cli::{OwnerSelection, ReclaimArgs, Reclaiming};
use crate::config::{Action, Format, usage};
use crate::finder::dead::{self, Verdict};
use crate::finder::netns::Which;
use crate::finder::owners::{Proc, Process};
use crate::injector::ladder::Surroundings;
use crate::selectors::Selectors;

const DEFAULT_AGE: Duration = Duration::from_secs(60);
const DEFAULT_STOP_LIMIT: Duration = Duration::from_millis(100);

impl ReclaimRules {
    /// The rules given by the options, with defaults.
    pub fn from_args(args: &Reclaiming) -> Self {
        ReclaimRules {
            min_age: args.reclaim_age.unwrap_or(DEFAULT_AGE),
            force: args.reclaim_force,
            stop_limit: args.stop_limit.unwrap_or(DEFAULT_STOP_LIMIT),
        }
    }
}

impl Reclaiming {
    /// The first given option that only makes sense if descriptors are to be closed.
    pub fn given(&self) -> Option<&'static str> {
        [
            ("--reclaim-age", self.reclaim_age.is_some()),
            ("--reclaim-force", self.reclaim_force),
            ("--stop-limit", self.stop_limit.is_some()),
        ]
        .into_iter()
        .find_map(|(option, given)| given.then_some(option))
    }
}

/// The options of the command.
#[derive(Clone, Debug)]
pub struct Config {
    /// The owners.
    pub selectors: Selectors,
    /// Whether to list, to plan or to close.
    pub action: Action,
    /// What the operator permits.
    pub rules: ReclaimRules,
    /// The format of the results.
    pub format: Format,
    /// Omit the header of the table.
    pub no_header: bool,
    /// Show how each descriptor is known to be dead.
    pub verbose: bool,
    /// Colour the table.
    pub color: ColorChoice,
    /// Where actions are logged.
    pub log: audit::Wanted,
}

impl Config {
    /// Checks that the arguments make sense together.
    ///
    /// # Errors
    /// They do not; the error names them and shows a valid example.
    pub fn from_args(args: ReclaimArgs) -> Result<Self, clap::Error> {
        let ReclaimArgs {
            owners:
                OwnerSelection {
                    pid,
                    process,
                    unit,
                    container,
                    cgroup,
                    all,
                },
            dry_run,
            reclaiming,
            logging,
            output,
        } = args;
        let selectors = Selectors {
            pids: pid.into_iter().collect(),
            processes: process,
            units: unit,
            containers: container,
            cgroups: cgroup,
            ..Selectors::default()
        };
        let selects = all || selectors.selects_owners();
        if !selects && !dry_run && reclaiming.reclaim_force {
            return Err(usage(
                "--reclaim-force needs a selector that says whose descriptors to take: \
                 for example --pid 4711, or --all for every process",
            ));
        }
        if let Some(option) = logging.given()
            && !selects
            && !dry_run
        {
            return Err(usage(&format!(
                "{option} needs a selector that says whose descriptors to take: \
                 for example --pid 4711, or --all for every process",
            )));
        }
        let log = logging.wanted(output.verbose);
        Ok(Config {
            log,
            selectors,
            action: match (selects, dry_run) {
                (_, true) => Action::DryRun,
                (true, false) => Action::Act,
                (false, false) => Action::List,
            },
            rules: ReclaimRules::from_args(&reclaiming),
            format: output.format(),
            no_header: output.no_header,
            verbose: output.verbose,
            color: output.color,
        })
    }
}

/// Everything that a report needs.
#[derive(Debug)]
pub struct Run {
    /// The descriptors of dead sockets.
    pub descriptors: Vec<ReclaimTarget>,
    /// Descriptors were to be closed, and each has its outcome; otherwise each outcome says only what would be done.
    pub acted: bool,
    /// The owners that were stopped.
    pub stops: Vec<StopStats>,
    /// Number of descriptors that may be dead: TCP sockets in no table of the kernel, which cwkill may not inspect.
    pub unknown: usize,
    /// Number of selected processes that cwkill may not inspect.
    pub unreadable: usize,
    /// Processes whose first thread has exited: /proc does not show their descriptors.
    pub headless: Vec<Process>,
    /// Processes whose files could not be read, with the error.
    pub failed: Vec<(i32, io::Error)>,
    /// /proc is mounted with hidepid and may hide selected processes.
    pub hidden: bool,
}

impl Run {
    /// Whether something that was selected could not be inspected.
    pub fn has_blind_spots(&self) -> bool {
        self.unknown + self.unreadable + self.headless.len() + self.failed.len() > 0 || self.hidden
    }
}

/// Finds the descriptors, and changes nothing.
///
/// # Errors
/// Nothing can be found at all.
pub fn find(config: &Config, proc: &Proc) -> anyhow::Result<Run> {
    let here = Which::Ours
        .open(proc)
        .context("cannot tell the network namespace")?;
    let in_tables = dead::inodes_in_tables(&here.open)?;
    let wanted = |process: &Process| config.selectors.match_owner(process);
    let scan = dead::find(proc, &wanted, &in_tables).context("cannot list processes")?;
    let everyone = !config.selectors.selects_owners();
    let unreadable = match everyone || config.selectors.could_match(&scan.unreadable) {
        true => scan.unreadable.len(),
        false => 0,
    };
    // A process that was selected by its pid and was inspected is not hidden.
    let looked_into = |pid: &i32| {
        let tables = scan.tables.iter().map(|table| &table.process);
        tables
            .chain(&scan.headless)
            .any(|process| process.pid == *pid)
    };
    let pids = &config.selectors.pids;
    let hidden = scan.hidden && (pids.is_empty() || !pids.iter().all(looked_into));
    let (mut descriptors, mut unknown) = (Vec::new(), 0);
    for table in scan.tables {
        let process = Arc::new(table.process);
        let dead = table
            .suspects
            .iter()
            .filter_map(|suspect| match suspect.verdict {
                Verdict::Dead(socket) => {
                    Some(ReclaimTarget::dead(Arc::clone(&process), suspect, &socket))
                }
                Verdict::NeverConnected | Verdict::Unknown(_) => None,
            });
        descriptors.extend(dead);
        let hidden = |verdict: Verdict| matches!(verdict, Verdict::Unknown(_));
        unknown += table.suspects.iter().filter(|s| hidden(s.verdict)).count();
    }
    Ok(Run {
        descriptors,
        acted: false,
        stops: Vec::new(),
        unknown,
        unreadable,
        headless: scan.headless,
        failed: scan.failed,
        hidden,
    })
}

/// Closes the descriptors of `run` if `config` says so, or decides which of them could be closed. Each gets its outcome.
pub fn carry_out(run: &mut Run, config: &Config, proc: &Proc, surroundings: &dyn Surroundings) {
    let targets = &mut run.descriptors;
    if config.action == Action::Act {
        surroundings.begin();
        if !targets.is_empty() {
            let_owners_react(&config.rules, surroundings);
        }
        let interrupted = || surroundings.interrupted();
        run.stops = reclaim(targets, &config.rules, proc, &interrupted);
        run.acted = true;
    } else {
        judge(targets, &config.rules, proc);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn config(line: &str) -> Result<Config, clap::Error> {
        let words = ["cwkill", "reclaim"]
            .into_iter()
            .chain(line.split_whitespace());
        match Cli::try_parse_from(words)?.command {
            Some(Command::Reclaim(args)) => Config::from_args(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_a_selector_makes_it_act() {
        for line in ["", "--json", "--reclaim-age 0s", "--stop-limit 1s", "-v"] {
            assert_eq!(config(line).unwrap().action, Action::List, "{line}");
        }
        for line in [
            "--pid 7",
            "--process x",
            "--unit x",
            "--container x",
            "--cgroup /x",
            "--all",
        ] {
            assert_eq!(config(line).unwrap().action, Action::Act, "{line}");
            let dry = format!("{line} -n");
            assert_eq!(config(&dry).unwrap().action, Action::DryRun, "{dry}");
        }
        assert_eq!(config("--reclaim-force -n").unwrap().action, Action::DryRun);
        let error = config("--reclaim-force").unwrap_err();
        assert!(error.to_string().contains("--pid 4711"), "{error}");
    }

    #[test]
    fn the_defaults_are_careful() {
        let rules = config("--all").unwrap().rules;
        let wanted = ReclaimRules {
            min_age: Duration::from_secs(60),
            force: false,
            stop_limit: Duration::from_millis(100),
        };
        assert_eq!(rules, wanted);
    }
}
