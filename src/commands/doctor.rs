//! `cwkill doctor`: reports which methods work on this host.

use std::process::ExitCode;

use anyhow::Context;

use super::drop_capabilities_and_start_threads;
use crate::cli::DoctorArgs;
use crate::doctor;
use crate::model::Method;
use crate::privileges::capabilities;
use crate::proc::ProcFs;
use crate::proc::netns::NetnsScope;
use crate::report::doctor as report;
use crate::terminal::{unless_closed, write_out};

pub(super) fn run(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let mut needed = capabilities::to_find(&NetnsScope::All, true, true);
    needed.extend(capabilities::to_act(&Method::ALL));
    drop_capabilities_and_start_threads(&needed);
    let examination = doctor::examine(&ProcFs::default())?;
    let written = write_out(|out| match args.json {
        true => report::write_json(&examination, out),
        false => report::write_text(&examination, out),
    });
    unless_closed(written).context("cannot write the findings")?;
    Ok(report::status(&examination).into())
}
