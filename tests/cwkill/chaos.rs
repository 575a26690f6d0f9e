//! Connections open, get stuck, are closed and open again on the same 4-tuples while cwkill runs in a loop. Connections
//! that were not stuck must carry all their bytes. Killers that are wrong on purpose show that the test can fail.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use netns_harness::chaos::{self, Killer, METHODS, Options, Report};
use netns_harness::{Family, Nat};

use crate::support::CWKILL;
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(no_bystander_is_lost).slow(),
    once!(half_closed_streams_live_under_the_minimum_age).slow(),
    each_family!(no_bystander_is_lost_through_a_gateway).slow(),
    once!(a_killer_on_a_gateway_that_ignores_the_state_is_detected).slow(),
    once!(a_killer_that_ignores_the_state_is_detected).slow(),
    once!(a_killer_by_stale_addresses_is_detected).slow(),
    once!(a_killer_of_listeners_is_detected).slow(),
    once!(a_killer_of_nothing_is_detected).slow(),
];

/// Acts of each method in each family.
const ACTS: u64 = 100;

/// Acts of each method under a minimum age, and half-closed streams that finish meanwhile.
const YOUNG_ACTS: u64 = 10;
const STREAMS: u64 = 21;

/// Acts of each killer on a gateway. An idle connection must be five seconds old.
const GATEWAY_ACTS: u64 = 50;

/// Longest duration of a run. It ends as soon as it has its acts, on an idle machine after a twentieth of this.
const SECONDS: u64 = 300;

fn options(seconds: u64) -> Options {
    Options {
        time: Duration::from_secs(seconds),
        connections: 100,
        ..Options::default()
    }
}

fn cwkill(method: &str, options: &Options) -> Killer {
    Killer::cwkill(Path::new(CWKILL), method, options.ports(), options.min_age)
}

#[track_caller]
fn faultless(report: &Report) {
    let faults = report.faults();
    assert!(faults.is_empty(), "{faults:?}: {report}");
}

#[track_caller]
fn cleared(report: &Report) {
    faultless(report);
    // A killer that acts too late hits another connection on the same addresses.
    // A count and not a median: on a busy machine most gaps are longer.
    assert!(
        report.reused_within(Duration::from_millis(10)) > 500,
        "{report}"
    );
}

fn no_bystander_is_lost(family: Family) -> Result<()> {
    let options = Options {
        family,
        acts: Some(ACTS),
        ..options(SECONDS)
    };
    let killers = METHODS.map(|method| cwkill(method, &options));
    cleared(&chaos::run(&options, &killers)?);
    Ok(())
}

fn half_closed_streams_live_under_the_minimum_age() -> Result<()> {
    let options = Options {
        min_age: Some(Duration::from_secs(1)),
        acts: Some(YOUNG_ACTS),
        streams: Some(STREAMS),
        ..options(2 * SECONDS)
    };
    let killers = METHODS.map(|method| cwkill(method, &options));
    let report = chaos::run(&options, &killers)?;
    faultless(&report);
    assert!(report.streams() >= STREAMS, "{report}");
    Ok(())
}

/// `cwkill gateway --cut` runs on a router with NAT.
fn no_bystander_is_lost_through_a_gateway(family: Family) -> Result<()> {
    let options = Options {
        family,
        acts: Some(GATEWAY_ACTS),
        gateway: Some(Nat::Both),
        ..options(SECONDS)
    };
    let killers = Killer::gateway(Path::new(CWKILL), options.ports());
    faultless(&chaos::run(&options, &killers)?);
    Ok(())
}

fn a_killer_on_a_gateway_that_ignores_the_state_is_detected() -> Result<()> {
    let line = [CWKILL, "gateway", "--all", "--cut", "--active"];
    let options = Options {
        losses: Some(1),
        gateway: Some(Nat::Both),
        ..options(SECONDS)
    };
    let report = chaos::run(&options, &[Killer::other("active", line)])?;
    assert!(!report.losses.is_empty(), "{report}");
    Ok(())
}

/// Runs a wrong killer, at most until a bystander is lost.
fn is_detected(seconds: u64, name: &str, script: &str) -> Result<Report> {
    let killer = Killer::other(name, ["sh", "-c", script]);
    let options = Options {
        losses: Some(1),
        ..options(seconds)
    };
    let report = chaos::run(&options, &[killer])?;
    assert!(!report.faults().is_empty(), "not detected: {report}");
    assert!(report.server_alive, "{report}");
    Ok(report)
}

fn a_killer_that_ignores_the_state_is_detected() -> Result<()> {
    let report = is_detected(SECONDS, "ss -K", "ss -K -tn sport = :8080")?;
    assert!(!report.losses.is_empty(), "{report}");
    assert_eq!(report.listeners, 2);
    Ok(())
}

/// Finds stuck sockets as `cwkill` does, and then kills whichever sockets have their addresses by then.
fn a_killer_by_stale_addresses_is_detected() -> Result<()> {
    let script = "\
        filter=$(ss -Htn state close-wait sport = :8080 | head -n 30 |
            while read -r _ _ _ peer _; do printf ' or dst %s' \"$peer\"; done)
        sleep 0.02
        ss -K -tn sport = :8080 and \"( ${filter# or } )\"";
    let report = is_detected(SECONDS, "stale", script)?;
    assert!(!report.losses.is_empty(), "{report}");
    assert_eq!(report.listeners, 2);
    Ok(())
}

fn a_killer_of_listeners_is_detected() -> Result<()> {
    let report = is_detected(2, "ss -Kl", "ss -K -tnl sport = :8080")?;
    assert_eq!(report.listeners, 1);
    Ok(())
}

fn a_killer_of_nothing_is_detected() -> Result<()> {
    let elsewhere = Options {
        port: 9000,
        ..options(2)
    };
    let report = chaos::run(&options(2), &[cwkill("destroy", &elsewhere)])?;
    assert_eq!(report.losses.len(), 0);
    assert_eq!(
        report.faults(),
        vec!["destroy acted on 0 sockets, fewer than 1".to_owned()]
    );
    Ok(())
}
