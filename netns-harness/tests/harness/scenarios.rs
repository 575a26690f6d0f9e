//! Every scenario in every family, compared with the output of `ss`.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use libtest_mimic::Trial;
use netns_harness::{Family, Lab, Options, Recv, TcpState, check, scenario};

use crate::support::{DEADLINE, has_other_users};

pub fn tests() -> Vec<Trial> {
    let mut tests = crate::tests!("scenarios":
        the_wait_detects_a_wrong_state,
        ss_detects_a_wrong_state,
        an_unknown_scenario_is_named,
        too_many_sockets_are_refused,
        scenarios_share_an_application,
        a_sealed_application_is_not_shared,
        applications_side_by_side_on_one_port,
        labs_side_by_side,
        bystanders_carry_data,
        thousands,
    );
    for scenario in scenario::listed() {
        for family in Family::ALL {
            let name = format!("scenarios::{}::{}", scenario.name, family.name());
            tests.push(crate::test(name, move || {
                reaches_its_state(scenario.name, family)
            }));
        }
    }
    tests
}

fn three() -> Options {
    Options {
        count: 3,
        ..Options::default()
    }
}

fn reaches_its_state(scenario: &str, family: Family) -> Result<()> {
    let lab = Lab::new()?;
    if scenario == "other-user" && !has_other_users()? {
        let Err(error) = lab.start(scenario, family, three()) else {
            bail!("became an unmapped user")
        };
        ensure!(
            error.to_string().contains("65534 is not mapped"),
            "{error:#}"
        );
        return Ok(());
    }
    let leak = lab.start(scenario, family, three())?;
    ensure!(leak.conns().len() == 3);
    check(&lab, &leak, family)
}

fn the_wait_detects_a_wrong_state() -> Result<()> {
    let Err(error) = Lab::new()?.start("must-fail", Family::V4, three()) else {
        bail!("must-fail did not fail")
    };
    let text = format!("{error:#}");
    ensure!(
        text.contains("must-fail: 3 of 3 sockets") && text.contains("recv_q: 0"),
        "{text}"
    );
    Ok(())
}

fn ss_detects_a_wrong_state() -> Result<()> {
    let lab = Lab::new()?;
    let leak = lab.prepare("must-fail", Family::V4, three())?;
    let Err(error) = check(&lab, &leak, Family::V4) else {
        bail!("ss detected nothing wrong in must-fail")
    };
    ensure!(error.to_string().contains("recv_q: 0"), "{error:#}");
    Ok(())
}

fn an_unknown_scenario_is_named() -> Result<()> {
    let Err(error) = Lab::new()?.start("unred", Family::V4, three()) else {
        bail!("started")
    };
    ensure!(
        error.to_string().contains("`unred`") && error.to_string().contains("unread"),
        "{error:#}"
    );
    Ok(())
}

fn too_many_sockets_are_refused() -> Result<()> {
    let options = Options {
        count: 100_000_000,
        ..Options::default()
    };
    let Err(error) = Lab::new()?.start("unread", Family::V4, options) else {
        bail!("started")
    };
    ensure!(error.to_string().contains("RLIMIT_NOFILE"), "{error:#}");
    Ok(())
}

fn scenarios_share_an_application() -> Result<()> {
    let lab = Lab::new()?;
    let leaks = ["unread", "established", "forked", "not-accepted"]
        .map(|name| lab.start(name, Family::Mapped, three()));
    let leaks = leaks.into_iter().collect::<Result<Vec<_>>>()?;
    for leak in &leaks {
        ensure!(leak.app().pid() == leaks[0].app().pid());
        check(&lab, leak, Family::Mapped)?;
    }
    Ok(())
}

fn a_sealed_application_is_not_shared() -> Result<()> {
    let lab = Lab::new()?;
    let _queue = lab.start("not-accepted", Family::V4, three())?;
    // accept() of the second scenario would take the connections that must stay in the queue.
    let Err(error) = lab.start("established", Family::V4, three()) else {
        bail!("shared")
    };
    let errno = error
        .downcast_ref::<std::io::Error>()
        .and_then(std::io::Error::raw_os_error);
    ensure!(errno == Some(libc::EADDRINUSE), "{error:#}");
    Ok(())
}

fn applications_side_by_side_on_one_port() -> Result<()> {
    let lab = Lab::new()?;
    let options = Options {
        listen: netns_harness::Listen::Own,
        own: true,
        ..three()
    };
    for family in Family::ALL {
        let one = lab.start("unread", family, options)?;
        let other = lab.start("not-accepted", family, options)?;
        ensure!(one.app().pid() != other.app().pid());
        check(&lab, &one, family)?;
        check(&lab, &other, family)?;
    }
    Ok(())
}

fn labs_side_by_side() -> Result<()> {
    let labs = [Lab::new()?, Lab::new()?];
    let leaks = labs
        .each_ref()
        .map(|lab| lab.start("unread", Family::V4, three()));
    for (lab, leak) in labs.iter().zip(leaks) {
        check(lab, &leak?, Family::V4)?;
    }
    ensure!(labs[0].app_host().netns_inode()? != labs[1].app_host().netns_inode()?);
    Ok(())
}

fn bystanders_carry_data() -> Result<()> {
    let lab = Lab::new()?;
    let leak = lab.start("established", Family::V6, three())?;
    for conn in leak.conns() {
        let (Some(app), Some(peer)) = (conn.app_fd, conn.peer_fd) else {
            bail!("no descriptors: {conn:?}")
        };
        leak.peer().send(&[peer], b"ping")?;
        ensure!(leak.app().recv(app, 100, DEADLINE)? == Recv::Data(b"ping".to_vec()));
        leak.app().send(&[app], b"pong")?;
        ensure!(leak.peer().recv(peer, 100, DEADLINE)? == Recv::Data(b"pong".to_vec()));
        ensure!(leak.peer().recv(peer, 100, Duration::from_millis(1))? == Recv::Nothing);
    }
    Ok(())
}

fn thousands() -> Result<()> {
    let lab = Lab::new()?;
    for name in ["drained", "not-accepted"] {
        let leak = lab.start(
            name,
            Family::V6,
            Options {
                count: 3000,
                ..Options::default()
            },
        )?;
        ensure!(leak.conns().len() == 3000);
    }
    let sockets = lab.app_host().sockets()?;
    let stuck = sockets
        .iter()
        .filter(|socket| socket.state == TcpState::CloseWait)
        .count();
    ensure!(stuck == 6000, "{stuck}");
    Ok(())
}
