//! `cwkill doctor`: checks which methods work on this host, and how to make the others work.
//!
//! cwkill opens connections of its own over loopback and runs every method on them with the same engine as for real
//! targets. Facts that no trial can show are read from the system.
//!
//! [`host`] reads the facts, with [`container_names`] and [`confinement`], [`trials`] runs the methods, [`advice`] concludes, with one
//! [`row`] per method, [`tracing`] tries `cwkill trace`, [`meaning`] says what unreadable processes mean, and [`missing`] what the settings of a container lack (all pure).
//! To add a method to the report, add its trials and a function in [`advice`].

pub mod advice;
pub mod confinement;
pub mod container_names;
pub mod host;
pub mod meaning;
pub mod missing;
pub mod row;
pub mod tracing;
pub mod trials;

use crate::injector::way::ByIterator;
use crate::proc::ProcFs;
use advice::Advice;
use host::HostInfo;
use missing::Missing;
use tracing::Tracing;
use trials::Trials;

#[derive(Debug)]
pub struct Examination {
    pub host: HostInfo,
    /// Why the iterator that destroys sockets cannot be loaded.
    pub not_by_iterator: Option<String>,
    pub tracing: Tracing,
    pub trials: Trials,
    pub advice: Advice,
    /// What the settings of the container lack that cwkill runs in.
    pub missing: Missing,
}

/// Examines the host. `iterator`: whether the kernel's iterator over all descriptors works, tried before privileges were dropped.
/// `destroyer`: the iterator that destroys sockets, loaded before. `tracing`: whether `cwkill trace` works, tried before. This takes about
/// a second, because a probe waits until its socket has been quiet for a second.
///
/// # Errors
/// The capabilities of this process cannot be read.
pub fn examine(
    proc: &ProcFs,
    iterator: Result<(), String>,
    destroyer: Result<ByIterator, String>,
    tracing: Tracing,
) -> anyhow::Result<Examination> {
    let host = HostInfo::read(proc, iterator)?;
    let trials = Trials::run(proc, destroyer.as_ref().ok());
    let advice = Advice::new(&host, &trials);
    let missing = Missing::on(&host);
    Ok(Examination {
        missing,
        host,
        not_by_iterator: destroyer.err(),
        tracing,
        trials,
        advice,
    })
}
