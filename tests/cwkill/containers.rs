//! Containers by the names in the files of their runtimes. Each test has a host root of its own, with the files as the runtimes write
//! them, and cgroups as the runtimes name them.
//!
//! Other tests run containers without a name at the same time. So no test here counts on the names of all containers.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use netns_harness::{Family, How, Lab, Leak, TcpState};
use serde_json::json;

use crate::cgroups::Cgroups;
use crate::support::{
    CWKILL, PATIENCE, Ran, all_have, alone, at, count, cwkill, cwkill_outside, in_state, lab, ran,
    selects,
};
use crate::trial::{Need, Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(a_container_is_found_and_shown_by_its_name).needs(Need::RootOfTheMachine),
    each_family!(a_name_that_cannot_be_read_may_match).needs(Need::RootOfTheMachine),
    once!(files_that_are_no_metadata_are_named).needs(Need::RootOfTheMachine),
    once!(pods_namespaces_and_services_select_sockets).needs(Need::RootOfTheMachine),
    once!(two_containers_of_one_name_are_both_selected).needs(Need::RootOfTheMachine),
    once!(a_container_is_found_from_outside).needs(Need::RootOfTheMachine),
    once!(a_name_is_escaped).needs(Need::RootOfTheMachine),
    once!(a_file_system_that_hangs_is_left_alone).needs(Need::RootOfTheMachine),
    once!(a_host_root_that_is_none_is_refused),
    once!(an_absent_container_is_named),
    once!(the_next_command_fits_the_container).needs(Need::RootOfTheMachine),
    once!(doctor_counts_the_names).needs(Need::RootOfTheMachine),
];

/// The root directory of a host, with the files of its runtimes.
struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        Ok(Host { dir })
    }

    fn option(&self) -> String {
        format!("--host-root {}", self.dir.path().display())
    }

    fn path(&self, path: &str) -> Result<PathBuf> {
        let path = self.dir.path().join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().context("a directory")?)?;
        Ok(path)
    }

    fn docker(&self, id: &str, name: &str) -> Result<PathBuf> {
        let path = self.path(&format!("/var/lib/docker/containers/{id}/config.v2.json"))?;
        let labels = json!({ "com.docker.compose.service": format!("service-of-{name}") });
        let config = json!({
            "ID": id, "Name": format!("/{name}"), "State": { "Running": true },
            "Config": { "Image": "leaky:1", "Labels": labels },
        });
        fs::write(&path, config.to_string())?;
        Ok(path)
    }

    fn pod(&self, id: &str, namespace: &str, pod: &str, name: &str) -> Result<()> {
        let path = format!("/run/containerd/io.containerd.runtime.v2.task/k8s.io/{id}/config.json");
        let annotations = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.container-name": name,
            "io.kubernetes.cri.image-name": "docker.io/library/php:8",
            "io.kubernetes.cri.sandbox-name": pod,
            "io.kubernetes.cri.sandbox-namespace": namespace,
        });
        let bundle = json!({ "ociVersion": "1.1.0", "annotations": annotations });
        Ok(fs::write(self.path(&path)?, bundle.to_string())?)
    }
}

/// An id that no other test has.
fn id(number: u32) -> String {
    format!("{:08x}{number:08x}", std::process::id()).repeat(4)
}

/// Puts the owner into the cgroup of a docker container.
fn into_docker(cgroups: &Cgroups, leak: &Leak, id: &str) -> Result<()> {
    let path = format!("system.slice/docker-{id}.scope");
    cgroups.put(leak.app().pid(), &path)
}

fn a_container_is_found_and_shown_by_its_name(family: Family) -> Result<()> {
    let (lab, leak) = lab("drained", family, 3)?;
    let cgroups = Cgroups::new(&format!("named-{family:?}"));
    // reclaim looks into every namespace, so the names of the families differ.
    let name = &format!("my-leaky-app-{family:?}").to_lowercase();
    let (host, id) = (Host::new()?, id(20 + family as u32));
    host.docker(&id, name)?;
    into_docker(&cgroups, &leak, &id)?;
    let root = host.option();
    let run = |line: &str| cwkill(&lab, &format!("{line} {root}"));

    let table = run("")?.exits(0).stdout;
    assert!(table.contains(&format!(" {name} ")), "{table}");
    assert!(!table.contains("docker"), "{table}");
    let document = run(&format!("-n --json --container {name}"))?
        .exits(0)
        .json();
    let container = json!({
        "runtime": "docker", "id": id, "name": name, "image": "leaky:1", "pod": null, "namespace": null,
        "pod_uid": null, "compose_service": format!("service-of-{name}"), "unread": null,
    });
    assert_eq!(document["sockets"][0]["owners"][0]["container"], container);
    assert_eq!(document["by_process"][0]["container"], container);
    for name in [name, "my-leaky-*", &id[..12], &id, &format!("other,{name}")] {
        selects(&lab, &format!("--container {name} {root}"), 3)?;
    }
    for other in ["leaky-app", "my-leaky-app", "docker", "MY-LEAKY-*"] {
        selects(&lab, &format!("--container {other} {root}"), 0)?;
    }
    selects(&lab, &format!("--container {name} --port 9 {root}"), 0)?;

    let diagnosis = run(&format!("diagnose --sample 50ms --container {name}"))?.exits(0);
    assert!(
        diagnosis.stdout.contains(&format!(" ({name}): 3 stuck")),
        "{diagnosis:?}"
    );
    let diagnosis = run(&format!("diagnose --sample 50ms --json --container {name}"))?.exits(0);
    assert_eq!(diagnosis.json()["processes"][0]["container"], container);
    let check = run(&format!("check -w 2 -c 9 --container {name}"))?.exits(1);
    assert!(check.stdout.contains("3"), "{check:?}");

    let log = host.path("/audit.jsonl")?;
    let line = format!("--json --container {name} --log-file {}", log.display());
    all_have(&run(&line)?.exits(0).sockets(), "closed", "shutdown");
    let log = fs::read_to_string(log)?;
    assert!(log.contains(&format!(r#""name":"{name}""#)), "{log}");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    assert!(leak.app().is_alive());

    // What is left are dead descriptors.
    let line = format!("reclaim --json --reclaim-age 0s --container {name}");
    // Not its exit status: other tests have containers without a known name.
    let document = run(&line)?.json();
    assert_eq!(document["descriptors"].as_array().map(Vec::len), Some(3));
    assert_eq!(document["descriptors"][0]["container"], container);
    Ok(())
}

fn a_name_that_cannot_be_read_may_match(family: Family) -> Result<()> {
    let (lab, leak) = lab("unread", family, 3)?;
    let waiting = lab.start("not-accepted", family, alone(8001, 2))?;
    let _other = lab.start("unread", family, alone(8002, 4))?;
    let cgroups = Cgroups::new(&format!("unread-{family:?}"));
    let (host, id) = (Host::new()?, id(30 + family as u32));
    into_docker(&cgroups, &leak, &id)?;
    into_docker(&cgroups, &waiting, &id)?;
    let root = host.option();
    for selector in [
        "--container web",
        "--container w*",
        "--pod web",
        "--namespace shop",
        "--compose-service web",
    ] {
        for action in ["-n", ""] {
            let ran = cwkill(&lab, &format!("{action} --json {selector} {root}"))?
                .exits(4)
                .complains("5 more sockets may belong to the selected containers: the names of ")
                .complains("config.v2.json");
            assert!(ran.sockets().is_empty(), "{ran:?}");
            assert_eq!(ran.json()["possible_matches"], json!(5));
            assert_ne!(ran.json()["unnamed_containers"], json!(0));
        }
        let check = cwkill(&lab, &format!("check -w 4 -c 9 {selector} {root}"))?.exits(3);
        assert!(check.stdout.contains("5 more may match"), "{check:?}");
        cwkill(&lab, &format!("diagnose --sample 50ms {selector} {root}"))?
            .exits(4)
            .complains("5 more sockets may belong");
    }
    // By its id it is known.
    selects(&lab, &format!("--container {} {root}", &id[..12]), 5)?;
    // The other process is in no container.
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 9);
    // The document says why.
    let sockets = cwkill(&lab, &format!("-n --json --port 8080 {root}"))?.sockets();
    let why = at(&sockets[0], "/owners/0/container/unread");
    assert!(why.contains("config.v2.json"), "{why}");
    Ok(())
}

/// Each is an error with the name of the file, and the socket may match.
fn files_that_are_no_metadata_are_named() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 2)?;
    let cgroups = Cgroups::new("bad-files");
    let (host, id) = (Host::new()?, id(3));
    into_docker(&cgroups, &leak, &id)?;
    let path = host.docker(&id, "web")?;
    let good = fs::read(&path)?;
    let secret = host.path("/secret")?;
    fs::write(&secret, &good)?;
    type Make<'a> = &'a dyn Fn(&Path) -> Result<()>;
    let cases: [(&str, Make<'_>); 7] = [
        ("it ends too early", &|path| {
            Ok(fs::write(path, &good[..40])?)
        }),
        ("it ends too early", &|path| Ok(fs::write(path, "")?)),
        ("it is not JSON", &|path| Ok(fs::write(path, "secret")?)),
        ("it is longer than 4 MiB", &|path| {
            // A file of holes.
            Ok(fs::File::create(path)?.set_len(1 << 40)?)
        }),
        ("it is a symbolic link", &|path| Ok(symlink(&secret, path)?)),
        ("it is not a regular file", &|path| {
            let made = std::process::Command::new("mkfifo").arg(path).status()?;
            anyhow::ensure!(made.success(), "mkfifo");
            Ok(())
        }),
        ("it is not a regular file", &|path| {
            Ok(fs::create_dir(path)?)
        }),
    ];
    for (why, make) in cases {
        fs::remove_file(&path)?;
        make(&path)?;
        let ran = cwkill(&lab, &format!("--json --container web {}", host.option()))?.exits(4);
        assert_eq!(ran.json()["possible_matches"], json!(2), "{why}");
        let sockets = cwkill(&lab, &format!("-n --json --port 8080 {}", host.option()))?.sockets();
        let unread = at(&sockets[0], "/owners/0/container/unread");
        assert!(
            unread.contains(why) && !unread.contains("secret"),
            "{why}: {unread}"
        );
        assert!(unread.contains("config.v2.json"), "{why}: {unread}");
        if path.is_dir() {
            fs::remove_dir(&path)?;
            fs::write(&path, "")?;
        }
    }
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 2);
    Ok(())
}

fn pods_namespaces_and_services_select_sockets() -> Result<()> {
    let lab = Lab::new()?;
    let cgroups = Cgroups::new("pods");
    let host = Host::new()?;
    let leaks = [
        lab.start("unread", Family::V4, alone(8001, 1))?,
        lab.start("drained", Family::V6, alone(8002, 2))?,
        lab.start("not-accepted", Family::Mapped, alone(8003, 4))?,
        lab.start("unread", Family::V4, alone(8004, 8))?,
    ];
    let ids = [id(4), id(5), id(6), id(7)];
    let slice = "kubepods.slice/kubepods-pod8bd1fb9b_72ff_4a6f_8f9e_5d0f3a6c2b17.slice";
    for (leak, id) in leaks.iter().zip(&ids).take(3) {
        let path = format!("{slice}/cri-containerd-{id}.scope");
        cgroups.put(leak.app().pid(), &path)?;
    }
    into_docker(&cgroups, &leaks[3], &ids[3])?;
    host.pod(&ids[0], "shop", "web-5c9", "php")?;
    host.pod(&ids[1], "shop", "web-5c9", "nginx")?;
    host.pod(&ids[2], "bank", "web-77", "php")?;
    host.docker(&ids[3], "php")?;
    let root = host.option();
    for (selector, expected) in [
        ("--pod web-5c9", 3),
        ("--pod shop/web-5c9", 3),
        ("--pod web-*", 7),
        ("--pod bank/web-*", 4),
        ("--pod shop/api", 0),
        ("--namespace shop", 3),
        ("--namespace shop,bank", 7),
        ("--namespace shop --container php", 1),
        ("--container php", 13),
        ("--compose-service service-of-php", 8),
        ("--compose-service web", 0),
    ] {
        selects(&lab, &format!("{selector} {root}"), expected)?;
    }
    let table = cwkill(&lab, &root)?.exits(0).stdout;
    for text in [
        " shop/web-5c9 (php) ",
        " shop/web-5c9 (nginx) ",
        " bank/web-77 (php) ",
        " php ",
    ] {
        assert!(table.contains(text), "no {text:?} in\n{table}");
    }
    let sockets = cwkill(&lab, &format!("-n --json --port 8001 {root}"))?.sockets();
    let container = |field: &str| at(&sockets[0], &format!("/owners/0/container/{field}"));
    assert_eq!(container("pod"), "web-5c9");
    assert_eq!(container("namespace"), "shop");
    assert_eq!(container("image"), "docker.io/library/php:8");
    assert_eq!(container("pod_uid"), "8bd1fb9b-72ff-4a6f-8f9e-5d0f3a6c2b17");
    cwkill(&lab, &format!("--pod shop/web-5c9 {root} --json"))?.exits(0);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 12);
    Ok(())
}

fn two_containers_of_one_name_are_both_selected() -> Result<()> {
    let lab = Lab::new()?;
    let cgroups = Cgroups::new("twice");
    let host = Host::new()?;
    let first = lab.start("unread", Family::V4, alone(8001, 1))?;
    let second = lab.start("unread", Family::V6, alone(8002, 2))?;
    let (docker, podman) = (id(8), id(9));
    into_docker(&cgroups, &first, &docker)?;
    let path = format!("machine.slice/libpod-{podman}.scope");
    cgroups.put(second.app().pid(), &path)?;
    host.docker(&docker, "twice")?;
    let storage = "/var/lib/containers/storage/overlay-containers/containers.json";
    let table = json!([{ "id": podman, "names": ["twice"] }]);
    fs::write(host.path(storage)?, table.to_string())?;
    let both = format!("docker {}, podman {}", &docker[..12], &podman[..12]);
    let note =
        format!("--container twice: 2 containers have this name, and all are selected: {both}");
    let line = format!("--json --container twice {}", host.option());
    let ran = cwkill(&lab, &format!("-n {line}"))?
        .exits(0)
        .complains(&note);
    assert_eq!(ran.sockets().len(), 3);
    cwkill(&lab, &line)?.exits(0).complains(&note);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}

/// A selector of containers leads into their network namespaces.
fn a_container_is_found_from_outside() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 3)?;
    let cgroups = Cgroups::new("outside");
    let (host, id) = (Host::new()?, id(10));
    into_docker(&cgroups, &leak, &id)?;
    host.docker(&id, "seen-from-outside")?;
    let run = |line: &str| -> Result<Ran> {
        let line = format!("--json --min-idle 0s --container seen-from-outside {line}");
        let mut command = cwkill_outside();
        command.args(line.split_whitespace());
        command.arg("--host-root").arg(host.dir.path());
        Ran::of(&line, command.output()?)
    };
    let listed = run("-n")?.exits(0).json();
    assert_eq!(listed["sockets"].as_array().map(Vec::len), Some(3));
    // In the namespace of this test there is none.
    let here = run("-n -N /proc/self/ns/net")?.json();
    assert_eq!(here["sockets"].as_array().map(Vec::len), Some(0));
    let closed = run("")?.json();
    assert_eq!(closed["summary"]["closed"], json!(3), "{closed}");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    assert!(leak.app().is_alive());
    Ok(())
}

/// The author of a container chooses its name and labels.
fn a_name_is_escaped() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 1)?;
    let cgroups = Cgroups::new("escaped");
    let (host, id) = (Host::new()?, id(11));
    into_docker(&cgroups, &leak, &id)?;
    host.docker(&id, "a\u{1b}[31mb\n\u{202e}c")?;
    let root = host.option();
    for line in [
        "",
        "-v",
        "--json",
        "-n",
        "diagnose --sample 50ms",
        "diagnose --sample 50ms --json",
        "check -w 0",
        "--port 8080",
    ] {
        let ran = cwkill(&lab, &format!("{line} {root}"))?;
        for text in [&ran.stdout, &ran.stderr] {
            assert!(!text.contains(['\u{1b}', '\u{202e}']), "{line}: {ran:?}");
        }
    }
    Ok(())
}

/// A file system whose server never answers, as of a host that is gone.
fn a_file_system_that_hangs_is_left_alone() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 2)?;
    let cgroups = Cgroups::new("hangs");
    let (host, id) = (Host::new()?, id(12));
    into_docker(&cgroups, &leak, &id)?;
    let data = host.path("/var/lib/docker/here")?;
    let data = data.parent().context("a directory")?.display();
    for (line, code) in [("--port 8080 -n", 0), ("--container web", 4)] {
        let script = format!(
            "exec 3<>/dev/fuse
             mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 none {data}
             exec {CWKILL} --json {line} {}",
            host.option()
        );
        let command = lab.app_host().command("unshare");
        let listed = ran(command.args(["-m", "sh", "-ec", &script]))?.exits(code);
        if code == 0 {
            let why = at(&listed.sockets()[0], "/owners/0/container/unread");
            assert!(
                why.contains("/var/lib/docker/") && why.ends_with("no answer within 3 s"),
                "{why}"
            );
        } else {
            assert_eq!(listed.json()["possible_matches"], json!(2));
        }
    }
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 2);
    Ok(())
}

fn a_host_root_that_is_none_is_refused() -> Result<()> {
    let lab = Lab::new()?;
    let _leak = lab.start("unread", Family::V4, count(1))?;
    for line in ["", "--port 8080", "diagnose", "reclaim", "reclaim --all -n"] {
        cwkill(&lab, &format!("{line} --host-root /no/such/root"))?
            .exits(3)
            .complains("cannot use --host-root /no/such/root: No such file or directory");
    }
    let check = cwkill(&lab, "check -w 1 --host-root /no/such/root")?.exits(3);
    assert!(
        check.stdout.contains("--host-root /no/such/root"),
        "{check:?}"
    );
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 1);
    Ok(())
}

/// In a pid namespace of its own, where no other test has containers.
fn an_absent_container_is_named() -> Result<()> {
    let lab = Lab::new()?;
    for (selector, text) in [
        (
            "--container nobody-web",
            "no process is in the container nobody-web",
        ),
        ("--pod shop/nobody", "no process is in the pod shop/nobody"),
        (
            "--namespace blue",
            "no process is in the kubernetes namespace blue; for a network namespace use --netns",
        ),
        (
            "--compose-service nobody",
            "no process is in the compose service nobody",
        ),
    ] {
        for command in ["", "-n", "diagnose --sample 10ms", "reclaim"] {
            let unshare = "--pid --fork --kill-child --mount-proc";
            let host = lab.app_host().command("unshare");
            let line = format!("{CWKILL} {command} {selector}");
            let words = unshare.split(' ').chain(line.split_whitespace());
            ran(host.args(words))?.exits(1).complains(text);
        }
    }
    Ok(())
}

/// A program with the name of a language runtime and a stuck socket, in a pid namespace of its own. Its number there is 1: the last one
/// of NSpid.
fn the_next_command_fits_the_container() -> Result<()> {
    let lab = Lab::new()?;
    let cgroups = Cgroups::new("next");
    let (host, id) = (Host::new()?, id(13));
    host.docker(&id, "next-command")?;
    let program = host.path("/bin/dotnet")?;
    fs::copy("/bin/bash", &program)?;
    let peer = lab.app_host().agent("peer")?;
    let listener = peer.listen("127.0.0.1:7000".parse()?, false, 8)?;
    let script = "exec 5<>/dev/tcp/127.0.0.1/7000; read -r _";
    let unshare = ["--pid", "--fork", "--kill-child"];
    let command = lab.app_host().command("unshare").args(unshare);
    let command = command.arg(&program).args(["-c", script]);
    let mut child = command.stdin(std::process::Stdio::piped()).spawn()?;
    let ends = peer.accept(listener, 1, PATIENCE)?;
    peer.shutdown(&[ends[0].fd], How::Write)?;
    lab.wait_for(PATIENCE, || Ok(in_state(&lab, TcpState::CloseWait)? == 1))?;
    let next = |line: &str| -> Result<(serde_json::Value, String)> {
        let line = format!("diagnose --sample 50ms --json {line} {}", host.option());
        let process = cwkill(&lab, &line)?.exits(0).json()["processes"][0].clone();
        let command = at(&process, "/next/command");
        Ok((process, command))
    };
    let (process, command) = next("")?;
    let pid = process["pid"].as_u64().context("a pid")?;
    assert_eq!(command, format!("dotnet-stack report -p {pid}"));
    let path = format!("system.slice/docker-{id}.scope");
    cgroups.put(u32::try_from(pid)?, &path)?;
    let (_, command) = next("--container next-command")?;
    assert_eq!(command, "docker exec next-command dotnet-stack report -p 1");
    host.pod(&id, "shop", "web-5c9", "app")?;
    let path = format!("kubepods.slice/cri-containerd-{id}.scope");
    cgroups.put(u32::try_from(pid)?, &path)?;
    let (_, command) = next("--pod web-5c9")?;
    assert_eq!(
        command,
        "kubectl exec -n shop web-5c9 -c app -- dotnet-stack report -p 1"
    );
    child.kill()?;
    child.wait()?;
    Ok(())
}

/// Other tests may have containers of docker too, whose names this host root does not have.
fn doctor_counts_the_names() -> Result<()> {
    let lab = Lab::new()?;
    let cgroups = Cgroups::new("doctor");
    let (host, known, unknown) = (Host::new()?, id(14), id(15));
    host.docker(&known, "known")?;
    let names = |containers: &[&str]| -> Result<serde_json::Value> {
        let mut children = Vec::new();
        for container in containers {
            let child = std::process::Command::new("sleep").arg("600").spawn()?;
            let path = format!("system.slice/docker-{container}.scope");
            cgroups.put(child.id(), &path)?;
            children.push(child);
        }
        let line = format!("doctor --json {}", host.option());
        let document = cwkill(&lab, &line)?.json();
        for child in &mut children {
            child.kill()?;
            child.wait()?;
        }
        let checks = document["checks"].as_array().context("checks")?;
        let found = checks
            .iter()
            .find(|check| check["name"] == "container names");
        Ok(found.context("no line about names")?.clone())
    };
    let found = names(&[&known])?;
    let detail = at(&found, "/detail");
    assert!(detail.contains("docker 1 of "), "{detail}");
    let found = names(&[&known, &unknown])?;
    assert_eq!(found["ok"], json!(false));
    let detail = at(&found, "/detail");
    assert!(
        detail.contains("docker 1 of ") && detail.contains("config.v2.json"),
        "{detail}"
    );
    Ok(())
}
