//! The configuration of `cwkill check`.

use super::{invalid, usage};
use crate::check::threshold::{Threshold, Unit};
use crate::check::{CheckConfig, Thresholds};
use crate::cli::CheckArgs;
use crate::filter::Scope;

impl CheckConfig {
    /// Checks that the arguments make sense together.
    ///
    /// # Errors
    /// It is not valid. The message names the arguments and gives a valid example.
    pub fn from_args(args: CheckArgs) -> Result<Self, clap::Error> {
        let CheckArgs {
            selection,
            warning,
            critical,
            percent_of_limit,
            timeout,
        } = args;
        if warning.is_none() && critical.is_none() {
            return Err(usage(
                "a threshold is missing: give --warning, --critical or both, for example -w 100 -c 500",
            ));
        }
        let given = |threshold: Option<Threshold>| match percent_of_limit {
            true => threshold.map(Threshold::of_limit),
            false => threshold,
        };
        let thresholds = Thresholds {
            warning: given(warning),
            critical: given(critical),
        };
        let limits = [("-w", thresholds.warning), ("-c", thresholds.critical)]
            .map(|(option, threshold)| (option, threshold.and_then(upper_limit)));
        if let [(_, Some((warning, unit))), (_, Some((critical, same)))] = limits
            && unit == same
            && critical < warning
        {
            let percent = percent(unit);
            return Err(usage(&format!(
                "-c {critical}{percent} is below -w {warning}{percent}, so the status would never be WARNING: \
                 give the smaller number to -w, for example -w {critical}{percent} -c {warning}{percent}"
            )));
        }
        for (option, limit) in limits {
            if let Some((limit, Unit::PercentOfLimit)) = limit
                && limit >= 100
            {
                return Err(invalid(&format!(
                    "{option} {limit}% is more than a process can open, unless its limit is lowered meanwhile; \
                     for example -w 50% -c 80%"
                )));
            }
        }
        Ok(CheckConfig {
            scope: Scope::from_args(selection)?,
            thresholds,
            timeout,
        })
    }
}

/// The upper limit of a threshold that has only this, with its unit.
fn upper_limit(threshold: Threshold) -> Option<(u64, Unit)> {
    threshold.upper_limit().map(|limit| (limit, threshold.unit))
}

fn percent(unit: Unit) -> &'static str {
    match unit {
        Unit::Sockets => "",
        Unit::PercentOfLimit => "%",
    }
}
