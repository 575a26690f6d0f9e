//! Units, containers and cgroups. Each test makes cgroups of its own.
//!
//! Only root of the machine may make cgroups and mount a /proc that hides processes.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use netns_harness::{Dial, Family, How, Lab, TcpState};

use crate::support::{CWKILL, PATIENCE, Ran, alone, at, count, cwkill, ran, selects};
use crate::trial::{Need, Test, once};

pub const TESTS: &[Test] = &[
    once!(units_containers_and_cgroups_select_sockets).needs(Need::RootOfTheMachine),
    once!(a_proc_that_hides_processes_is_named).needs(Need::RootOfTheMachine),
    once!(a_frozen_owner_is_neither_stopped_nor_leaking).needs(Need::RootOfTheMachine),
    once!(cgroup_in_an_expression_is_where_the_socket_was_made).needs(Need::RootOfTheMachine),
    once!(the_kernel_refuses_a_newline_in_the_name_of_a_cgroup).needs(Need::RootOfTheMachine),
    once!(a_hostile_cgroup_is_one_owner_and_does_not_reach_the_terminal)
        .needs(Need::RootOfTheMachine),
];

/// Whether this user can make cgroups: only root of the machine can mount cgroup2.
pub fn can_be_made() -> bool {
    in_cgroup2("true").is_ok()
}

const ID: &str = "3f4a9b2c1d0e5f6a7b8c9d0e1f2a3b4c5d6e7f8091a2b3c4d5e6f708192a3b4c";

/// Runs a script in the root of cgroup2, in a mount namespace of its own.
fn in_cgroup2(script: &str) -> Result<()> {
    let script = format!("mount -t cgroup2 none /mnt && cd /mnt && {script}");
    let output = Command::new("unshare")
        .args(["-m", "sh", "-ec", &script])
        .output()
        .context("run unshare")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{script}: {stderr}");
    Ok(())
}

/// The cgroups of one test. They are removed when this is dropped.
pub struct Cgroups {
    root: String,
}

impl Cgroups {
    pub fn new(test: &str) -> Self {
        Cgroups {
            root: format!("cwkill-test-{}-{test}", std::process::id()),
        }
    }

    pub fn put(&self, pid: u32, path: &str) -> Result<()> {
        let dir = format!("{}/{path}", self.root);
        in_cgroup2(&format!("mkdir -p {dir}; echo {pid} > {dir}/cgroup.procs"))
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        // The processes move back to the root, and then their cgroups are empty and can be removed.
        let _ = in_cgroup2(&format!(
            "for pid in $(find {0} -name cgroup.procs -exec cat {{}} +); do \
                 echo $pid > cgroup.procs || true; \
             done; find {0} -depth -type d -exec rmdir {{}} +",
            self.root
        ));
    }
}

/// Runs a command on the leaking host with cgroup2 mounted.
fn with_cgroup2(lab: &Lab, command: &str) -> Result<Ran> {
    let script = format!("mount -t cgroup2 none /mnt && exec {command}");
    ran(lab
        .app_host()
        .command("unshare")
        .args(["-m", "sh", "-ec", &script]))
}

/// By cgroup v1 and by v2.
fn a_frozen_owner_is_neither_stopped_nor_leaking() -> Result<()> {
    let lab = Lab::new()?;
    let leak = lab.start("drained", Family::V4, count(3))?;
    let (pid, name) = (
        leak.app().pid(),
        format!("cwkill-test-{}-frozen", std::process::id()),
    );
    let line = "diagnose --sample 50ms --json";
    for (mount, freeze, thaw) in [
        (
            "-t cgroup2",
            "echo 1 > cgroup.freeze",
            "echo 0 > cgroup.freeze",
        ),
        (
            "-t cgroup -o freezer",
            "echo FROZEN > freezer.state",
            "echo THAWED > freezer.state",
        ),
    ] {
        let script = format!(
            "mount {mount} none /mnt; mkdir /mnt/{name}; cd /mnt/{name}
             echo {pid} > cgroup.procs; {freeze}
             trap '{thaw}; echo {pid} > ../cgroup.procs; cd ..; rmdir {name}' EXIT
             i=0; until grep -q -e 'frozen 1' -e FROZEN cgroup.events freezer.state 2>/dev/null
             do i=$((i+1)); [ $i -lt 1000 ] || exit 99; sleep 0.02; done
             {CWKILL} {line}; {CWKILL} diagnose --sample 50ms >&2"
        );
        let command = lab.app_host().command("unshare");
        let ran = ran(command.args(["-m", "sh", "-ec", &script]))?.exits(0);
        let document = ran.json();
        let process = &document["processes"][0];
        assert_eq!(process["pid"], serde_json::json!(pid));
        assert_eq!(at(process, "/condition"), "frozen", "{mount}: {ran:?}");
        assert_eq!(at(process, "/causes/drained/verdict_code"), "owner-frozen");
        assert!(ran.stderr.contains("its cgroup is frozen"), "{ran:?}");
    }
    let document = cwkill(&lab, line)?.exits(0).json();
    assert_eq!(at(&document["processes"][0], "/condition"), "null");
    Ok(())
}

/// For the kernel, a socket stays in the cgroup in which it was made. `--cgroup` compares the present owners.
fn cgroup_in_an_expression_is_where_the_socket_was_made() -> Result<()> {
    let lab = Lab::new()?;
    let cgroups = Cgroups::new("made");
    let leak = lab.start("unread", Family::V4, count(3))?;
    let dir = format!("{}/app.slice/web.service", cgroups.root);
    cgroups.put(leak.app().pid(), "app.slice/web.service")?;
    // These sockets are made in the new cgroup.
    let address = (leak.pair().app_address.ip(), 8100).into();
    let listener = leak.app().listen(address, false, 8)?;
    let ends = leak.peer().connect(address, 2, Dial::default(), PATIENCE)?;
    leak.app().accept(listener, 2, PATIENCE)?;
    let fds: Vec<_> = ends.iter().map(|end| end.fd).collect();
    leak.peer().shutdown(&fds, How::Write)?;
    lab.wait_for(PATIENCE, || {
        Ok(crate::support::in_state(&lab, TcpState::CloseWait)? == 5)
    })?;

    for (expression, expected) in [
        (format!("cgroup = {dir}"), 2),
        (format!("cgroup {dir}"), 2),
        (format!("cgroup != {dir}"), 3),
        (format!("cgroup = {dir} or sport = :8080"), 5),
        // Exactly this cgroup, without those below it.
        (format!("cgroup = {}/app.slice", cgroups.root), 0),
    ] {
        let ours = with_cgroup2(&lab, &format!("{CWKILL} -n --json '{expression}'"))?;
        assert_eq!(ours.sockets().len(), expected, "{expression}");
        let by_ss = with_cgroup2(&lab, &format!("ss -Htn state close-wait {expression}"))?;
        let rows = by_ss.exits(0).stdout.lines().count();
        assert_eq!(rows, expected, "ss {expression}");
    }
    with_cgroup2(&lab, &format!("{CWKILL} -n 'cgroup = /nowhere'"))?
        .exits(3)
        .complains("/nowhere");
    let selected = cwkill(&lab, &format!("-n --json --cgroup /{}", cgroups.root))?.sockets();
    assert_eq!(selected.len(), 5);
    Ok(())
}

fn units_containers_and_cgroups_select_sockets() -> Result<()> {
    let lab = Lab::new()?;
    let cgroups = Cgroups::new("select");
    let unit = lab.start("unread", Family::V4, alone(8001, 1))?;
    let docker = lab.start("drained", Family::V6, alone(8002, 2))?;
    let lxc = lab.start("not-accepted", Family::Mapped, alone(8003, 4))?;
    let plain = lab.start("unread", Family::V4, alone(8004, 8))?;
    cgroups.put(
        unit.app().pid(),
        "system.slice/leaky@a\\\\x2db.service/main",
    )?;
    cgroups.put(
        docker.app().pid(),
        &format!("system.slice/docker-{ID}.scope"),
    )?;
    cgroups.put(lxc.app().pid(), "lxc.payload.web/app")?;
    // Its name is known, so it is no other.
    let host = tempfile::tempdir()?;
    let containers = host.path().join("var/lib/docker/containers").join(ID);
    std::fs::create_dir_all(&containers)?;
    let config = format!(r#"{{"ID":"{ID}","Name":"/shop"}}"#);
    std::fs::write(containers.join("config.v2.json"), config)?;
    let names = format!("--host-root {}", host.path().display());
    let root = &cgroups.root;
    let cases = [
        ("--unit leaky@a-b".to_owned(), 1),
        ("--unit leaky@a\\x2db.service".into(), 1),
        ("--unit leaky@*".into(), 1),
        ("--unit leaky".into(), 0),
        (format!("--unit docker-{ID}.scope"), 2),
        (format!("--container {ID}"), 2),
        (format!("--container {}", &ID[..12]), 2),
        (format!("--container {}", &ID[..7]), 0),
        // Never accepted: the owner of the listener is in the container.
        ("--container web".into(), 4),
        ("--container web,3f4a9b2c1d0e".into(), 6),
        (format!("--cgroup /{root}/system.slice"), 3),
        (format!("--cgroup /{root}/system.slice/"), 3),
        (format!("--cgroup /sys/fs/cgroup/{root}"), 7),
        (format!("--cgroup /{root}/system"), 0),
        (format!("--cgroup /{root} --port 8003"), 4),
        (
            format!("--cgroup /{root}/lxc.payload.web --unit leaky@*"),
            0,
        ),
        ("--all".into(), 15),
    ];
    for (selector, expected) in cases {
        selects(&lab, &format!("{selector} {names}"), expected)?;
    }

    let field = |port, pointer| -> Result<String> {
        let sockets = cwkill(&lab, &format!("-n --json --port {port}"))?.sockets();
        Ok(at(&sockets[0], pointer))
    };
    assert_eq!(field(8001, "/owners/0/unit")?, "leaky@a\\x2db.service");
    assert_eq!(field(8001, "/owners/0/container")?, "null");
    assert_eq!(field(8002, "/owners/0/container/runtime")?, "docker");
    assert_eq!(field(8002, "/owners/0/container/id")?, ID);
    assert_eq!(field(8003, "/listener/owners/0/container/name")?, "web");

    let table = cwkill(&lab, "")?.exits(0).stdout;
    for text in ["UNIT", " leaky@a-b ", " docker 3f4a9b2c1d0e ", " lxc web "] {
        assert!(table.contains(text), "no {text:?} in\n{table}");
    }

    cwkill(&lab, &format!("--container web --method destroy {names}"))?.exits(0);
    assert_eq!(cwkill(&lab, "--all -n --json")?.sockets().len(), 11);
    assert!(plain.app().is_alive());
    Ok(())
}

/// /proc/PID/cgroup has a line for each hierarchy, so a newline in a path would forge one. Source: kernel/cgroup/cgroup.c, cgroup_mkdir.
fn the_kernel_refuses_a_newline_in_the_name_of_a_cgroup() -> Result<()> {
    let name = format!("cwkill-test-{}-a\n0::forged", std::process::id());
    let refused = in_cgroup2(&format!("mkdir '{name}'")).unwrap_err();
    assert!(
        refused.to_string().contains("Invalid argument"),
        "{refused:#}"
    );
    Ok(())
}

/// With every other byte that could mean something to cwkill or to a terminal.
fn a_hostile_cgroup_is_one_owner_and_does_not_reach_the_terminal() -> Result<()> {
    const NAME: &str = "a:0::b\tc d\x1bc\\n\r.service";
    let (lab, leak) = crate::support::lab("drained", Family::V4, 2)?;
    let cgroups = Cgroups::new("hostile");
    let dir = format!("{}/system.slice/{NAME}", cgroups.root);
    in_cgroup2(&format!(
        "mkdir -p '{dir}'; echo {} > '{dir}/cgroup.procs'",
        leak.app().pid()
    ))?;
    let sockets = cwkill(&lab, "--json")?.exits(0).sockets();
    assert_eq!(sockets.len(), 2);
    assert_eq!(at(&sockets[0], "/owners/0/unit"), NAME);
    for line in ["", "--port 8080 -n", "diagnose --sample 1ms", "check -c 0"] {
        let ran = cwkill(&lab, line)?;
        let all = format!("{}{}", ran.stdout, ran.stderr);
        assert!(!all.contains(['\x1b', '\r', '\t']), "{ran:?}");
    }
    let select = |option: &str, value: &str| -> Result<usize> {
        let command = lab.app_host().command(CWKILL);
        Ok(ran(command.args(["-n", "--json", option, value]))?
            .sockets()
            .len())
    };
    assert_eq!(select("--cgroup", &format!("/{dir}"))?, 2);
    assert_eq!(select("--cgroup", "/b")?, 0);
    assert_eq!(select("--unit", "a:0::b*")?, 2);
    Ok(())
}

fn a_proc_that_hides_processes_is_named() -> Result<()> {
    let (lab, leak) = crate::support::lab("unread", Family::V4, 2)?;
    let pid = leak.app().pid();
    let run = |arguments: &str| {
        let script = format!(
            "mount -t proc -o hidepid=2 proc /proc && \
             exec setpriv --reuid 65534 --regid 65534 --clear-groups {CWKILL} {arguments}"
        );
        ran(lab
            .app_host()
            .command("unshare")
            .args(["-m", "sh", "-ec", &script]))
    };
    // The listing names the reason why the owner is unknown.
    let listing = run("--json")?.exits(0).complains("hidepid");
    assert_eq!(at(&listing.json(), "/hidden_processes"), "true");
    // With a selector by owner, unknown owners are not the same as no match.
    for selector in [format!("--pid {pid}"), "--process leaky-app".into()] {
        run(&format!("{selector} -n"))?
            .exits(4)
            .complains("2 more sockets may belong")
            .complains("CAP_SYS_PTRACE");
    }
    Ok(())
}

/// A version of cgroups that can freeze processes.
#[derive(Clone, Copy, Debug)]
pub enum Freezer {
    V1,
    V2,
}

/// A process in a frozen cgroup, which is thawed and removed when this is dropped.
pub struct Frozen {
    version: Freezer,
    name: String,
}

impl Frozen {
    pub fn new(version: Freezer, pid: u32) -> Result<Self> {
        let name = format!("cwkill-test-frozen-{}-{pid}", std::process::id());
        let frozen = Frozen { version, name };
        let freeze = match version {
            Freezer::V1 => {
                "echo FROZEN > $DIR/freezer.state; until grep -q FROZEN $DIR/freezer.state; do sleep 0.01; done"
            }
            Freezer::V2 => {
                "echo 1 > $DIR/cgroup.freeze; until grep -q 'frozen 1' $DIR/cgroup.events; do sleep 0.01; done"
            }
        };
        frozen.script(&format!(
            "mkdir $DIR; echo {pid} > $DIR/cgroup.procs; {freeze}"
        ))?;
        Ok(frozen)
    }

    /// Where the hierarchy is mounted, in a mount namespace of its own.
    const MOUNT: &str = "/mnt";

    fn mounted(&self, script: &str) -> String {
        let (mount, root) = (
            match self.version {
                Freezer::V1 => "-t cgroup -o freezer none",
                Freezer::V2 => "-t cgroup2 none",
            },
            Self::MOUNT,
        );
        format!("mount {mount} {root}; DIR={root}/{}; {script}", self.name)
    }

    fn script(&self, script: &str) -> Result<()> {
        let output = Command::new("unshare")
            .args(["-m", "sh", "-ec", &self.mounted(script)])
            .output()
            .context("run unshare")?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{script}: {stderr}");
        Ok(())
    }

    /// Runs `cwkill reclaim` on process `pid` where the hierarchy is mounted.
    pub fn reclaim(&self, lab: &Lab, pid: u32, more: &str) -> Result<Ran> {
        let line = format!("exec {CWKILL} reclaim --pid {pid} --reclaim-age 0s {more}");
        ran(lab
            .app_host()
            .command("unshare")
            .args(["-m", "sh", "-ec", &self.mounted(&line)]))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let thaw = match self.version {
            Freezer::V1 => "echo THAWED > $DIR/freezer.state",
            Freezer::V2 => "echo 0 > $DIR/cgroup.freeze",
        };
        let root = Self::MOUNT;
        let _ = self.script(&format!(
            "{thaw}; for pid in $(cat $DIR/cgroup.procs); do echo $pid > {root}/cgroup.procs || true; done; rmdir $DIR"
        ));
    }
}
