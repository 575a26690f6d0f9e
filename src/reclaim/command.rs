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
    /// What the options say, with defaults filled in.
    pub fn from_args(args: &Reclaiming) -> Self {
        ReclaimRules {
            min_age: args.reclaim_age.unwrap_or(DEFAULT_AGE),
            force: args.reclaim_force,
            stop_limit: args.stop_limit.unwrap_or(DEFAULT_STOP_LIMIT),
        }
    }
}

impl Reclaiming {
    /// An option that only makes sense when descriptors are to be taken.
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

/// Everything the job needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// Whose descriptors.
    pub selectors: Selectors,
    /// How far to go.
    pub action: Action,
    /// What may be done.
    pub rules: ReclaimRules,
    /// The form of the results.
    pub format: Format,
    /// Leave out the header of the table.
    pub no_header: bool,
    /// Show how each descriptor is known to be dead.
    pub verbose: bool,
    /// Colour the table.
    pub color: ColorChoice,
    /// Where acts are recorded.
    pub log: audit::Wanted,
}

impl Config {
    /// Checks that the arguments make sense together.
    ///
    /// # Errors
    /// They do not; the error says which and shows good ones.
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

/// What was found and done: all that a report needs.
#[derive(Debug)]
pub struct Run {
    /// The descriptors of dead sockets.
    pub descriptors: Vec<ReclaimTarget>,
    /// Descriptors were to be closed, and each has its outcome; otherwise each outcome says only what would be done.
    pub acted: bool,
    /// The owners that were stopped.
    pub stops: Vec<StopStats>,
    /// Descriptors of TCP sockets in no table that may not be looked at: they may be dead.
    pub unknown: usize,
    /// Processes asked for that may not be looked into.
    pub unreadable: usize,
    /// Those whose first thread has ended, so that their descriptors cannot be seen.
    pub headless: Vec<Process>,
    /// Those whose files could not be read, and why.
    pub failed: Vec<(i32, io::Error)>,
    /// There may be processes that were asked for and are not shown at all: /proc is mounted with hidepid.
    pub hidden: bool,
}

impl Run {
    /// Not everything that was asked for could be looked at.
    pub fn has_blind_spots(&self) -> bool {
        self.unknown + self.unreadable + self.headless.len() + self.failed.len() > 0 || self.hidden
    }
}

/// Finds the descriptors; does nothing to any.
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
    // One that was asked for by its number and was looked into cannot be hidden.
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
