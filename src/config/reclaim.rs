//! The configuration of `cwkill reclaim` and of `--reclaim`.

use std::time::Duration;

use clap::ColorChoice;

use super::{Action, Format, LogOptions, usage};
use crate::cli::{ReclaimArgs, Reclaiming, flat};
use crate::filter::selectors::Selectors;
use crate::reclaim::ReclaimRules;

/// The default of `--reclaim-age`.
pub const DEFAULT_RECLAIM_AGE: Duration = Duration::from_secs(60);
const DEFAULT_STOP_LIMIT: Duration = Duration::from_millis(100);
/// The rules without any option.
pub const DEFAULT_RECLAIM_RULES: ReclaimRules = ReclaimRules {
    min_age: DEFAULT_RECLAIM_AGE,
    force: false,
    replace: false,
    stop_limit: DEFAULT_STOP_LIMIT,
};

/// The rules from the options, with defaults.
pub(super) fn reclaim_rules(args: &Reclaiming) -> ReclaimRules {
    ReclaimRules {
        min_age: args.reclaim_age.unwrap_or(DEFAULT_RECLAIM_AGE),
        force: args.reclaim_force,
        stop_limit: args.stop_limit.unwrap_or(DEFAULT_STOP_LIMIT),
        ..DEFAULT_RECLAIM_RULES
    }
}

/// The configuration of `cwkill reclaim`.
#[derive(Clone, Debug)]
pub struct ReclaimConfig {
    /// Select owners and local ports only.
    pub selectors: Selectors,
    /// The numbers of the descriptors; empty for all.
    pub fds: Vec<i32>,
    /// Whether a selector says which descriptors: only then cwkill acts.
    pub selects: bool,
    /// Whether processes of every network namespace are in scope. A port alone means that of one namespace.
    pub everywhere: bool,
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
            port,
            owners,
            fd,
            dry_run,
            replace,
            reclaiming,
            logging,
            output,
        } = args;
        let all = owners.all;
        let selectors = Selectors {
            ports: flat(port),
            ..Selectors::of_owners(owners)
        };
        let selects = all || selectors.selects_owners() || !selectors.ports.is_empty();
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
                "{option} needs a selector: for example --pid 4711 or --port 8080, or --all for every process",
            )));
        }
        Ok(ReclaimConfig {
            log: LogOptions::from_args(logging, output.verbose),
            everywhere: all || selectors.selects_owners() || selectors.ports.is_empty(),
            selectors,
            fds: flat(fd),
            selects,
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
            "--port 8080",
            "--port 8080,9000-9100 --pid 7",
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
    fn a_port_alone_is_that_of_one_namespace() {
        let everywhere = |line| config(line).unwrap().everywhere;
        assert!(!everywhere("--port 8080") && !everywhere("--port 8080 -n"));
        for line in ["", "--all --port 8080", "--pid 7 --port 8080", "--unit x"] {
            assert!(everywhere(line), "{line}");
        }
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
