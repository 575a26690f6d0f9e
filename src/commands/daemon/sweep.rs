//! One sweep of the daemon: it finds what `cwkill` without arguments lists, and reads the descriptor tables of all processes.

use std::time::{Duration, Instant};

use crate::commands::close::find_and_plan;
use crate::config::Config;
use crate::control::Control;
use crate::daemon::observation::Observation;
use crate::diagnose::read_tables;
use crate::finder;
use crate::history::History;
use crate::privileges::Privileges;
use crate::proc::netns::Namespaces;
use crate::proc::{ProcFs, ProcessId};
use crate::report::Run;

/// What sweeps need, from the first one to the last.
pub(super) struct Sweeper {
    pub config: Config,
    pub proc: ProcFs,
    pub privileges: Privileges,
    pub history: History,
}

/// The result of a sweep.
pub(super) struct Sweep {
    pub run: Run,
    pub namespaces: Namespaces,
    /// With the names of containers as they were at this sweep.
    pub proc: ProcFs,
    pub observation: Observation,
    pub took: Duration,
    /// Why dead descriptors were not seen, one per line.
    pub failures: Vec<String>,
}

impl Sweeper {
    /// # Errors
    /// The sockets or the processes cannot be listed.
    pub fn sweep(&mut self, control: &dyn Control) -> anyhow::Result<Sweep> {
        let began = Instant::now();
        let Config {
            netns, selectors, ..
        } = &self.config;
        let proc = self.proc.with_names_renewed();
        let namespaces = finder::open_namespaces(netns, selectors, &proc)?;
        let scan = find_and_plan(
            &self.config,
            &namespaces,
            &self.history,
            &self.privileges,
            &proc,
            control,
        )?;
        self.history.add(&scan, selectors);
        let (dead, failures) = read_tables(&scan, selectors, &proc);
        let limit = |id: ProcessId| proc.open_file_limits(id.pid).map(|(soft, _)| soft);
        let mut observation = Observation::of(&scan, &dead, &limit);
        observation.is_partial |= !failures.is_empty();
        Ok(Sweep {
            observation,
            took: began.elapsed(),
            run: Run::new(scan),
            namespaces,
            proc,
            failures,
        })
    }
}
