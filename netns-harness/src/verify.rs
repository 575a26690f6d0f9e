//! Compares a scenario with the output of `ss`, a program that shares no code with the harness.

use anyhow::{Result, bail, ensure};

use crate::lab::{Lab, Leak};
use crate::scenario::Expect;
use crate::ss::SsRow;
use crate::{Family, Options};

/// Builds the scenario in a new lab and compares the output of `ss` with the scenario's expectation.
///
/// # Errors
/// The state is not reached, or `ss` shows another one.
pub fn verify(scenario: &str, family: Family, count: usize) -> Result<()> {
    let lab = Lab::new()?;
    let leak = lab.start(
        scenario,
        family,
        Options {
            count,
            ..Options::default()
        },
    )?;
    check(&lab, &leak, family)
}

/// Compares the output of `ss` for the connections of `leak` with the scenario's expectation.
///
/// # Errors
/// A connection is not as expected; the message names the first one.
pub fn check(lab: &Lab, leak: &Leak, family: Family) -> Result<()> {
    let rows = lab.app_host().ss(&[])?;
    for conn in leak.conns() {
        let Some(row) = rows
            .iter()
            .find(|row| (row.local, row.peer) == (conn.local, conn.peer))
        else {
            bail!(
                "{}: ss does not list {} {}",
                leak.scenario().name,
                conn.local,
                conn.peer
            );
        };
        check_row(&leak.scenario().expect, row, family)?;
        let app = leak.app().pid();
        let owned = row
            .owners
            .iter()
            .find(|owner| owner.pid == app)
            .map(|owner| i64::from(owner.fd));
        let expected = conn.app_fd.map(|fd| i64::from(fd.0));
        ensure!(
            owned == expected,
            "{}: the application's descriptor is {expected:?}, not {row:?}",
            conn.peer
        );
    }
    Ok(())
}

fn check_row(expect: &Expect, row: &SsRow, family: Family) -> Result<()> {
    let mut owners: Vec<u32> = row.owners.iter().map(|owner| owner.pid).collect();
    owners.sort_unstable();
    owners.dedup();
    ensure!(
        expect.fits(row.state, row.recv_q, row.send_q, row.inode)
            && owners.len() == expect.owners
            && row.mapped == (family == Family::Mapped)
            && row.local.is_ipv6() == (family == Family::V6),
        "expected {expect}, {}; ss shows {row:?}",
        family.name()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::find;
    use crate::ss::parse;

    #[test]
    fn every_field_of_an_expectation_is_checked() {
        let good = "CLOSE-WAIT 8 0 10.78.1.1:8080 10.78.1.2:4000 users:((\"leaky-app\",pid=7,fd=5)) ino:9 sk:1";
        let fits = |line: &str, family| {
            check_row(
                &find("unread").unwrap().expect,
                &parse(line).unwrap()[0],
                family,
            )
            .is_ok()
        };
        assert!(fits(good, Family::V4));
        assert!(!fits(good, Family::V6));
        assert!(!fits(good, Family::Mapped));
        for (is, should_not_be) in [
            ("CLOSE-WAIT", "ESTAB"),
            (" 8 0 ", " 7 0 "),
            (" 8 0 ", " 8 1 "),
            ("ino:9", "ino:0"),
            ("fd=5)", "fd=5),(\"other\",pid=8,fd=5)"),
        ] {
            assert!(good.contains(is));
            assert!(
                !fits(&good.replace(is, should_not_be), Family::V4),
                "{should_not_be}"
            );
        }
    }
}
