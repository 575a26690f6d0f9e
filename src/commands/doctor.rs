//! `cwkill doctor`: what works here.

use std::process::ExitCode;

use anyhow::Context;

use super::give_up_all_but;
use crate::cli::DoctorArgs;
use crate::doctor::{self, report};
use crate::injector::MethodName;
use crate::privileges::drop;
use crate::proc::Proc;
use crate::proc::netns::Which;
use crate::terminal::{unless_closed, write_out};

pub(super) fn run(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let mut needed = drop::to_find(&Which::All, true);
    needed.extend(drop::to_act(&MethodName::ALL));
    give_up_all_but(&needed);
    let examination = doctor::examine(&Proc::default())?;
    let written = write_out(|out| match args.json {
        true => report::write_json(&examination, out),
        false => report::write_text(&examination, out),
    });
    unless_closed(written).context("cannot write the findings")?;
    Ok(report::status(&examination).into())
}
