//! The backlogs of listeners: whose they are, and whether their slots can be freed.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::process::Child;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use netns_harness::owners::runtimes::Runtime;
use netns_harness::owners::{Build, Owner};
use netns_harness::{
    Agent, Dial, Endpoint, Family, Fd, How, Lab, Leak, Recv, Signal, SocketOption, SsRow, TcpState,
};
use serde_json::{Value, json};

use crate::support::{PATIENCE, Ran, at, count, cwkill, in_state, lab, ran, selects};
use crate::trial::{Need, Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(the_hung_member_of_a_group_is_the_culprit),
    each_family!(two_hung_members_of_a_group_are_not_told_apart),
    each_family!(a_drained_backlog_lets_new_clients_in),
    each_family!(one_live_connection_keeps_a_backlog_from_being_drained),
    each_family!(clients_that_connect_while_a_backlog_is_drained_are_not_lost),
    each_family!(an_owner_that_accepts_while_its_backlog_is_drained_loses_no_client),
    each_family!(only_the_hung_member_of_a_group_is_drained),
    each_family!(fact_accept_takes_the_oldest_connection_and_frees_its_slot),
    once!(an_owner_without_o_nonblock_keeps_one_dead_connection),
    once!(a_stopped_or_traced_owner_is_left_as_it_was),
    each_family!(all_processes_of_a_prefork_server_are_stopped)
        .needs(Need::Language(Runtime::Python)),
    once!(a_request_of_tcp_fast_open_is_a_live_connection).needs(Need::Language(Runtime::Python)),
    once!(a_backlog_whose_owner_accepts_through_io_uring_is_drained).needs(Need::IoUring),
    once!(an_owner_for_which_a_kernel_thread_accepts_is_not_stopped).needs(Need::IoUring),
    once!(the_log_has_each_backlog),
    once!(selectors_choose_the_backlogs),
];

/// A process that listens.
struct Server {
    agent: Agent,
    listener: Fd,
}

impl Server {
    fn row(&self, lab: &Lab) -> Result<SsRow> {
        let link = format!("/proc/{}/fd/{}", self.agent.pid(), self.listener);
        let link = std::fs::read_link(link)?.to_string_lossy().into_owned();
        let mut rows = lab.app_host().ss(&[])?.into_iter();
        let row = rows.find(|row| link == format!("socket:[{}]", row.inode));
        row.with_context(|| format!("ss shows no socket with {link}"))
    }

    /// The number of connections that wait for accept(2).
    fn waiting(&self, lab: &Lab) -> Result<u32> {
        Ok(self.row(lab)?.recv_q)
    }

    /// Accepts everything that waits, and closes it.
    fn serve(&self, lab: &Lab) -> Result<()> {
        let waiting = usize::try_from(self.waiting(lab)?)?;
        let accepted = self.agent.accept(self.listener, waiting, PATIENCE)?;
        self.agent.close(&fds(&accepted))
    }
}

fn fds(ends: &[Endpoint]) -> Vec<Fd> {
    ends.iter().map(|end| end.fd).collect()
}

/// The addresses to listen on and to connect to.
fn addresses(family: Family, port: u16) -> (SocketAddr, SocketAddr) {
    let (listen, connect) = match family {
        Family::V4 => ("0.0.0.0", "127.0.0.1"),
        Family::V6 => ("::", "::1"),
        Family::Mapped => ("::", "127.0.0.1"),
    };
    let address = |ip: &str| SocketAddr::new(ip.parse().expect("an address"), port);
    (address(listen), address(connect))
}

/// Three servers with SO_REUSEPORT at one address, each with a backlog of 64.
struct Group {
    lab: Lab,
    servers: [Server; 3],
    clients: Agent,
    address: SocketAddr,
}

impl Group {
    fn new(family: Family) -> Result<Self> {
        let lab = Lab::new()?;
        let (listen, address) = addresses(family, 8080);
        let server = |name| -> Result<Server> {
            let agent = lab.app_host().agent(name)?;
            let listener = agent.listen_shared(listen, family == Family::V6, 64)?;
            Ok(Server { agent, listener })
        };
        Ok(Group {
            servers: [server("first")?, server("second")?, server("third")?],
            clients: lab.app_host().agent("clients")?,
            lab,
            address,
        })
    }

    /// Lets clients connect and go, until three of them wait at each of the `hung` servers. The other servers serve theirs.
    fn hang(&self, hung: &[usize]) -> Result<()> {
        let mut clients = 0;
        loop {
            let ends = self
                .clients
                .connect(self.address, 5, Dial::default(), PATIENCE)?;
            self.clients.send(&fds(&ends), b"x")?;
            self.clients.shutdown(&fds(&ends), How::Write)?;
            clients += ends.len();
            let mut is_done = true;
            for (index, server) in self.servers.iter().enumerate() {
                match hung.contains(&index) {
                    true => is_done &= server.waiting(&self.lab)? >= 3,
                    false => server.serve(&self.lab)?,
                }
            }
            if is_done {
                break;
            }
            // The kernel spreads them by a hash.
            ensure!(
                clients < 60 * hung.len(),
                "{clients} clients are not enough"
            );
        }
        let mut waiting = 0;
        for &index in hung {
            waiting += usize::try_from(self.servers[index].waiting(&self.lab)?)?;
        }
        self.lab.wait_for(PATIENCE, || {
            Ok(in_state(&self.lab, TcpState::CloseWait)? == waiting)
        })
    }

    fn pid(&self, index: usize) -> u32 {
        self.servers[index].agent.pid()
    }
}

fn pids(listener: &Value) -> Vec<u64> {
    let owners = listener["owners"].as_array().into_iter().flatten();
    owners.filter_map(|owner| owner["pid"].as_u64()).collect()
}

fn the_hung_member_of_a_group_is_the_culprit(family: Family) -> Result<()> {
    let group = Group::new(family)?;
    group.hang(&[1])?;
    let (lab, hung) = (&group.lab, &group.servers[1]);
    let waiting = hung.waiting(lab)?;
    let ran = cwkill(lab, "--json")?.exits(0);
    let sockets = ran.sockets();
    assert_eq!(sockets.len(), usize::try_from(waiting)?);
    for socket in &sockets {
        let listener = &socket["listener"];
        assert_eq!(pids(listener), [u64::from(group.pid(1))], "{socket:#}");
        assert_eq!(listener["waiting"], json!(waiting));
        assert_eq!(listener["backlog"], json!(64));
        assert_eq!(listener["group_size"], json!(3));
        assert_eq!(listener["sockets"][0]["inode"], json!(hung.row(lab)?.inode));
        assert_eq!(listener["sockets"].as_array().map(Vec::len), Some(1));
    }
    let culprit = format!("second/{} does not accept", group.pid(1));
    let backlog = format!("backlog {waiting}/64, one of 3 listening sockets");
    cwkill(lab, "")?.complains(&culprit).complains(&backlog);
    for healthy in [0, 2] {
        selects(lab, &format!("--pid {}", group.pid(healthy)), 0)?;
    }
    selects(lab, &format!("--pid {}", group.pid(1)), sockets.len())?;
    selects(lab, "--process first", 0)?;

    let ran = cwkill(lab, "diagnose --json --sample 100ms")?;
    let document = ran.json();
    let listeners = document["listeners"].as_array().context("listeners")?;
    assert_eq!(listeners.len(), 1, "{document:#}");
    assert_eq!(listeners[0]["owners"], json!([group.pid(1)]));
    assert_eq!(listeners[0]["stalled"], json!(true));
    let place = (at(&listeners[0], "/waiting"), at(&listeners[0], "/backlog"));
    assert_eq!(place, (waiting.to_string(), "64".into()));
    let blamed = document["processes"].as_array().context("processes")?;
    let blamed: Vec<&Value> = blamed.iter().map(|process| &process["pid"]).collect();
    assert!(blamed.contains(&&json!(group.pid(1))), "{document:#}");
    for healthy in [0, 2] {
        assert!(
            !blamed.contains(&&json!(group.pid(healthy))),
            "{document:#}"
        );
    }

    // A run on a healthy member takes nothing of the hung one.
    cwkill(lab, &format!("--pid {}", group.pid(0)))?.exits(1);
    assert_eq!(in_state(lab, TcpState::CloseWait)?, sockets.len());
    cwkill(lab, &format!("--pid {}", group.pid(1)))?
        .exits(0)
        .complains(&format!("backlog {waiting}/64"));
    assert_eq!(in_state(lab, TcpState::CloseWait)?, 0);
    Ok(())
}

fn two_hung_members_of_a_group_are_not_told_apart(family: Family) -> Result<()> {
    let group = Group::new(family)?;
    group.hang(&[0, 2])?;
    let lab = &group.lab;
    let sockets = cwkill(lab, "--json")?.exits(0).sockets();
    let backlogs: Vec<u32> = [0, 2]
        .into_iter()
        .map(|index| group.servers[index].waiting(lab))
        .collect::<Result<_>>()?;
    for socket in &sockets {
        let listener = &socket["listener"];
        let mut owners = pids(listener);
        owners.sort_unstable();
        let mut hung = [group.pid(0), group.pid(2)].map(u64::from);
        hung.sort_unstable();
        assert_eq!(owners, hung, "{socket:#}");
        assert_eq!(listener["group_size"], json!(3));
        assert_eq!(listener["sockets"].as_array().map(Vec::len), Some(2));
        assert_eq!(listener["waiting"], json!(backlogs.iter().sum::<u32>()));
    }
    let undecided = |ran: Ran| {
        let ran = ran
            .exits(4)
            .complains("several listening sockets share the port");
        assert_eq!(ran.json()["possible_matches"], json!(sockets.len()));
        assert!(!ran.stderr.contains("could not be read"), "{ran:?}");
        assert!(!ran.stderr.contains("CAP_SYS_PTRACE"), "{ran:?}");
    };
    undecided(cwkill(lab, &format!("--json --pid {}", group.pid(0)))?);
    selects(lab, &format!("--pid {}", group.pid(1)), 0)?;
    let both = format!("--pid {},{}", group.pid(0), group.pid(2));
    selects(lab, &both, sockets.len())?;
    assert_eq!(in_state(lab, TcpState::CloseWait)?, sockets.len());
    cwkill(lab, &both)?.exits(0);
    assert_eq!(in_state(lab, TcpState::CloseWait)?, 0);
    Ok(())
}

/// A full backlog of this many dead connections: their clients have gone, and cwkill has closed the sockets.
fn full_of_dead(family: Family, connections: usize) -> Result<(Lab, Leak)> {
    let (lab, leak) = lab("full-backlog", family, connections)?;
    nonblocking(&leak)?;
    let slots = format!("{connections} closed connections still take a slot in the backlog");
    cwkill(&lab, "--port 8080")?
        .exits(0)
        .complains(&slots)
        .complains("--drain-backlog");
    assert_eq!(waiting(&lab)?, connections);
    Ok((lab, leak))
}

/// Sets O_NONBLOCK, as most servers do.
fn nonblocking(leak: &Leak) -> Result<()> {
    let listener = leak.pair().listener;
    leak.app()
        .set_option(&[listener], SocketOption::NonBlocking(true))
}

/// The number of connections that wait at the listener of port 8080.
fn waiting(lab: &Lab) -> Result<usize> {
    let rows = lab.app_host().ss(&["sport", "=", ":8080"])?;
    let listener = rows.iter().find(|row| row.state == TcpState::Listen);
    Ok(usize::try_from(
        listener.context("the listener is gone")?.recv_q,
    )?)
}

/// Whether a new client gets a connection before its second SYN is overdue.
fn client_gets_in(leak: &Leak) -> bool {
    let within = Duration::from_millis(1500);
    let address = leak.pair().app_address;
    let ends = leak.peer().connect(address, 1, Dial::default(), within);
    ends.is_ok_and(|ends| leak.peer().close(&fds(&ends)).is_ok())
}

/// The first backlog of the document.
#[track_caller]
fn backlog(ran: &Ran) -> Value {
    let document = ran.json();
    let backlogs = document["backlogs"].as_array().expect("backlogs");
    assert_eq!(backlogs.len(), 1, "{document:#}");
    backlogs[0].clone()
}

/// The flags of the listener's open file, which its owner shares with every duplicate.
fn flags(leak: &Leak) -> Result<String> {
    let fdinfo = format!("/proc/{}/fdinfo/{}", leak.app().pid(), leak.pair().listener);
    let fdinfo = std::fs::read_to_string(fdinfo)?;
    let flags = fdinfo.lines().find(|line| line.starts_with("flags:"));
    Ok(flags.context("no flags")?.to_owned())
}

/// The application accepts everything that waits. Returns the ends of the connections that are not dead.
fn accept_all(leak: &Leak, lab: &Lab) -> Result<Vec<Endpoint>> {
    let accepted = leak
        .app()
        .accept(leak.pair().listener, waiting(lab)?, PATIENCE)?;
    let open: HashSet<SocketAddr> = lab
        .app_host()
        .ss(&[])?
        .into_iter()
        .map(|row| row.peer)
        .collect();
    let is_open = |end: &Endpoint| open.contains(&end.peer);
    Ok(accepted.into_iter().filter(is_open).collect())
}

/// Bytes go from the client to the application and back.
fn talks(leak: &Leak, app: Fd, client: Fd) -> Result<()> {
    leak.peer().send(&[client], b"hello")?;
    assert_eq!(
        leak.app().recv(app, 5, PATIENCE)?,
        Recv::Data(b"hello".into())
    );
    leak.app().send(&[app], b"again")?;
    assert_eq!(
        leak.peer().recv(client, 5, PATIENCE)?,
        Recv::Data(b"again".into())
    );
    Ok(())
}

/// listen(100), nothing accepted, 150 clients gone.
fn a_drained_backlog_lets_new_clients_in(family: Family) -> Result<()> {
    let (lab, leak) = lab("full-backlog", family, 101)?;
    nonblocking(&leak)?;
    let address = leak.pair().app_address;
    let dial = Dial {
        detached: true,
        ..Dial::default()
    };
    let late = leak.peer().connect(address, 49, dial, PATIENCE)?;
    leak.peer().close(&fds(&late))?;
    assert!(!client_gets_in(&leak), "the backlog is not full");

    // Closing the sockets alone frees no slot.
    cwkill(&lab, "--port 8080")?.exits(0);
    assert_eq!(waiting(&lab)?, 101);
    assert!(!client_gets_in(&leak), "the backlog is not full");

    let before = flags(&leak)?;
    let ran = cwkill(&lab, "--port 8080 -n --drain-backlog --stop-limit 10s")?.exits(0);
    let wanted = "101 dead connections to be drained from the backlog of ";
    assert!(ran.stdout.contains(wanted), "{ran:?}");
    assert_eq!(waiting(&lab)?, 101);
    let ran = cwkill(&lab, "--port 8080 --json --drain-backlog --stop-limit 10s")?.exits(0);
    let drained = backlog(&ran);
    for (key, value) in [
        ("port", json!(8080)),
        ("dead", json!(101)),
        ("drained", json!(101)),
        ("waiting_before", json!(101)),
        ("waiting", json!(0)),
        ("backlog", json!(100)),
        ("left_one", json!(false)),
        ("reason_code", Value::Null),
    ] {
        assert_eq!(drained[key], value, "{key}: {drained:#}");
    }
    assert_eq!(pids(&drained), [u64::from(leak.app().pid())]);
    assert_eq!((waiting(&lab)?, flags(&leak)?), (0, before));

    let client = leak.peer().connect(address, 1, Dial::default(), PATIENCE)?;
    let app = accept_all(&leak, &lab)?;
    talks(&leak, app[0].fd, client[0].fd)?;
    cwkill(&lab, "--port 8080 --drain-backlog --stop-limit 10s")?.exits(1);
    Ok(())
}

fn one_live_connection_keeps_a_backlog_from_being_drained(family: Family) -> Result<()> {
    let (lab, leak) = lab("full-backlog", family, 20)?;
    nonblocking(&leak)?;
    leak.app().set_backlog(leak.pair().listener, 100)?;
    let address = leak.pair().app_address;
    let live = leak.peer().connect(address, 1, Dial::default(), PATIENCE)?;
    let dry = cwkill(
        &lab,
        "--port 8080 -n --json --drain-backlog --stop-limit 10s",
    )?
    .exits(0);
    assert_eq!(backlog(&dry)["reason_code"], json!("live-connection"));
    for matched in [20, 0] {
        let ran = cwkill(&lab, "--port 8080 --json --drain-backlog --stop-limit 10s")?.exits(4);
        assert_eq!(ran.sockets().len(), matched);
        let left = backlog(&ran);
        assert_eq!(left["drained"], json!(0), "{left:#}");
        assert_eq!(left["reason_code"], json!("live-connection"), "{left:#}");
        assert_eq!((&left["dead"], &left["waiting"]), (&json!(20), &json!(21)));
    }
    let ran = cwkill(&lab, "--port 8080 --drain-backlog --stop-limit 10s")?.exits(4);
    let why = "was not drained: 1 live connection may wait among the dead ones";
    assert!(ran.stdout.contains(why), "{ran:?}");
    let app = accept_all(&leak, &lab)?;
    assert_eq!(app.len(), 1);
    talks(&leak, app[0].fd, live[0].fd)?;

    // A socket in CLOSE-WAIT that was not closed is no dead one either.
    let more = leak.peer().connect(address, 3, Dial::default(), PATIENCE)?;
    leak.peer().shutdown(&fds(&more), How::Write)?;
    lab.wait_for(PATIENCE, || Ok(in_state(&lab, TcpState::CloseWait)? == 3))?;
    let ran = cwkill(
        &lab,
        "--port 8080 --json --drain-backlog --stop-limit 10s --max-kills 2",
    )?
    .exits(4);
    assert_eq!(backlog(&ran)["reason_code"], json!("live-connection"));
    assert_eq!(waiting(&lab)?, 3);
    let ran = cwkill(&lab, "--port 8080 --json --drain-backlog --stop-limit 10s")?.exits(0);
    assert_eq!(backlog(&ran)["drained"], json!(3));
    Ok(())
}

/// Connects clients while the application is stopped. As soon as the first slot is free, they get in, behind the dead ones.
fn clients_that_connect_while_a_backlog_is_drained_are_not_lost(family: Family) -> Result<()> {
    const DEAD: usize = 400;
    let (lab, leak) = full_of_dead(family, DEAD)?;
    let address = leak.pair().app_address;
    let dial = Dial {
        detached: true,
        ..Dial::default()
    };
    let is_stopped = || -> Result<bool> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", leak.app().pid()))?;
        Ok(!status.contains("TracerPid:\t0\n"))
    };
    let (ran, clients) = thread::scope(|scope| -> Result<_> {
        // Their first SYN is dropped.
        let mut clients = leak.peer().connect(address, 20, dial, PATIENCE)?;
        let line = "--port 8080 --json --drain-backlog --stop-limit 10s";
        let cwkill = scope.spawn(|| cwkill(&lab, line));
        while !cwkill.is_finished() && !is_stopped()? {
            thread::yield_now();
        }
        // Not more than fit the backlog afterwards.
        while !cwkill.is_finished() && clients.len() < DEAD - 100 {
            clients.extend(leak.peer().connect(address, 10, dial, PATIENCE)?);
        }
        Ok((cwkill.join().expect("no panic")?, clients))
    })?;
    let drained = backlog(&ran.exits(0));
    assert_eq!(drained["drained"], json!(DEAD), "{drained:#}");
    // Each client gets in, some only with a later SYN.
    let accepted = leak
        .app()
        .accept(leak.pair().listener, clients.len(), PATIENCE)?;
    let served: HashSet<SocketAddr> = accepted.iter().map(|end| end.peer).collect();
    let wanted: HashSet<SocketAddr> = clients.iter().map(|end| end.local).collect();
    assert_eq!(served, wanted);
    for client in &clients {
        let app = accepted.iter().find(|end| end.peer == client.local);
        talks(&leak, app.context("it was served")?.fd, client.fd)?;
    }
    Ok(())
}

/// Whoever takes a connection, the application gets every live one.
fn an_owner_that_accepts_while_its_backlog_is_drained_loses_no_client(
    family: Family,
) -> Result<()> {
    const CLIENTS: usize = 300;
    let (lab, leak) = full_of_dead(family, 300)?;
    leak.app().set_backlog(leak.pair().listener, 4000)?;
    let address = leak.pair().app_address;
    thread::scope(|scope| -> Result<()> {
        let cwkills = scope.spawn(|| -> Result<()> {
            for _ in 0..3 {
                let line = "--port 8080 --json --drain-backlog --stop-limit 10s";
                let ran = cwkill(&lab, line)?;
                assert!(!ran.stdout.contains("lost-live-connection"), "{ran:?}");
                assert!(matches!(ran.code, Some(0 | 1 | 4)), "{ran:?}");
            }
            Ok(())
        });
        let clients = scope.spawn(|| {
            leak.peer()
                .connect(address, CLIENTS, Dial::default(), PATIENCE)
        });
        let mut served = HashSet::new();
        while !(cwkills.is_finished() && clients.is_finished() && waiting(&lab)? == 0) {
            // cwkill may have taken it meanwhile.
            let one = leak.app().accept(leak.pair().listener, 1, Duration::ZERO);
            served.extend(one.into_iter().flatten().map(|end| end.peer));
        }
        cwkills.join().expect("no panic")?;
        let clients = clients.join().expect("no panic")?;
        assert_eq!(clients.len(), CLIENTS);
        for client in &clients {
            assert!(served.contains(&client.local), "{client:?} was lost");
        }
        Ok(())
    })
}

/// A server that accepts through an io_uring, and clients beside it.
struct RingServer {
    lab: Lab,
    owner: Owner,
    clients: Agent,
    address: SocketAddr,
}

impl RingServer {
    fn new(mode: &str) -> Result<Self> {
        let lab = Lab::new()?;
        let owner = Owner::start(lab.app_host(), Build::Plain, mode, 1)?;
        let rows = lab.app_host().ss(&[])?.into_iter();
        let mut listeners = rows.filter(|row| row.state == TcpState::Listen);
        let address = listeners.next().context("it does not listen")?.local;
        Ok(RingServer {
            owner,
            clients: lab.app_host().agent("clients")?,
            lab,
            address,
        })
    }

    fn waiting(&self) -> Result<u32> {
        let rows = self.lab.app_host().ss(&[])?;
        let mut listeners = rows.iter().filter(|row| row.local == self.address);
        let listener = listeners.find(|row| row.state == TcpState::Listen);
        Ok(listener.context("the listener is gone")?.recv_q)
    }

    /// Clients connect and go. Waits until this number waits for accept(2).
    fn come_and_go(&self, clients: usize, waiting: u32) -> Result<()> {
        let ends = self
            .clients
            .connect(self.address, clients, Dial::default(), PATIENCE)?;
        self.clients.close(&fds(&ends))?;
        self.lab.wait_for(PATIENCE, || {
            let stuck = in_state(&self.lab, TcpState::CloseWait)?;
            Ok(self.waiting()? == waiting && stuck == clients)
        })
    }

    fn drain(&self) -> Result<Ran> {
        let port = self.address.port();
        let line = format!("--port {port} --json --drain-backlog --stop-limit 10s --min-idle 0s");
        cwkill(&self.lab, &line)
    }

    fn accepted(&mut self) -> Result<usize> {
        Ok(self.owner.order("accepted")?.trim().parse()?)
    }
}

/// A multishot accept takes every connection when it arrives. So a backlog fills only while its owner is stopped. The kernel then takes
/// nothing for it.
fn a_backlog_whose_owner_accepts_through_io_uring_is_drained() -> Result<()> {
    let mut server = RingServer::new("ring-accepts")?;
    let lab = Lab::new()?;
    server.owner.signal(Signal::SIGSTOP)?;
    stopped(&lab, server.owner.pid())?;
    server.come_and_go(5, 5)?;
    let drained = backlog(&server.drain()?.exits(0));
    // Its listening socket waits without O_NONBLOCK.
    assert_eq!(drained["drained"], json!(4), "{drained:#}");
    assert_eq!(drained["left_one"], json!(true), "{drained:#}");
    assert_eq!(server.waiting()?, 1);
    stopped(&lab, server.owner.pid())?;
    server.owner.signal(Signal::SIGCONT)?;
    let mut accepted = 0;
    lab.wait_for(PATIENCE, || {
        accepted = server.accepted()?;
        Ok(accepted == 1)
    })?;
    // It accepts as before.
    let end = server
        .clients
        .connect(server.address, 1, Dial::default(), PATIENCE)?;
    lab.wait_for(PATIENCE, || {
        accepted = server.accepted()?;
        Ok(accepted == 2)
    })?;
    let is_open = |row: &SsRow| row.local == end[0].local && row.state == TcpState::Established;
    assert!(server.lab.app_host().ss(&[])?.iter().any(is_open));
    server.owner.report()?;
    Ok(())
}

/// cwkill cannot stop a kernel thread that works for an io_uring, and it could accept meanwhile.
fn an_owner_for_which_a_kernel_thread_accepts_is_not_stopped() -> Result<()> {
    let mut server = RingServer::new("ring-accepts-wq")?;
    // It takes the first.
    server.come_and_go(5, 4)?;
    let ran = server.drain()?.exits(4);
    let left = backlog(&ran);
    assert_eq!(left["drained"], json!(0), "{left:#}");
    assert_eq!(left["reason_code"], json!("owner-not-stopped"), "{left:#}");
    assert!(ran.stdout.contains("iou-wrk-"), "{ran:?}");
    assert_eq!(server.waiting()?, 4);
    server.owner.report()?;
    Ok(())
}

fn only_the_hung_member_of_a_group_is_drained(family: Family) -> Result<()> {
    let group = Group::new(family)?;
    group.hang(&[1])?;
    let lab = &group.lab;
    let hung = &group.servers[1];
    hung.agent
        .set_option(&[hung.listener], SocketOption::NonBlocking(true))?;
    let before = hung.waiting(lab)?;
    cwkill(
        lab,
        &format!("--drain-backlog --stop-limit 10s --pid {}", group.pid(0)),
    )?
    .exits(1);
    let line = format!(
        "--json --drain-backlog --stop-limit 10s --pid {}",
        group.pid(1)
    );
    let drained = backlog(&cwkill(lab, &line)?.exits(0));
    assert_eq!(drained["drained"], json!(before), "{drained:#}");
    assert_eq!(pids(&drained), [u64::from(group.pid(1))]);
    assert_eq!(drained["group_size"], json!(3));
    assert_eq!(hung.waiting(lab)?, 0);
    // All three accept.
    group.hang(&[0, 1, 2])
}

/// A dead connection keeps its slot, and accept(2) returns connections in the order in which they came.
fn fact_accept_takes_the_oldest_connection_and_frees_its_slot(family: Family) -> Result<()> {
    let (lab, leak) = lab("full-backlog", family, 3)?;
    let address = leak.pair().app_address;
    cwkill(&lab, "--port 8080")?.exits(0);
    leak.app().set_backlog(leak.pair().listener, 100)?;
    let live = leak.peer().connect(address, 3, Dial::default(), PATIENCE)?;
    assert_eq!(waiting(&lab)?, 6);
    let accepted = leak.app().accept(leak.pair().listener, 6, PATIENCE)?;
    let came: Vec<SocketAddr> = leak.conns().iter().map(|conn| conn.peer).collect();
    let came = came.into_iter().chain(live.iter().map(|end| end.local));
    let got: Vec<SocketAddr> = accepted.iter().map(|end| end.peer).collect();
    assert_eq!(got, came.collect::<Vec<_>>());
    assert_eq!(waiting(&lab)?, 0);
    Ok(())
}

/// accept(2) of such an owner would wait if poll(2) had told it of a connection that is gone.
fn an_owner_without_o_nonblock_keeps_one_dead_connection() -> Result<()> {
    let (lab, leak) = lab("full-backlog", Family::V4, 10)?;
    let ran = cwkill(&lab, "--port 8080 --json --drain-backlog --stop-limit 10s")?.exits(0);
    let drained = backlog(&ran);
    assert_eq!(drained["drained"], json!(9), "{drained:#}");
    assert_eq!(drained["left_one"], json!(true));
    assert_eq!(waiting(&lab)?, 1);
    assert!(client_gets_in(&leak));
    Ok(())
}

/// Waits until process `pid` is stopped, by a signal or again after cwkill has let go of it. A tracer that leaves sets it running; it stops as
/// soon as it gets a processor, and a SIGCONT that comes earlier has no effect.
fn stopped(lab: &Lab, pid: u32) -> Result<()> {
    let status = format!("/proc/{pid}/status");
    lab.wait_for(PATIENCE, || {
        Ok(std::fs::read_to_string(&status)?.contains("State:\tT (stopped)"))
    })
}

fn a_stopped_or_traced_owner_is_left_as_it_was() -> Result<()> {
    let (lab, leak) = full_of_dead(Family::V4, 5)?;
    leak.app().stop()?;
    let ran = cwkill(&lab, "--port 8080 --json --drain-backlog --stop-limit 10s")?.exits(0);
    assert_eq!(backlog(&ran)["drained"], json!(5));
    stopped(&lab, leak.app().pid())?;
    leak.app().signal(Signal::SIGCONT)?;
    assert!(client_gets_in(&leak));
    Ok(())
}

/// Three processes accept from one listener.
fn all_processes_of_a_prefork_server_are_stopped(family: Family) -> Result<()> {
    let (lab, leak) = full_of_dead(family, 8)?;
    let children = leak.app().share(&[leak.pair().listener], 2)?;
    let mut expected: Vec<u64> = children.iter().copied().map(u64::from).collect();
    expected.push(leak.app().pid().into());
    expected.sort_unstable();
    // One that is traced already cannot be stopped, and could accept meanwhile: then nothing is taken.
    let tracer = Tracer::of(&lab, children[0])?;
    let line = "--port 8080 --json --drain-backlog --stop-limit 10s";
    let left = backlog(&cwkill(&lab, line)?.exits(4));
    assert_eq!(left["drained"], json!(0), "{left:#}");
    assert_eq!(left["reason_code"], json!("owner-not-stopped"), "{left:#}");
    assert_eq!(waiting(&lab)?, 8);
    drop(tracer);
    let drained = backlog(&cwkill(&lab, line)?.exits(0));
    assert_eq!(drained["drained"], json!(8), "{drained:#}");
    let mut owners = pids(&drained);
    owners.sort_unstable();
    assert_eq!(owners, expected);
    assert_eq!(waiting(&lab)?, 0);
    assert!(client_gets_in(&leak));
    for child in children {
        let status = std::fs::read_to_string(format!("/proc/{child}/status"))?;
        assert!(!status.contains("(stopped)"), "{status}");
    }
    Ok(())
}

/// A process that traces another one without stopping it. It ends when dropped.
struct Tracer(Child);

impl Tracer {
    fn of(lab: &Lab, pid: u32) -> Result<Self> {
        // PTRACE_SEIZE
        let script = format!(
            "import ctypes, time
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
assert libc.ptrace(0x4206, {pid}, None, None) == 0
time.sleep(600)"
        );
        let command = lab.app_host().command("python3");
        let tracer = Tracer(command.args(["-c", &script]).spawn()?);
        lab.wait_for(PATIENCE, || {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
            Ok(!status.contains("TracerPid:\t0\n"))
        })?;
        Ok(tracer)
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Its handshake is not finished, but accept(2) would return it: with TCP Fast Open it waits in the backlog already.
fn a_request_of_tcp_fast_open_is_a_live_connection() -> Result<()> {
    let lab = Lab::new()?;
    // For each listener, and without a cookie (net.ipv4.tcp_fastopen).
    let sysctl = "echo 1543 > /proc/sys/net/ipv4/tcp_fastopen";
    ran(lab.app_host().command("sh").args(["-c", sysctl]))?.exits(0);
    let leak = lab.start("full-backlog", Family::V4, count(5))?;
    nonblocking(&leak)?;
    cwkill(&lab, "--port 8080")?.exits(0);
    let pair = leak.pair();
    pair.app.set_backlog(pair.listener, 16)?;
    // The client does not get the answer to its SYN.
    let rules =
        "nft 'add table ip drops; add chain ip drops out { type filter hook output priority 0; };
                 add rule ip drops out tcp flags & (syn|ack) == (syn|ack) drop'";
    ran(lab.app_host().command("sh").args(["-c", rules]))?.exits(0);
    ran(pair.peer_host.command("sh").args(["-c", sysctl]))?.exits(0);
    let address = pair.app_address;
    let script = format!(
        "import socket, time
s = socket.socket()
s.settimeout(0)
try:
    s.sendto(b'x', socket.MSG_FASTOPEN, ('{}', {}))
except BlockingIOError:
    pass
time.sleep(600)",
        address.ip(),
        address.port()
    );
    let client = pair.peer_host.command("python3").args(["-c", &script]);
    let _client = Tracer(client.spawn()?);
    lab.wait_for(PATIENCE, || Ok(waiting(&lab)? == 6))?;
    assert_eq!(in_state(&lab, TcpState::SynRecv)?, 1);
    let line = "--port 8080 --json --drain-backlog --stop-limit 10s";
    let left = backlog(&cwkill(&lab, line)?.exits(4));
    assert_eq!(left["drained"], json!(0), "{left:#}");
    assert_eq!(left["reason_code"], json!("live-connection"), "{left:#}");
    assert_eq!(waiting(&lab)?, 6);
    Ok(())
}

fn the_log_has_each_backlog() -> Result<()> {
    let (lab, _leak) = full_of_dead(Family::V6, 5)?;
    let dir = tempfile::tempdir()?;
    let log = dir.path().join("log");
    let line = format!(
        "--port 8080 --drain-backlog --stop-limit 10s --log-file {}",
        log.display()
    );
    cwkill(&lab, &line)?.exits(0);
    let records: Vec<Value> = std::fs::read_to_string(log)?
        .lines()
        .map(|line| serde_json::from_str(line).map_err(Into::into))
        .collect::<Result<_>>()?;
    let events: Vec<String> = records.iter().map(|record| at(record, "/event")).collect();
    assert_eq!(events, ["begin", "intent", "outcome", "end"]);
    assert_eq!(records[0]["backlogs"], json!(1));
    assert_eq!(records[1]["backlog"]["dead"], json!(5));
    assert_eq!(records[1]["backlog"]["drained"], Value::Null);
    assert_eq!(records[2]["backlog"]["drained"], json!(5));
    Ok(())
}

fn selectors_choose_the_backlogs() -> Result<()> {
    let (lab, leak) = full_of_dead(Family::V4, 5)?;
    let pid = leak.app().pid();
    for (selector, found) in [
        ("--port 8081".to_owned(), false),
        ("--port 8000-9000".into(), true),
        ("--all".into(), true),
        (format!("--pid {pid}"), true),
        (format!("--pid {}", leak.peer().pid()), false),
        ("--process leaky-app".into(), true),
        // The peers of dead connections are not known.
        ("--peer 10.0.0.0/8".into(), false),
        ("--min-age 1h".into(), false),
        ("--cause drained".into(), false),
        ("--cause not-accepted".into(), true),
        ("-6".into(), false),
        ("-4".into(), true),
    ] {
        let code = if found { 0 } else { 1 };
        let ran = cwkill(&lab, &format!("-n --json --drain-backlog {selector}"))?.exits(code);
        let backlogs = ran.json()["backlogs"].as_array().map(Vec::len);
        assert_eq!(backlogs, Some(usize::from(found)), "{selector}");
    }
    for (line, part) in [
        ("--drain-backlog", "needs a selector"),
        ("--port 8080 --no-owners --drain-backlog", "--no-owners"),
        ("--port 8080 --stop-limit 1s", "--reclaim"),
    ] {
        cwkill(&lab, line)?.exits(2).complains(part);
    }
    // A closed socket of another application is not in the way.
    let other = lab.start("unread", Family::V6, count(1))?;
    let ran = cwkill(&lab, "--all --json --drain-backlog --stop-limit 1s")?.exits(0);
    assert_eq!(backlog(&ran)["drained"], json!(5));
    assert!(other.app().is_alive());
    Ok(())
}
