//! A single sweep, reported as a listing is, with the acts of the policies.

use std::time::SystemTime;

use crate::cli::DaemonArgs;
use crate::commands::close::conclude;
use crate::commands::{say_notes, time_and_place};
use crate::daemon::config::DaemonConfig;
use crate::daemon::lock::{self, DaemonLock, LockError};
use crate::daemon::metrics::{LastSweep, Metrics};
use crate::daemon::observation::Changes;
use crate::finder::{self, tracked};
use crate::injector::plan;
use crate::report::{ExitStatus, Run};
use crate::terminal::{Terminal, say};

use super::policies::{Policies, Success};
use super::settings::Settings;
use super::sweep::Sweep;

pub(super) fn run(args: &DaemonArgs, settings: &Settings) -> anyhow::Result<ExitStatus> {
    let time_and_place = time_and_place();
    let config = settings.config.clone();
    let (config, lock) = with_own_policies(config)?;
    let mut sweeper = super::prepare(args, settings)?;
    let terminal = Terminal::new(config.acts(), false)?;
    let sweep = sweeper.sweep()?;
    terminal.aside(|| {
        say_notes(sweeper.history.take_notes());
        say_notes(&sweep.failures);
    });
    let mut metrics = Metrics::of_one_sweep();
    let Sweep {
        mut scan,
        namespaces,
        proc,
        observation,
        took,
        ..
    } = sweep;
    metrics.add(
        LastSweep {
            observation,
            at: SystemTime::now(),
            took,
        },
        Changes::default(),
    );
    let mut policies = Policies::open(&config, &lock::directory());
    policies.sweep(&scan, &proc, &sweeper, &terminal);
    // A reader of the listing that waits must keep no daemon from starting.
    drop(lock);
    metrics.policies.clone_from(&policies.numbers);
    finder::sort(&mut scan.targets);
    plan::decide(&mut scan, &sweeper.config.policy, &sweeper.privileges);
    let mut run = Run::new(scan);
    // Only if it would be said that nothing is stuck.
    if run.scan.targets.is_empty() {
        tracked::count(&mut run.scan);
    }
    let listed = conclude(
        &mut run,
        &time_and_place,
        &sweeper.config,
        &namespaces,
        &proc,
        terminal,
        None,
    )?;
    // After the listing, which a directory that cannot be used must not hold back.
    if let (Some(textfile), Some(text)) = (&settings.textfile, metrics.text_for_collector()) {
        let written = textfile.write(&text);
        written.map_err(|error| settings.textfile_error(&error))?;
    }
    Ok(match policies.success() {
        Success::AsWanted => listed,
        Success::NotAllClosed => ExitStatus::NotAllClosed,
        Success::NothingDone => ExitStatus::Impossible,
    })
}

/// The configuration, and the lock if its policies act. While a daemon runs, they are for it alone: they are taken out.
///
/// # Errors
/// The state directory cannot be used, so it cannot be known what was done before.
fn with_own_policies(
    config: DaemonConfig,
) -> Result<(DaemonConfig, Option<DaemonLock>), LockError> {
    if !config.acts() {
        return Ok((config, None));
    }
    match DaemonLock::take(&lock::directory()) {
        Ok(lock) => Ok((config, Some(lock))),
        Err(error @ LockError::Locked { .. }) => {
            say(format_args!("no policy is carried out: {error}"));
            let without = DaemonConfig {
                policies: Vec::new(),
                ..config
            };
            Ok((without, None))
        }
        Err(error) => Err(error),
    }
}
