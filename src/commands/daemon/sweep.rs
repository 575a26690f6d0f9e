//! One sweep of the daemon: it finds what `cwkill` without arguments lists, and the dead descriptors of all processes.

use std::time::{Duration, Instant};

use crate::config::Config;
use crate::daemon::observation::{DescriptorUse, Observation};
use crate::finder::{self, dead_among_others, table_use};
use crate::history::History;
use crate::injector::way::ByIterator;
use crate::model::Scan;
use crate::privileges::Privileges;
use crate::proc::netns::Namespaces;
use crate::proc::{ProcFs, ProcessId};

/// What sweeps need, from the first one to the last.
pub(super) struct Sweeper {
    pub config: Config,
    pub proc: ProcFs,
    pub privileges: Privileges,
    /// The quicker way to destroy, which judges each socket at the instant of the act.
    pub destroyer: Option<ByIterator>,
    pub history: History,
}

/// The result of a sweep.
pub(super) struct Sweep {
    /// The sockets are in no order, and nothing is planned for them.
    pub scan: Scan,
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
    pub fn sweep(&mut self) -> anyhow::Result<Sweep> {
        let began = Instant::now();
        let Config {
            netns, selectors, ..
        } = &self.config;
        let proc = self.proc.with_names_renewed();
        let namespaces = finder::open_namespaces(netns, selectors, &proc)?;
        let (scan, others) =
            finder::find_with_others(&namespaces, &proc, selectors, &self.history)?;
        self.history.add(&scan, selectors);
        let dead = dead_among_others::find(&proc, others, &scan, selectors.states);
        let descriptors = |id: ProcessId| {
            let table = table_use::of(&proc, id)?;
            Some(DescriptorUse {
                open: table.used? as u64,
                limit: table.limit?,
            })
        };
        let observation = Observation::of(&scan, &dead, &descriptors);
        Ok(Sweep {
            observation,
            took: began.elapsed(),
            scan,
            namespaces,
            proc,
            failures: dead.failures,
        })
    }
}
