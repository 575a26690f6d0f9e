//! The configuration of `cwkill reclaim` and of `--reclaim`.

use std::time::Duration;

use clap::ColorChoice;

use super::{Action, Format, LogOptions, usage};
use crate::cli::{ReclaimArgs, Reclaiming, flat};
use crate::filter::selectors::Selectors;
use crate::reclaim::ReclaimRules;

const DEFAULT_AGE: Duration = Duration::from_secs(60);
const DEFAULT_STOP_LIMIT: Duration = Duration::from_millis(100);

/// The rules from the options, with defaults.
pub(super) fn reclaim_rules(args: &Reclaiming) -> ReclaimRules {
    ReclaimRules {
        min_age: args.reclaim_age.unwrap_or(DEFAULT_AGE),
        force: args.reclaim_force,
        replace: false,
        stop_limit: args.stop_limit.unwrap_or(DEFAULT_STOP_LIMIT),
    }
}

/// The configuration of `cwkill reclaim`.
#[derive(Clone, Debug)]
pub struct ReclaimConfig {
    /// Select processes only.
    pub selectors: Selectors,
    /// The numbers of the descriptors; empty for all.
    pub fds: Vec<i32>,
    pub action: Action,
    pub rules: ReclaimRules,
    pub format: Format,
    pub no_header: bool,
    /// Also show the pod of each owner.
    pub verbose: bool,
    pub color: ColorChoice,
    pub log: LogOptions,
}

impl ReclaimConfig {
    /// Validates the combination of the arguments.
    ///
    /// # Errors
    /// It is not valid. The message names the arguments and gives a valid example.
    pub fn from_args(args: ReclaimArgs) -> Result<Self, clap::Error> {
        let ReclaimArgs {
            owners,
            fd,
            dry_run,
            replace,
            reclaiming,
            logging,
            output,
        } = args;
        let all = owners.all;
        let selectors = Selectors::of_owners(owners);
        let selects = all || selectors.selects_owners();
        let needs_selector = match (reclaiming.reclaim_force, replace) {
            (true, _) => Some("--reclaim-force"),
            (false, true) => Some("--replace"),
            (false, false) => logging.given(),
        };
        if let Some(option) = needs_selector
            && !selects
            && !dry_run
        {
            return Err(usage(&format!(
                "{option} needs a selector of processes: for example --pid 4711, or --all for every process",
            )));
        }
        Ok(ReclaimConfig {
            log: LogOptions::from_args(logging, output.verbose),
            selectors,
            fds: flat(fd),
            action: match (selects, dry_run) {
                (_, true) => Action::DryRun,
                (true, false) => Action::Act,
                (false, false) => Action::List,
            },
            rules: ReclaimRules {
                replace,
                ..reclaim_rules(&reclaiming)
            },
            format: output.format(),
            no_header: output.no_header,
            verbose: output.verbose,
            color: output.color,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn config(line: &str) -> Result<ReclaimConfig, clap::Error> {
        let words = ["cwkill", "reclaim"]
            .into_iter()
            .chain(line.split_whitespace());
        match Cli::try_parse_from(words)?.command {
            Some(Command::Reclaim(args)) => ReclaimConfig::from_args(args),
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
        for line in ["--reclaim-force", "--replace"] {
            let error = config(line).unwrap_err();
            assert!(error.to_string().contains("--pid 4711"), "{error}");
        }
        let chosen = config("--pid 7 --fd 3,5 --replace").unwrap();
        assert_eq!((chosen.fds, chosen.rules.replace), (vec![3, 5], true));
        let error = config("--fd 3 -n").unwrap_err();
        assert!(error.to_string().contains("--pid"), "{error}");
        let error = config("--pid 7 --fd x").unwrap_err();
        assert!(error.to_string().contains("for example 7"), "{error}");
    }

    #[test]
    fn the_defaults_are_careful() {
        let rules = config("--all").unwrap().rules;
        let expected = ReclaimRules {
            min_age: Duration::from_secs(60),
            force: false,
            replace: false,
            stop_limit: Duration::from_millis(100),
        };
        assert_eq!(rules, expected);
    }
}
