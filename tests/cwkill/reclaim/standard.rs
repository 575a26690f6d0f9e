//! Standard input, output and error: a dead socket there is left alone, or replaced by /dev/null.

use anyhow::{Context, Result};
use netns_harness::Lab;
use netns_harness::owners::{Build, Owner};

use super::{descriptors, is_traced, left, links_of, number, reclaim};
use crate::support::{at, cwkill};
use crate::trial::{Need, Test, once};

pub const TESTS: &[Test] = &[
    once!(a_dead_standard_descriptor_is_left_alone),
    once!(with_force_it_is_replaced_and_never_free),
    once!(the_command_that_closes_the_socket_keeps_to_it),
    once!(an_owner_without_dev_null_keeps_its_descriptors),
    once!(an_owner_at_its_limit_gets_room_first),
    once!(a_seccomp_filter_is_asked_before).needs(Need::RootOfTheMachine),
];

/// A service as inetd starts it: its socket is its standard input, output and error, and dead.
fn service(lab: &Lab, build: Build, mode: &str) -> Result<Owner> {
    let mut owner = Owner::start(lab.app_host(), build, mode, 2)?;
    assert_eq!(owner.order_fds("inetd")?, [0, 1, 2]);
    Ok(owner)
}

/// The next file that the owner opens is not its output.
#[track_caller]
fn output_is_not_lost(owner: &mut Owner) -> Result<()> {
    let answer = owner.order("log")?;
    let numbers: Vec<i64> = answer
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    assert!(numbers[0] > 2, "a file is descriptor {}", numbers[0]);
    assert_eq!(numbers[1], 0, "the output went into the file");
    owner.report()?;
    Ok(())
}

fn a_dead_standard_descriptor_is_left_alone() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = service(&lab, Build::Plain, "idle")?;
    let more = owner.leak(2)?;
    let before = links_of(owner.pid())?;
    let dry = descriptors(&reclaim(&lab, owner.pid(), "-n --json")?);
    let ran = reclaim(&lab, owner.pid(), "--json")?.exits(4);
    let acted = descriptors(&ran);
    for said in [&dry, &acted] {
        assert_eq!(said.len(), 5);
        for (one, fd) in said.iter().zip(0..) {
            let is_standard = fd <= 2;
            let code = if is_standard {
                "standard-descriptor"
            } else {
                "null"
            };
            assert_eq!(at(one, "/reason_code"), code, "{one}");
        }
    }
    assert_eq!(at(&dry[0], "/closable"), "false");
    assert_eq!(number(&ran.json(), "/summary/freed"), 2);
    assert_eq!(number(&ran.json(), "/summary/skipped"), 3);
    let mut after = links_of(owner.pid())?;
    after.extend(more.iter().map(|fd| (*fd, before[fd].clone())));
    assert_eq!(after, before);
    output_is_not_lost(&mut owner)?;
    let table = reclaim(&lab, owner.pid(), "")?.exits(4).stdout;
    for text in ["standard input, output or error", "puts /dev/null there"] {
        assert_eq!(table.matches(text).count(), 3, "{table}");
    }
    let plan = reclaim(&lab, owner.pid(), "-n --reclaim-force")?.exits(0);
    let planned = plan.stdout.matches("yes, replaced by /dev/null").count();
    assert_eq!(planned, 3, "{plan:?}");
    Ok(())
}

fn with_force_it_is_replaced_and_never_free() -> Result<()> {
    for build in [Build::Plain, Build::StaticStripped] {
        for mode in ["idle", "works"] {
            let lab = Lab::new()?;
            let mut owner = service(&lab, build, mode)?;
            let more = owner.leak(2)?;
            let mut before = links_of(owner.pid())?;
            let ran = reclaim(&lab, owner.pid(), "--reclaim-force --json")?.exits(0);
            let said = descriptors(&ran);
            for (one, fd) in said.iter().zip(0..) {
                let outcome = if fd <= 2 { "replaced" } else { "freed" };
                assert_eq!(at(one, "/outcome"), outcome, "{one}");
            }
            assert_eq!(number(&ran.json(), "/summary/replaced"), 3);
            assert_eq!(number(&ran.json(), "/owners/0/replaced"), 3);
            assert_eq!(number(&ran.json(), "/summary/freed"), 2);
            // Nothing else has changed: no descriptor and no memory of cwkill is left.
            before.retain(|fd, _| !more.contains(fd));
            for fd in 0..=2 {
                before.insert(fd, "/dev/null".into());
            }
            assert_eq!(links_of(owner.pid())?, before, "{build:?} {mode}");
            output_is_not_lost(&mut owner)?;
            reclaim(&lab, owner.pid(), "--reclaim-force")?.exits(1);
        }
    }
    Ok(())
}

fn the_command_that_closes_the_socket_keeps_to_it() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "idle", 2)?;
    assert_eq!(owner.order_fds("inetd stuck")?, [0, 1, 2]);
    let line = format!(
        "--pid {} --method destroy --reclaim --reclaim-age 0s --stop-limit 5s --json",
        owner.pid()
    );
    let plan = cwkill(&lab, &format!("{line} -n"))?.exits(0).sockets();
    let code = |socket, pointer: &str| at(socket, &format!("{pointer}/2/reason_code"));
    assert_eq!(code(&plan[0], "/reclaim_plan"), "standard-descriptor");
    let ran = cwkill(&lab, &line)?.exits(4);
    let sockets = ran.sockets();
    assert_eq!(at(&sockets[0], "/result/outcome"), "closed");
    assert_eq!(at(&sockets[0], "/result/descriptor_open"), "true");
    assert_eq!(
        code(&sockets[0], "/result/descriptors"),
        "standard-descriptor"
    );
    output_is_not_lost(&mut owner)?;

    let mut owner = Owner::start(lab.app_host(), Build::Plain, "idle", 2)?;
    owner.order_fds("inetd stuck")?;
    let line = format!(
        "--pid {} --method destroy --reclaim --reclaim-force --stop-limit 5s --json",
        owner.pid()
    );
    let ran = cwkill(&lab, &line)?.exits(0);
    assert_eq!(number(&ran.json(), "/reclaim/summary/replaced"), 3);
    assert_eq!(at(&ran.sockets()[0], "/result/descriptor_open"), "false");
    output_is_not_lost(&mut owner)
}

fn an_owner_without_dev_null_keeps_its_descriptors() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = service(&lab, Build::Plain, "chroot")?;
    let ran = reclaim(&lab, owner.pid(), "--reclaim-force --json")?.exits(4);
    left(&ran, &mut owner, &[0, 1, 2], "skipped", "has no /dev/null")?;
    for one in descriptors(&ran) {
        assert_eq!(at(&one, "/reason_code"), "no-dev-null");
    }
    assert!(!is_traced(owner.pid()));
    output_is_not_lost(&mut owner)
}

/// It cannot open a file before others of its descriptors are closed.
fn an_owner_at_its_limit_gets_room_first() -> Result<()> {
    let lab = Lab::new()?;
    let program = Owner::program(Build::Plain)?;
    let by = ["prlimit", "--nofile=3200:3200"];
    let mut owner = Owner::start_through(lab.app_host(), &by, &program, "idle", 2)?;
    owner.order_fds("inetd")?;
    owner.leak(1)?;
    owner.order("fill")?;
    let ran = reclaim(&lab, owner.pid(), "--reclaim-force --json")?.exits(0);
    assert_eq!(number(&ran.json(), "/summary/replaced"), 3);
    assert_eq!(number(&ran.json(), "/summary/freed"), 1);
    output_is_not_lost(&mut owner)
}

fn a_seccomp_filter_is_asked_before() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = service(&lab, Build::Plain, "no-open")?;
    let ran = reclaim(&lab, owner.pid(), "--reclaim-force --json")?.exits(4);
    let why = "forbids the system calls that put /dev/null in its place";
    left(&ran, &mut owner, &[0, 1, 2], "skipped", why)?;
    assert!(owner.is_alive());
    owner.report().context("it was harmed")?;
    Ok(())
}
