//! What works here: every method is tried, through the ladder that runs it in earnest, on connections of cwkill's own over
//! loopback; what a trial cannot show is read or counted.
//!
//! [`host`] reads and counts, [`trials`] tries, [`advice`] draws the conclusions, a [`row`] a method (both pure).
//! A method has a row once [`advice`] has a function for it; nothing else knows which there are.

pub mod advice;
pub mod host;
pub mod row;
pub mod trials;

use crate::proc::ProcFs;
use advice::Advice;
use host::Host;
use trials::Trials;

/// All that was found out.
#[derive(Debug)]
pub struct Examination {
    /// What was read and counted.
    pub host: Host,
    /// What was tried.
    pub trials: Trials,
    /// What follows.
    pub advice: Advice,
}

/// Looks at everything. Takes a second: a probe waits that long for a quiet socket.
///
/// # Errors
/// The capabilities of this process cannot be read.
pub fn examine(proc: &ProcFs) -> anyhow::Result<Examination> {
    let host = Host::gather(proc)?;
    let trials = Trials::run(proc);
    let advice = Advice::new(&host, &trials);
    Ok(Examination {
        host,
        trials,
        advice,
    })
}
