//! Agents and commands: their answers and errors, and other identities.

use std::os::fd::AsRawFd as _;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use libtest_mimic::Trial;
use netns_harness::{
    AgentOptions, Capability, Dial, Drained, End, Family, Host, How, Lab, Options, Recv,
    SocketOption, pattern,
};

use procfs::FromRead as _;
use procfs::process::{Process, Status};

use crate::support::{DEADLINE, has_other_users};

pub fn tests() -> Vec<Trial> {
    crate::tests!("agents":
        errno_is_the_kernels,
        nothing_is_inherited,
        reads_data_then_the_end,
        fills_the_send_buffer,
        sends_until_it_is_stopped,
        a_forgotten_connection_is_answered_with_rst,
        dropped_segments_are_not_received,
        epoll_sees_the_end,
        ends_when_dropped_with_its_children,
        a_dead_agent_is_noticed,
        a_command_runs_on_the_host,
        a_command_keeps_only_the_capabilities_it_is_given,
        another_user_where_there_is_one,
    )
}

fn errno(error: &anyhow::Error) -> Option<i32> {
    error
        .downcast_ref::<std::io::Error>()
        .and_then(std::io::Error::raw_os_error)
}

fn errno_is_the_kernels() -> Result<()> {
    let host = Host::new()?;
    let agent = host.agent("app")?;
    let Err(error) = agent.connect("127.0.0.1:9".parse()?, 1, Dial::default(), DEADLINE) else {
        bail!("connected")
    };
    ensure!(errno(&error) == Some(libc::ECONNREFUSED), "{error:#}");
    let Err(error) = agent.listen("192.0.2.1:80".parse()?, false, 1) else {
        bail!("listens")
    };
    ensure!(errno(&error) == Some(libc::EADDRNOTAVAIL), "{error:#}");
    let Err(error) = agent.close(&[netns_harness::Fd(99)]) else {
        bail!("closed")
    };
    ensure!(
        errno(&error).is_none() && format!("{error:#}").contains("99"),
        "{error:#}"
    );
    Ok(())
}

fn nothing_is_inherited() -> Result<()> {
    // A descriptor that child processes inherit, as a shell may leave it open.
    let (pipe, _other_end) = nix::unistd::pipe()?;
    let inherited = std::fs::read_link(format!("/proc/self/fd/{}", pipe.as_raw_fd()))?;
    let agent = Host::new()?.agent("app")?;
    ensure!(agent.share(&[], 0)?.is_empty());
    for entry in std::fs::read_dir(format!("/proc/{}/fd", agent.pid()))? {
        ensure!(std::fs::read_link(entry?.path())? != inherited);
    }
    Ok(())
}

fn one(
    lab: &Lab,
    scenario: &str,
) -> Result<(netns_harness::Leak, netns_harness::Fd, netns_harness::Fd)> {
    let leak = lab.start(scenario, Family::V4, Options::default())?;
    let (Some(app), Some(peer)) = (leak.conns()[0].app_fd, leak.conns()[0].peer_fd) else {
        bail!("no descriptors")
    };
    Ok((leak, app, peer))
}

fn reads_data_then_the_end() -> Result<()> {
    let lab = Lab::new()?;
    let (leak, app, peer) = one(&lab, "unread")?;
    ensure!(leak.app().recv(app, 4, DEADLINE)? == Recv::Data(b"good".to_vec()));
    ensure!(leak.app().recv(app, 4, DEADLINE)? == Recv::Data(b"bye".to_vec()));
    ensure!(leak.app().recv(app, 4, DEADLINE)? == Recv::Eof);
    ensure!(leak.peer().recv(peer, 4, Duration::from_millis(1))? == Recv::Nothing);
    Ok(())
}

fn fills_the_send_buffer() -> Result<()> {
    let lab = Lab::new()?;
    let (leak, app, peer) = one(&lab, "established")?;
    let mut total = 0;
    loop {
        let sent = leak.peer().fill(&[peer], total, 1 << 20)?[0];
        total += sent;
        if sent < 1 << 20 {
            break;
        }
    }
    leak.peer().shutdown(&[peer], How::Write)?;
    let drained = leak.app().drain(&[app], DEADLINE)?;
    let expected = Drained {
        fd: app,
        bytes: total,
        intact: true,
        end: End::Eof,
    };
    ensure!(drained == [expected], "{drained:?} of {total}");
    Ok(())
}

fn sends_until_it_is_stopped() -> Result<()> {
    let lab = Lab::new()?;
    let (leak, app, peer) = one(&lab, "established")?;
    leak.peer()
        .start_sending(&[peer], Duration::from_millis(1))?;
    ensure!(leak.app().recv(app, 1, DEADLINE)? == Recv::Data(vec![pattern(0)]));
    let sent = leak.peer().stop_sending()?[0];
    leak.peer().send(&[peer], b"over")?;
    leak.peer().shutdown(&[peer], How::Write)?;
    let mut received: Vec<u8> = vec![pattern(0)];
    while let Recv::Data(data) = leak.app().recv(app, 1 << 16, DEADLINE)? {
        received.extend(data);
    }
    let expected: Vec<u8> = (0..sent).map(pattern).chain(*b"over").collect();
    ensure!(received == expected, "{} bytes of {sent}", received.len());
    Ok(())
}

fn a_forgotten_connection_is_answered_with_rst() -> Result<()> {
    let lab = Lab::new()?;
    let (leak, app, peer) = one(&lab, "established")?;
    leak.peer().forget(&[peer])?;
    ensure!(leak.app().recv(app, 1, Duration::from_millis(1))? == Recv::Nothing);
    leak.app().send(&[app], b"still there?")?;
    ensure!(leak.app().recv(app, 1, DEADLINE)? == Recv::Failed(libc::ECONNRESET));
    Ok(())
}

fn dropped_segments_are_not_received() -> Result<()> {
    let lab = Lab::new()?;
    let (leak, app, peer) = one(&lab, "established")?;
    leak.peer()
        .set_option(&[peer], SocketOption::DropIncoming(true))?;
    leak.app().send(&[app], b"hello")?;
    ensure!(leak.peer().recv(peer, 9, Duration::from_millis(50))? == Recv::Nothing);
    leak.peer()
        .set_option(&[peer], SocketOption::DropIncoming(false))?;
    ensure!(leak.peer().recv(peer, 9, DEADLINE)? == Recv::Data(b"hello".to_vec()));
    Ok(())
}

fn epoll_sees_the_end() -> Result<()> {
    let lab = Lab::new()?;
    let (leak, app, peer) = one(&lab, "established")?;
    let before = leak.app().poll(app, false, Duration::from_millis(1))?;
    ensure!(!before.readable && !before.read_hangup, "{before:?}");
    leak.peer().shutdown(&[peer], How::Write)?;
    let after = leak.app().poll(app, true, DEADLINE)?;
    ensure!(after.writable, "{after:?}");
    let after = leak.app().poll(app, false, DEADLINE)?;
    ensure!(
        after.readable && after.read_hangup && !after.hangup && !after.error,
        "{after:?}"
    );
    ensure!(leak.app().take_error(app)? == 0);
    Ok(())
}

fn ends_when_dropped_with_its_children() -> Result<()> {
    let host = Host::new()?;
    let agent = host.agent("app")?;
    let mut pids = agent.share(&[], 2)?;
    ensure!(pids.len() == 2);
    pids.push(agent.pid());
    drop(agent);
    crate::support::wait_until("the agent and its children end", || {
        Ok(pids.iter().all(|pid| !is_running(*pid)))
    })
}

/// Whether the process exists and is not a zombie.
fn is_running(pid: u32) -> bool {
    let stat = Process::new(pid.cast_signed()).and_then(|process| process.stat());
    stat.is_ok_and(|stat| stat.state != 'Z')
}

fn a_dead_agent_is_noticed() -> Result<()> {
    let host = Host::new()?;
    let agent = host.agent("app")?;
    ensure!(agent.is_alive());
    agent.kill()?;
    ensure!(!agent.is_alive());
    let Err(error) = agent.take_error(netns_harness::Fd(3)) else {
        bail!("answered")
    };
    ensure!(format!("{error:#}").contains("gone"), "{error:#}");
    Ok(())
}

fn a_command_runs_on_the_host() -> Result<()> {
    let host = Host::new()?;
    let output = host.command("readlink").arg("/proc/self/ns/net").output()?;
    ensure!(String::from_utf8(output.stdout)?.trim() == format!("net:[{}]", host.netns_inode()?));
    let output = host
        .command("sh")
        .args(["-c", "echo $WORD; exit 3"])
        .env("WORD", "one two")
        .output()?;
    ensure!(
        output.status.code() == Some(3) && output.stdout == b"one two\n",
        "{output:?}"
    );
    let output = host.command("no-such-program").output()?;
    ensure!(output.status.code() == Some(127), "{output:?}");
    ensure!(String::from_utf8(output.stderr)?.contains("no-such-program"));
    let Err(error) = host
        .command("sleep")
        .arg("1000")
        .output_within(Duration::from_millis(50))
    else {
        bail!("slept")
    };
    ensure!(error.to_string().contains("did not end"), "{error:#}");
    Ok(())
}

/// The five capability sets of a command that has printed its /proc/self/status.
fn capabilities(output: &std::process::Output) -> Result<[u64; 5]> {
    let status = Status::from_read(&*output.stdout)?;
    let Status {
        capinh,
        capprm,
        capeff,
        capbnd: Some(capbnd),
        capamb: Some(capamb),
        ..
    } = status
    else {
        bail!("an incomplete /proc/self/status: {status:?}")
    };
    Ok([capinh, capprm, capeff, capbnd, capamb])
}

fn a_command_keeps_only_the_capabilities_it_is_given() -> Result<()> {
    let host = Host::new()?;
    let status = || host.command("cat").arg("/proc/self/status");
    for (keep, mask) in [
        (&[][..], 0),
        (
            &[Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW][..],
            (1 << 12) | (1 << 13),
        ),
    ] {
        let sets = capabilities(&status().capabilities(keep).output()?)?;
        ensure!(sets == [mask; 5], "{keep:?}: {sets:x?}");
    }
    Ok(())
}

fn another_user_where_there_is_one() -> Result<()> {
    let host = Host::new()?;
    let command = || host.command("id").arg("-u").uid(65534);
    if !has_other_users()? {
        let Err(error) = command().output() else {
            bail!("became an unmapped user")
        };
        ensure!(
            error.to_string().contains("65534 is not mapped"),
            "{error:#}"
        );
        return Ok(());
    }
    ensure!(command().output()?.stdout == b"65534\n");
    let raw = [Capability::CAP_NET_RAW];
    let status = host
        .command("cat")
        .arg("/proc/self/status")
        .uid(65534)
        .capabilities(&raw)
        .output()?;
    let sets = capabilities(&status)?;
    ensure!(sets == [1 << 13; 5], "{sets:x?}");
    // The agent's /proc entry belongs to the user, as that of any program that the user starts.
    let agent = host.agent_as(&AgentOptions {
        comm: "app".into(),
        uid: Some(65534),
        capabilities: None,
    })?;
    let output = host
        .command("readlink")
        .arg(format!("/proc/{}/fd/0", agent.pid()))
        .uid(65534)
        .output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}
