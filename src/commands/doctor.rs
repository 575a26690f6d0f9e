//! `cwkill doctor`: reports which methods work on this host.

use std::process::ExitCode;

use anyhow::Context;

use super::{drop_capabilities_and_start_threads, proc_with_names, time_and_place};
use crate::bpf::KernelTypes;
use crate::cli::DoctorArgs;
use crate::doctor::{self, tracing::Tracing};
use crate::filter::selectors::Selectors;
use crate::finder::way::{self, NotUsed};
use crate::injector::way::ByIterator;
use crate::model::Method;
use crate::privileges::capabilities;
use crate::proc::netns::NetnsScope;
use crate::report::doctor as report;
use crate::terminal::{columns, ignore_closed_reader, write_out};

pub(super) fn run(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let time_and_place = time_and_place();
    let proc = proc_with_names(&args.host_root, &Selectors::default())?;
    let mut needed = capabilities::to_find(&NetnsScope::All, true, true);
    needed.extend(capabilities::to_act(&Method::ALL));
    let why = |error: NotUsed| format!("{:#}", anyhow::Error::from(error));
    let types = KernelTypes::default();
    let iterator = way::works(&proc, &types).map_err(why);
    let destroyer = ByIterator::works(&proc, &types).map_err(why);
    let tracing = Tracing::examine(&proc);
    drop_capabilities_and_start_threads(&needed, None);
    let examination = doctor::examine(&proc, iterator, destroyer, tracing)?;
    let written = write_out(|out| match args.json {
        true => report::write_json(&examination, &time_and_place, out),
        false => report::write_text(&examination, columns(), out),
    });
    ignore_closed_reader(written).context("cannot write the findings")?;
    Ok(report::status(&examination).into())
}
