//! Dead descriptors by their local port, and what is said about those that are kept.

use anyhow::Result;
use netns_harness::{Family, Lab, Leak};

use super::{descriptors, number};
use crate::support::{Ran, alone, at, cwkill, cwkill_outside, lab};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(a_dead_socket_keeps_its_local_port),
    each_family!(a_young_descriptor_has_a_time_and_a_command),
    once!(a_port_alone_is_that_of_this_namespace),
    once!(a_plain_close_names_the_next_command),
];

/// Two applications, on ports 8080 and 8001.
fn two_leaks(family: Family) -> Result<(Lab, Leak, Leak)> {
    let (lab, first) = lab("drained", family, 3)?;
    let second = lab.start("drained", family, alone(8001, 2))?;
    Ok((lab, first, second))
}

/// Runs `cwkill reclaim` on a port alone. It exits with `code`, or with 4 because a process of the machine could not be read.
fn of_port(lab: &Lab, line: &str, code: i32) -> Result<Ran> {
    let ran = cwkill(lab, &format!("reclaim --stop-limit 5s {line}"))?;
    assert!(
        matches!(ran.code, Some(4)) || ran.code == Some(code),
        "{ran:?}"
    );
    Ok(ran)
}

/// After every method that closes, and after the peer has reset the connection.
fn a_dead_socket_keeps_its_local_port(family: Family) -> Result<()> {
    for method in ["shutdown", "destroy", "rst"] {
        let (lab, first, second) = two_leaks(family)?;
        // The peers still answer a FIN, so every socket ends.
        cwkill(
            &lab,
            &format!("--all --allow-spin --method {method} --grace 5s"),
        )?
        .exits(0);
        let listed = of_port(&lab, "--port 8080 -n --reclaim-age 0s --json", 0)?;
        let fds = descriptors(&listed);
        assert_eq!(fds.len(), 3, "{method}: {listed:?}");
        for one in &fds {
            assert_eq!(at(one, "/pid"), first.app().pid().to_string());
            assert_eq!(at(one, "/local/port"), "8080");
        }
        assert_eq!(
            descriptors(&of_port(&lab, "--port 9,10-20 -n --json", 1)?).len(),
            0
        );
        let pid = first.app().pid();
        cwkill(&lab, &format!("reclaim --port 8001 --pid {pid} -n"))?.exits(1);
        let freed = of_port(&lab, "--port 8001 --reclaim-age 0s --json", 0)?.json();
        assert_eq!(number(&freed, "/summary/freed"), 2);
        assert_eq!(at(&freed, "/owners/0/pid"), second.app().pid().to_string());
        assert_eq!(
            descriptors(&of_port(&lab, "--port 8080 -n --json", 0)?).len(),
            3
        );
    }
    Ok(())
}

fn a_young_descriptor_has_a_time_and_a_command(family: Family) -> Result<()> {
    let (lab, first, _second) = two_leaks(family)?;
    let pid = first.app().pid();
    let next = format!("in 1 minute: cwkill reclaim --pid {pid}");
    let dry = cwkill(&lab, "--port 8080 --reclaim -n")?.exits(0);
    assert!(dry.stdout.contains("3 would be kept: "), "{dry:?}");
    let ran = cwkill(&lab, "--port 8080 --allow-spin --reclaim")?.exits(4);
    assert!(ran.stdout.contains("3 kept: "), "{ran:?}");
    assert_eq!(ran.stdout.matches(&next).count(), 1, "{ran:?}");

    // The sockets are dead, so nothing matches any more. That is not all.
    let line = format!("0 sockets matched: 0 closed; 3 dead descriptors in leaky-app/{pid}");
    // A command that would free nothing is not printed, but when it will.
    for again in ["--port 8080 --reclaim".to_owned(), format!("--pid {pid}")] {
        let ran = cwkill(&lab, &again)?.exits(1);
        let line = format!("{line}, none can be closed now");
        assert!(ran.stdout.contains(&line), "{ran:?}");
        assert!(ran.stdout.contains(": 3 would be kept: "), "{ran:?}");
        assert!(
            ran.stdout
                .contains(&format!(": cwkill reclaim --pid {pid}\n")),
            "{ran:?}"
        );
    }
    let ran = cwkill(&lab, "--port 8080 --reclaim --reclaim-age 0s")?.exits(1);
    let line = format!("{line}: cwkill reclaim --pid {pid} --reclaim-age 0s");
    assert!(ran.stdout.contains(&line), "{ran:?}");
    let document = cwkill(&lab, "--port 8080 --reclaim --json")?
        .exits(1)
        .json();
    assert_eq!(number(&document, "/dead_descriptors/0/dead"), 3);
    assert_eq!(number(&document, "/dead_descriptors/0/closable"), 0);
    assert_eq!(at(&document, "/dead_descriptors/0/pid"), pid.to_string());
    assert_eq!(at(&document, "/dead_descriptors/1"), "(nothing there)");

    let later = cwkill(&lab, &format!("reclaim --pid {pid} --json"))?
        .exits(4)
        .json();
    assert_eq!(at(&later, "/advice/0/advice_code"), "too-young");
    assert_eq!(at(&later, "/advice/0/kept"), "3");
    let command = at(&later, "/advice/0/commands/0");
    assert_eq!(command, format!("cwkill reclaim --pid {pid}"));
    // The command of a run with another age has it too.
    let line = format!("reclaim --pid {pid} --reclaim-age 2h --json");
    let command = at(
        &cwkill(&lab, &line)?.exits(4).json(),
        "/advice/0/commands/0",
    );
    assert_eq!(
        command,
        format!("cwkill reclaim --pid {pid} --reclaim-age 2h")
    );
    let freed = of_port(&lab, "--port 8080 --reclaim-age 0s --json", 0)?.json();
    assert_eq!(number(&freed, "/summary/freed"), 3);
    Ok(())
}

fn a_port_alone_is_that_of_this_namespace() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 2)?;
    let port = alone(18_431, 3);
    let elsewhere = lab.start("drained", Family::V4, port)?;
    cwkill(&lab, "--all --allow-spin --method destroy")?.exits(0);
    let outside = |line: &str| -> Result<Ran> {
        let output = cwkill_outside().args(line.split(' ')).output()?;
        Ran::of(line, output)
    };
    let ran = outside("reclaim --port 18431 -n --json")?;
    assert!(descriptors(&ran).is_empty(), "{ran:?}");
    let ran = ran.complains("3 more dead descriptors of that port in other network namespaces");
    assert_eq!(number(&ran.json(), "/in_other_namespaces"), 3);
    let table = outside("reclaim --port 18431 -n")?.stdout;
    assert!(table.contains("; 3 in other network namespaces"), "{table}");
    let pid = elsewhere.app().pid();
    let line = format!("reclaim --port 18431 --pid {pid} -n --json");
    assert_eq!(descriptors(&outside(&line)?.exits(0)).len(), 3);
    assert!(leak.app().is_alive());
    Ok(())
}

/// `--reclaim` would match nothing any more.
fn a_plain_close_names_the_next_command() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 2)?;
    let pid = leak.app().pid();
    cwkill(&lab, "--port 8080 --allow-spin")?
        .exits(0)
        .complains(&format!(
            "or you, after 1 minute: `cwkill reclaim --pid {pid}`"
        ));
    Ok(())
}
