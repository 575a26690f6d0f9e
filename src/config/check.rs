//! The configuration of `cwkill check`.

use super::{invalid, usage};
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
        } = args;
        if critical < warning {
            return Err(usage(&format!(
                "-c {critical} is below -w {warning}, so nothing would ever be WARNING: \
                 for example -w {critical} -c {warning}"
            )));
        }
        if percent_of_limit && critical > 100 {
            return Err(invalid(&format!(
                "-c {critical} percent of a limit is never reached; for example -w 50 -c 80"
            )));
        }
        Ok(CheckConfig {
            scope: Scope::from_args(selection)?,
            thresholds: Thresholds { warning, critical },
            percent_of_limit,
        })
    }
}
