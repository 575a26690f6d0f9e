//! `cwkill doctor`: reports which methods work on this host.

use std::process::ExitCode;

use anyhow::Context;

use super::{drop_capabilities_and_start_threads, time_and_place};
use crate::cli::DoctorArgs;
use crate::doctor;
use crate::finder::way;
use crate::model::Method;
use crate::privileges::capabilities;
use crate::proc::ProcFs;
use crate::proc::netns::NetnsScope;
use crate::report::doctor as report;
use crate::terminal::{unless_closed, write_out};

pub(super) fn run(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let time_and_place = time_and_place();
    let mut needed = capabilities::to_find(&NetnsScope::All, true, true);
    needed.extend(capabilities::to_act(&Method::ALL));
    let proc = ProcFs::default();
    let iterator = way::works(&proc).map_err(|error| format!("{:#}", anyhow::Error::from(error)));
    drop_capabilities_and_start_threads(&needed);
    let examination = doctor::examine(&proc, iterator)?;
    let written = write_out(|out| match args.json {
        true => report::write_json(&examination, &time_and_place, out),
        false => report::write_text(&examination, out),
    });
    unless_closed(written).context("cannot write the findings")?;
    Ok(report::status(&examination).into())
}
