//! `cwkill doctor`: each method then does what doctor has reported.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail};
use netns_harness::{
    Agent, AgentOptions, Capability, Dial, Family, HostCommand, How, Lab, TcpState,
};
use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use serde_json::Value;

use crate::support::{CWKILL, PATIENCE, Ran, alone, at, ran, skip_reason};
use crate::trial::{Need, Test, once};

use Capability::{
    CAP_DAC_READ_SEARCH as SEARCH, CAP_NET_ADMIN as ADMIN, CAP_NET_RAW as RAW,
    CAP_SYS_PTRACE as PTRACE,
};

pub const TESTS: &[Test] = &[
    once!(doctor_agrees_with_the_methods),
    once!(doctor_agrees_when_capabilities_are_missing),
    once!(doctor_agrees_under_a_seccomp_filter),
    once!(doctor_agrees_in_a_user_namespace),
    once!(without_a_list_of_sockets_nothing_works),
    once!(a_loopback_that_is_down_is_named),
    once!(a_missing_privilege_is_named),
    once!(doctor_agrees_with_reclaim),
    once!(doctor_leaves_other_sockets_alone),
    once!(a_reader_that_leaves_early_is_not_an_error),
    once!(what_a_container_lacks_is_named),
    once!(another_pid_namespace_is_named),
    once!(doctor_says_whether_a_trace_works),
    once!(a_trace_works_for_root_of_the_machine).needs(Need::Iterator),
    once!(doctor_agrees_for_an_unprivileged_user).needs(Need::RootOfTheMachine),
    once!(doctor_agrees_on_sockets_of_other_users).needs(Need::RootOfTheMachine),
    once!(a_proc_that_hides_processes_is_named).needs(Need::RootOfTheMachine),
];

const METHODS: [&str; 4] = ["shutdown", "destroy", "rst", "probe"];
const NOBODY: u32 = 65534;

/// With this variable in its environment, this program runs its arguments under a seccomp filter.
pub const WITHOUT: &str = "CWKILL_TESTS_WITHOUT";

/// Runs the arguments under the seccomp filter that `what` names.
pub fn run_without(what: &str) -> Result<()> {
    const AF_PACKET: u64 = libc::AF_PACKET as u64;
    const AF_NETLINK: u64 = libc::AF_NETLINK as u64;
    const CAPBSET_DROP: u64 = libc::PR_CAPBSET_DROP as u64;
    let first_is = |value| -> Result<Vec<SeccompRule>> {
        let first = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?;
        Ok(vec![SeccompRule::new(vec![first])?])
    };
    let (call, errno, rules) = match what {
        // Like an old kernel, and like the filter of a container.
        "pidfd_getfd: ENOSYS" => (libc::SYS_pidfd_getfd, libc::ENOSYS, vec![]),
        "pidfd_getfd: EPERM" => (libc::SYS_pidfd_getfd, libc::EPERM, vec![]),
        "packet sockets" => (libc::SYS_socket, libc::EAFNOSUPPORT, first_is(AF_PACKET)?),
        "netlink" => (
            libc::SYS_socket,
            libc::EPROTONOSUPPORT,
            first_is(AF_NETLINK)?,
        ),
        "netlink: EPERM" => (libc::SYS_socket, libc::EPERM, first_is(AF_NETLINK)?),
        "netlink: EAFNOSUPPORT" => (libc::SYS_socket, libc::EAFNOSUPPORT, first_is(AF_NETLINK)?),
        "bpf" => (libc::SYS_bpf, libc::EPERM, vec![]),
        "PR_CAPBSET_DROP" => (libc::SYS_prctl, libc::EPERM, first_is(CAPBSET_DROP)?),
        other => bail!("no such filter: {other}"),
    };
    let filter = SeccompFilter::new(
        BTreeMap::from([(call, rules)]),
        SeccompAction::Allow,
        SeccompAction::Errno(errno.unsigned_abs()),
        std::env::consts::ARCH.try_into()?,
    )?;
    let program: seccompiler::BpfProgram = filter.try_into()?;
    seccompiler::apply_filter(&program)?;
    let mut arguments = std::env::args_os().skip(1);
    let error = Command::new(arguments.next().context("no command")?)
        .args(arguments)
        .exec();
    Err(error.into())
}

/// The command that runs cwkill under a seccomp filter; the arguments for cwkill are still to be added.
pub fn without<'a>(lab: &'a Lab, what: &str) -> Result<HostCommand<'a>> {
    let ourselves = std::env::current_exe()?;
    Ok(lab
        .app_host()
        .command(ourselves)
        .env(WITHOUT, what)
        .arg(CWKILL))
}

/// The owner of the sockets that a method is tried on.
#[derive(Clone, Copy, Debug, PartialEq)]
enum SocketOwner {
    /// A process of this uid; `None`: the uid of the tests.
    Process(Option<u32>),
    /// No owner: the socket is never accepted.
    None,
}

/// A way to run cwkill on a host.
type Setting<'a> = &'a dyn Fn(&Lab, &[&str]) -> Result<Ran>;

fn plain(command: HostCommand<'_>, arguments: &[&str]) -> Result<Ran> {
    ran(command.args(arguments))
}

/// The document of doctor. Its exit status must agree with it.
fn doctor(lab: &Lab, setting: Setting<'_>) -> Result<Value> {
    let ran = setting(lab, &["doctor", "--json"])?;
    let findings = ran.json();
    let auto = at(&findings, "/auto");
    let status = match auto.as_str() {
        "yes" => 0,
        "partly" | "untried" => 1,
        "no" => 3,
        _ => bail!("{findings:#}"),
    };
    ran.exits(status);
    Ok(findings)
}

/// One stuck connection on a port of its own, with a live peer.
struct Victim {
    method: &'static str,
    kind: &'static str,
    port: u16,
    owner: Option<u32>,
}

/// Starts a process for each of `owners`, with a stuck connection for each method.
fn victims(
    lab: &Lab,
    family: Family,
    owners: &[(SocketOwner, &'static str)],
) -> Result<(Vec<Agent>, Vec<Victim>)> {
    let ip: std::net::IpAddr = match family {
        Family::V4 => "127.0.0.1".parse()?,
        Family::V6 => "::1".parse()?,
        Family::Mapped => "::ffff:127.0.0.1".parse()?,
    };
    let peer = lab.app_host().agent("peer")?;
    let (mut agents, mut victims) = (Vec::new(), Vec::new());
    for (owner, kind) in owners {
        let app = lab.app_host().agent_as(&AgentOptions {
            comm: "victim".into(),
            uid: match owner {
                SocketOwner::Process(uid) => *uid,
                SocketOwner::None => None,
            },
            capabilities: None,
        })?;
        for method in METHODS {
            let port = 7001 + u16::try_from(victims.len())?;
            let listener = app.listen((ip, port).into(), false, 16)?;
            let address = (ip.to_canonical(), port).into();
            let ends = peer.connect(address, 1, Dial::default(), PATIENCE)?;
            if *owner != SocketOwner::None {
                app.accept(listener, 1, PATIENCE)?;
            }
            peer.shutdown(&[ends[0].fd], How::Write)?;
            lab.wait_for(PATIENCE, || is_stuck(lab, port))?;
            victims.push(Victim {
                method,
                kind,
                port,
                owner: (*owner != SocketOwner::None).then(|| app.pid()),
            });
        }
        agents.push(app);
    }
    agents.push(peer);
    Ok((agents, victims))
}

fn is_stuck(lab: &Lab, port: u16) -> Result<bool> {
    let sockets = lab.app_host().sockets()?;
    Ok(sockets
        .iter()
        .any(|socket| socket.local.port() == port && socket.state == TcpState::CloseWait))
}

/// Checks that doctor reports the result of each method on sockets of each of `owners`. Returns the document of doctor.
fn agree(
    family: Family,
    owners: &[(SocketOwner, &'static str)],
    setting: Setting<'_>,
) -> Result<Value> {
    let lab = Lab::new()?;
    let (_agents, victims) = victims(&lab, family, owners)?;
    let findings = doctor(&lab, setting)?;
    let row = |method: &str| -> Result<Value> {
        let rows = findings["methods"].as_array().context("no methods")?;
        let row = rows.iter().find(|row| row["name"] == method);
        Ok(row.with_context(|| format!("no row for {method}"))?.clone())
    };
    let missed = findings["unreachable"].as_array().context("no list")?;
    for victim in &victims {
        let Victim { method, kind, .. } = victim;
        if *method == "shutdown" && victim.owner.is_none() {
            assert!(row(method)?["ownerless"].is_null());
            continue;
        }
        let missed = victim
            .owner
            .map(|pid| missed.iter().find(|process| process["pid"] == pid));
        let said = match at(&row(method)?, &format!("/{kind}")).as_str() {
            "yes" => true,
            "no" => false,
            // The method works through owners that can be reached, and otherwise as without an owner.
            "partly" => match (*method, missed) {
                (_, Some(None)) => true,
                ("shutdown", _) => false,
                ("probe", Some(Some(owner))) if owner["seen"] == true => false,
                _ => at(&row(method)?, "/ownerless") == "yes",
            },
            other => bail!("{method} {kind}: {other}: {findings:#}"),
        };
        let port = victim.port.to_string();
        let act = setting(
            &lab,
            &[
                "--port", &port, "--method", method, "--grace", "5s", "--json",
            ],
        )?;
        let socket = act.sockets().remove(0);
        let did = match *method {
            // The probe has worked if it reports that the peer is alive.
            "probe" => skip_reason(&socket) == "peer is alive",
            _ => at(&socket, "/result/outcome") == "closed",
        };
        assert_eq!(did, said, "{method} {kind}: {act:?}\n{findings:#}");
        assert_eq!(is_stuck(&lab, victim.port)?, *method == "probe" || !did);
    }
    Ok(findings)
}

/// Sockets of the user of the tests, and sockets without an owner.
const OWN_AND_OWNERLESS: &[(SocketOwner, &str)] = &[
    (SocketOwner::Process(None), "own"),
    (SocketOwner::None, "ownerless"),
];

fn works(findings: &Value, method: &str, kind: &str) -> String {
    let rows = findings["methods"].as_array();
    let row = rows.and_then(|rows| rows.iter().find(|row| row["name"] == method));
    row.map_or_else(|| "no row".into(), |row| at(row, &format!("/{kind}")))
}

fn doctor_agrees_with_the_methods() -> Result<()> {
    for family in Family::ALL {
        let findings = agree(family, OWN_AND_OWNERLESS, &|lab, arguments| {
            plain(lab.app_host().command(CWKILL), arguments)
        })?;
        for method in ["destroy", "rst"] {
            assert_eq!(works(&findings, method, "works"), "yes");
        }
        assert_eq!(works(&findings, "probe", "ownerless"), "yes");
    }
    Ok(())
}

fn doctor_agrees_when_capabilities_are_missing() -> Result<()> {
    // Each set of capabilities, and whether destroy, rst and probe work on a socket without an owner.
    for (set, wanted) in [
        (&[][..], ["no", "no", "no"]),
        (&[PTRACE, SEARCH], ["no", "no", "no"]),
        (&[ADMIN], ["yes", "no", "no"]),
        (&[RAW], ["no", "yes", "yes"]),
    ] {
        let findings = agree(Family::V4, OWN_AND_OWNERLESS, &|lab, arguments| {
            plain(lab.app_host().command(CWKILL).capabilities(set), arguments)
        })
        .with_context(|| format!("{set:?}"))?;
        for (method, wanted) in ["destroy", "rst", "probe"].into_iter().zip(wanted) {
            assert_eq!(
                works(&findings, method, "ownerless"),
                wanted,
                "{set:?} {method}"
            );
        }
    }
    Ok(())
}

fn doctor_agrees_under_a_seccomp_filter() -> Result<()> {
    for (filter, text) in [
        ("pidfd_getfd: ENOSYS", "Linux 5.6"),
        ("pidfd_getfd: EPERM", "seccomp"),
        ("packet sockets", ""),
    ] {
        let findings = agree(Family::V4, OWN_AND_OWNERLESS, &|lab, arguments| {
            plain(without(lab, filter)?, arguments)
        })
        .with_context(|| filter.to_owned())?;
        match filter {
            "packet sockets" => {
                assert_eq!(works(&findings, "rst", "ownerless"), "no");
                assert!(works(&findings, "rst", "own") != "no", "{findings:#}");
            }
            _ => {
                assert_eq!(works(&findings, "shutdown", "works"), "no");
                let change = works(&findings, "shutdown", "change");
                assert!(change.contains(text), "{change}");
            }
        }
    }
    Ok(())
}

fn without_a_list_of_sockets_nothing_works() -> Result<()> {
    let lab = Lab::new()?;
    let without = |arguments: &[&str]| plain(without(&lab, "netlink")?, arguments);
    let ran = without(&["doctor", "--json"])?.exits(3);
    assert_eq!(at(&ran.json(), "/auto"), "no");
    assert_eq!(
        ran.json()["methods"].as_array().map(Vec::len),
        Some(METHODS.len() + 1)
    );
    let text = without(&["doctor"])?.exits(3).stdout;
    assert!(
        text.contains("sock_diag") && text.starts_with("auto does not work here\n"),
        "{text}"
    );
    without(&["--all"])?.exits(3);
    Ok(())
}

/// All capabilities, but in a user namespace that owns neither the network namespace nor any process.
fn doctor_agrees_in_a_user_namespace() -> Result<()> {
    let findings = agree(Family::V4, OWN_AND_OWNERLESS, &|lab, arguments| {
        plain(
            lab.app_host().command("unshare").args(["-Ur", CWKILL]),
            arguments,
        )
    })?;
    assert_eq!(at(&findings, "/auto"), "no");
    let change = works(&findings, "destroy", "change");
    assert!(change.contains("not of this user namespace"), "{change}");
    // A user namespace that owns its network namespace.
    let lab = Lab::new()?;
    let owner = |lab: &Lab, arguments: &[&str]| {
        let script = format!("ip link set lo up && exec {CWKILL} {}", arguments.join(" "));
        plain(
            lab.app_host().command("unshare"),
            &["-Urn", "sh", "-ec", &script],
        )
    };
    let findings = doctor(&lab, &owner)?;
    assert_eq!(works(&findings, "destroy", "works"), "yes");
    assert_eq!(works(&findings, "rst", "works"), "yes");
    Ok(())
}

fn a_loopback_that_is_down_is_named() -> Result<()> {
    let lab = Lab::new()?;
    let fresh = |lab: &Lab, arguments: &[&str]| {
        plain(
            lab.app_host().command("unshare").args(["-n", CWKILL]),
            arguments,
        )
    };
    let findings = doctor(&lab, &fresh)?;
    assert_eq!(at(&findings, "/auto"), "untried");
    let text = fresh(&lab, &["doctor"])?.exits(1).stdout;
    assert!(
        text.contains("loopback is down") && text.contains("ip link set lo up"),
        "{text}"
    );
    Ok(())
}

fn a_missing_privilege_is_named() -> Result<()> {
    let lab = Lab::new()?;
    let text = plain(
        lab.app_host().command(CWKILL).capabilities(&[]),
        &["doctor"],
    )?;
    // The status is 1 if some process of the machine can be reached.
    assert!(matches!(text.code, Some(1 | 3)), "{text:?}");
    for wanted in [
        "missing: CAP_NET_ADMIN CAP_NET_RAW",
        "needs CAP_NET_RAW",
        "cwkill cannot read ",
        "nothing closes it here",
        "--cap-add NET_ADMIN",
    ] {
        assert!(
            text.stdout.contains(wanted),
            "no {wanted:?} in\n{}",
            text.stdout
        );
    }
    Ok(())
}

/// `yes` or `no` must agree with `cwkill reclaim` on a descriptor of another process of root.
fn doctor_agrees_with_reclaim() -> Result<()> {
    let mut answers = Vec::new();
    for set in [
        &[][..],
        &[PTRACE],
        &[PTRACE, SEARCH, ADMIN, RAW, Capability::CAP_SYS_ADMIN],
    ] {
        let (lab, leak) = crate::support::lab("unread", Family::V4, 1)?;
        let pid = leak.app().pid();
        crate::support::cwkill(&lab, "--all --method destroy")?.exits(0);
        let with =
            |arguments: &[&str]| plain(lab.app_host().command(CWKILL).capabilities(set), arguments);
        let answer = works(&with(&["doctor", "--json"])?.json(), "reclaim", "own");
        let pid = pid.to_string();
        let line = [
            "reclaim",
            "--pid",
            &pid,
            "--reclaim-age",
            "0s",
            "--reclaim-force",
        ];
        let line: Vec<&str> = line.into_iter().chain(["--stop-limit", "5s"]).collect();
        let code = with(&line)?.code;
        match answer.as_str() {
            "yes" => assert_eq!(code, Some(0)),
            "no" => assert_eq!(code, Some(4)),
            // `partly` depends on the other processes of this host.
            _ => {}
        }
        answers.push((answer, code));
    }
    let codes: Vec<_> = answers.iter().map(|(_, code)| *code).collect();
    assert_eq!(codes, [Some(4), Some(0), Some(0)], "{answers:?}");
    assert!(answers[0].0 != "yes" && answers[2].0 != "no", "{answers:?}");
    Ok(())
}

fn doctor_leaves_other_sockets_alone() -> Result<()> {
    let lab = Lab::new()?;
    let leak = lab.start("unread", Family::V4, alone(8080, 5))?;
    let open = lab.start("established", Family::V4, alone(8081, 5))?;
    let listed = || -> Result<Vec<_>> {
        let mut rows = lab.app_host().ss(&[])?;
        rows.sort_by_key(|row| row.cookie);
        Ok(rows
            .into_iter()
            .map(|row| (row.cookie, row.state))
            .collect())
    };
    let before = listed()?;
    plain(lab.app_host().command(CWKILL), &["doctor"])?;
    let mut after = listed()?;
    // doctor tries shutdown on a connection of its own, whose peer is then in TIME-WAIT.
    let old = |(_, state): &(_, TcpState)| *state == TcpState::TimeWait;
    let left = after.iter().filter(|row| old(row)).count();
    assert!(left <= 1, "{after:?}");
    after.retain(|row| !old(row));
    assert_eq!(after, before);
    crate::support::carries_data(&open)?;
    drop(leak);
    Ok(())
}

fn a_reader_that_leaves_early_is_not_an_error() -> Result<()> {
    let lab = Lab::new()?;
    let script = format!("{CWKILL} doctor | head -1; {CWKILL} doctor >/dev/full");
    let ran = ran(lab.app_host().command("sh").args(["-c", &script]))?.exits(3);
    assert_eq!(ran.stdout.lines().count(), 1);
    assert_eq!(ran.stderr.lines().count(), 1);
    ran.complains("cannot write the findings");
    Ok(())
}

fn doctor_agrees_for_an_unprivileged_user() -> Result<()> {
    let owners = [
        (SocketOwner::Process(Some(NOBODY)), "own"),
        (SocketOwner::Process(None), "others"),
        (SocketOwner::None, "ownerless"),
    ];
    for set in [&[][..], &[PTRACE], &[PTRACE, SEARCH], &[RAW]] {
        let findings = agree(Family::V4, &owners, &|lab, arguments| {
            plain(
                lab.app_host().command(CWKILL).uid(NOBODY).capabilities(set),
                arguments,
            )
        })
        .with_context(|| format!("{set:?}"))?;
        if set.is_empty() {
            assert_eq!(works(&findings, "shutdown", "others"), "no");
            assert!(works(&findings, "shutdown", "own") != "no");
            assert_eq!(at(&findings, "/auto"), "partly");
        }
    }
    Ok(())
}

fn doctor_agrees_on_sockets_of_other_users() -> Result<()> {
    let owners = [(SocketOwner::Process(Some(NOBODY)), "others")];
    let findings = agree(Family::V4, &owners, &|lab, arguments| {
        plain(lab.app_host().command(CWKILL), arguments)
    })?;
    assert_eq!(works(&findings, "shutdown", "others"), "yes");
    Ok(())
}

fn a_proc_that_hides_processes_is_named() -> Result<()> {
    let owners = [
        (SocketOwner::Process(None), "others"),
        (SocketOwner::None, "ownerless"),
    ];
    let findings = agree(Family::V4, &owners, &|lab, arguments| {
        let script = format!(
            "mount -t proc -o hidepid=2 proc /proc && exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups \
             {CWKILL} {}",
            arguments.join(" ")
        );
        plain(
            lab.app_host().command("unshare"),
            &["-m", "sh", "-ec", &script],
        )
    })?;
    let change = works(&findings, "shutdown", "change");
    assert!(change.contains("hidepid=0"), "{change}");
    Ok(())
}

/// The options that are missing in `docker run`.
fn missing_options(document: &Value) -> Vec<String> {
    let options = document["confinement"]["missing"]["run_options"].as_array();
    let options = options.into_iter().flatten();
    options.map(|one| at(one, "/option")).collect()
}

/// The variables are those that an engine sets.
fn what_a_container_lacks_is_named() -> Result<()> {
    let lab = Lab::new()?;
    let examined = |variable: (&str, &str), capabilities: &[Capability]| -> Result<Ran> {
        let command = lab.app_host().command(CWKILL).args(["doctor", "--json"]);
        ran(command
            .env(variable.0, variable.1)
            .capabilities(capabilities))
    };
    let docker = examined(("container", "docker"), &[ADMIN, RAW])?.json();
    assert_eq!(at(&docker, "/confinement/container"), "docker");
    let missing = missing_options(&docker);
    for option in ["SYS_PTRACE", "DAC_READ_SEARCH", "SYS_ADMIN"] {
        assert!(
            missing.contains(&format!("--cap-add={option}")),
            "{missing:?}"
        );
    }
    for option in ["--cap-add=NET_ADMIN", "--cap-add=NET_RAW", "--user=0"] {
        assert!(!missing.contains(&option.to_owned()), "{missing:?}");
    }
    let manifest = &docker["confinement"]["missing"]["manifest"];
    assert_eq!(manifest, &Value::Array(Vec::new()));
    let pod = examined(("KUBERNETES_SERVICE_HOST", "10.0.0.1"), &[ADMIN, RAW])?.json();
    assert_eq!(at(&pod, "/confinement/container"), "kubernetes");
    assert!(missing_options(&pod).is_empty(), "{pod}");
    let manifest = pod["confinement"]["missing"]["manifest"].to_string();
    let lines = "capabilities: {add: [SYS_PTRACE, DAC_READ_SEARCH, SYS_ADMIN]}";
    assert!(manifest.contains(lines), "{manifest}");
    // The same in words.
    let command = lab.app_host().command(CWKILL).arg("doctor");
    let text = ran(command.env("container", "docker").capabilities(&[ADMIN]))?.stdout;
    assert!(text.contains("\nmissing in the `docker run`"), "{text}");
    assert!(
        text.contains("\n    without --cap-add=NET_RAW: no rst, no probe"),
        "{text}"
    );
    // A filter forbids what cwkill needs.
    let program = std::env::current_exe()?;
    let command = lab.app_host().command(&program);
    let command = command.args([CWKILL, "doctor", "--json"]);
    let command = command
        .env("container", "docker")
        .env(WITHOUT, "pidfd_getfd: EPERM");
    let document = ran(command)?.json();
    assert_eq!(document["confinement"]["seccomp_mode"], Value::from(2));
    let missing = missing_options(&document);
    let option = "--security-opt=seccomp=unconfined".to_owned();
    assert!(missing.contains(&option), "{missing:?}");
    // Without a sign of a container nothing is missing in one.
    if crate::support::sees_every_process()? && !in_a_container() {
        let document = ran(lab.app_host().command(CWKILL).args(["doctor", "--json"]))?.json();
        assert_eq!(document["confinement"]["container"], Value::Null);
        assert!(missing_options(&document).is_empty(), "{document}");
    }
    Ok(())
}

/// Whether these tests run in a container, by what cwkill looks at too.
fn in_a_container() -> bool {
    let variables = ["container", "KUBERNETES_SERVICE_HOST"];
    let files = ["/.dockerenv", "/run/.containerenv"];
    let cgroup = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    variables
        .iter()
        .any(|name| std::env::var_os(name).is_some())
        || files.iter().any(|file| std::path::Path::new(file).exists())
        || cgroup.lines().any(|line| !line.ends_with(":/"))
}

fn another_pid_namespace_is_named() -> Result<()> {
    let lab = Lab::new()?;
    let words = "--pid --fork --mount-proc --kill-child";
    let command = lab.app_host().command("unshare").args(words.split(' '));
    let document = ran(command.args([CWKILL, "doctor", "--json"]))?.json();
    let confinement = &document["confinement"];
    assert_eq!(confinement["first_pid_namespace"], Value::from(false));
    assert_ne!(confinement["container"], Value::Null);
    let manifest = confinement["missing"]["manifest"].to_string();
    let options = missing_options(&document);
    let is_named = options.contains(&"--pid=host".to_owned()) || manifest.contains("hostPID: true");
    assert!(is_named, "{confinement}");
    Ok(())
}

/// The line about `cwkill trace`: whether it works, and the detail.
fn trace_line(document: &Value) -> Result<(Value, String)> {
    let mut checks = document["checks"].as_array().context("no checks")?.iter();
    let line = checks.find(|check| check["name"] == "trace");
    let line = line.context("no line")?;
    Ok((line["ok"].clone(), at(line, "/detail")))
}

fn doctor_says_whether_a_trace_works() -> Result<()> {
    let lab = Lab::new()?;
    let words = "--pid --fork --mount-proc --kill-child";
    let inside = lab.app_host().command("unshare").args(words.split(' '));
    let cases = [
        (
            plain(
                lab.app_host().command(CWKILL).capabilities(&[]),
                &["doctor", "--json"],
            )?,
            "it needs CAP_BPF and CAP_PERFMON",
        ),
        (
            plain(without(&lab, "bpf")?, &["doctor", "--json"])?,
            "a seccomp filter",
        ),
        (
            ran(inside.args([CWKILL, "doctor", "--json"]))?,
            "inside a pid namespace",
        ),
    ];
    for (ran, why) in cases {
        let (works, detail) = trace_line(&ran.json())?;
        assert_eq!(works, Value::from(false), "{detail}");
        assert!(detail.contains(why), "{detail}");
    }
    Ok(())
}

fn a_trace_works_for_root_of_the_machine() -> Result<()> {
    let lab = Lab::new()?;
    let document = plain(lab.app_host().command(CWKILL), &["doctor", "--json"])?.json();
    let (works, detail) = trace_line(&document)?;
    assert_eq!(works, Value::from(true), "{detail}");
    let found = "the line of code that leaks is found, ";
    let accepts = detail.strip_prefix(found).context(detail.clone())?;
    // This depends on the kernel.
    let is_known = accepts == "and who accepted the connection";
    let is_not = accepts.starts_with("but not who accepted the connection: ");
    assert!(is_known || is_not, "{detail}");
    Ok(())
}
