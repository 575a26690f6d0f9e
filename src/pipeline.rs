//! The pipeline: find, diagnose, plan, inject, verify, as one call without a terminal, a clock or a
//! global in it.

use std::path::PathBuf;

use anyhow::Context;

use crate::config::{Action, Config};
use crate::finder::netns::Netns;
use crate::finder::owners::Proc;
use crate::finder::sock_diag::SockDiag;
use crate::finder::{self, Found};
use crate::injector::ladder::{self, Outcome, Rules, Surroundings, Verdict};
use crate::injector::{self};
use crate::plan::{self, Plan};
use crate::privileges::Privileges;

/// What was found, planned and done: all that a report needs.
#[derive(Debug)]
pub struct Run {
    /// The network namespace it happened in.
    pub netns: Netns,
    /// What matched.
    pub found: Found,
    /// What was planned for each socket of `found`.
    pub plans: Vec<Plan>,
    /// What became of each; `None` when nothing was to be done.
    pub deeds: Option<Vec<Deed>>,
}

/// What became of one socket.
#[derive(Debug)]
pub struct Deed {
    /// The outcome.
    pub outcome: Outcome,
    /// Descriptors of the closed socket that are still open in its owners: indices in
    /// [`finder::Socket::owners`]. Only closing them frees them.
    pub open_descriptors: Vec<usize>,
}

/// Runs the pipeline as far as `config` wants it, in the network namespace of the calling thread.
///
/// # Errors
/// Nothing can be found or nothing can be acted on at all; what happens to a single socket is in
/// its outcome.
pub fn run(config: &Config, proc: &Proc, surroundings: &dyn Surroundings) -> anyhow::Result<Run> {
    let netns = Netns::of_this_thread(&PathBuf::from("/run/netns"))
        .context("cannot tell the network namespace")?;
    let mut diag = SockDiag::open()
        .context("cannot open a sock_diag socket (is CONFIG_INET_DIAG in this kernel?)")?;
    let found = finder::find(&mut diag, proc, &config.selectors)?;
    let plans = plan::build(&found, &config.policy, &Privileges::of_this_thread()?);
    let mut run = Run {
        netns,
        found,
        plans,
        deeds: None,
    };
    if config.action != Action::Act {
        return Ok(run);
    }
    let mut methods = injector::methods(&config.policy.methods, proc)
        .context("cannot open a second sock_diag socket")?;
    let rules = Rules {
        grace: config.grace,
        discard_unsent: config.policy.discard_unsent,
        selectors: &config.selectors,
    };
    let outcomes = ladder::climb(
        &run.found,
        &run.plans,
        &mut methods,
        &mut diag,
        rules,
        surroundings,
    )
    .context("lost contact with the kernel while acting; list again to see what is left")?;
    run.deeds = Some(account(&run.found, outcomes, proc));
    Ok(run)
}

/// Adds to every outcome which descriptors of the dead socket are still open.
fn account(found: &Found, outcomes: Vec<Outcome>, proc: &Proc) -> Vec<Deed> {
    let mut deeds: Vec<Deed> = outcomes
        .into_iter()
        .map(|outcome| Deed {
            outcome,
            open_descriptors: Vec::new(),
        })
        .collect();
    let mut asked = vec![Vec::new(); found.processes.len()];
    for (at, deed) in deeds.iter().enumerate() {
        let socket = &found.sockets[at];
        if let (Verdict::Closed(_), Some(inode)) = (&deed.outcome.verdict, socket.inode) {
            for (owner, held) in socket.owners.iter().enumerate() {
                asked[held.process].push((held.fd, inode, (at, owner)));
            }
        }
    }
    for (at, owner) in proc.still_held(&found.processes, asked) {
        deeds[at].open_descriptors.push(owner);
    }
    deeds
}
