//! The backlogs of listeners: whose they are, and whether their slots can be freed.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use netns_harness::{Agent, Dial, Endpoint, Family, Fd, How, Lab, SsRow, TcpState};
use serde_json::{Value, json};

use crate::support::{PATIENCE, Ran, at, cwkill, in_state, selects};
use crate::trial::{Test, each_family};

pub const TESTS: &[Test] = &[
    each_family!(the_hung_member_of_a_group_is_the_culprit),
    each_family!(two_hung_members_of_a_group_are_not_told_apart),
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
        assert_eq!(ran.json()["undecided"], json!(sockets.len()));
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
