use std::fs;
use std::path::Path;
use std::sync::Arc;

use super::*;

const ID: &str = "3f4a9b2c1d0e5f6a7b8c9d0e1f2a3b4c5d6e7f8091a2b3c4d5e6f708192a3b4c";
const POD: &str = "8bd1fb9b-72ff-4a6f-8f9e-5d0f3a6c2b17";

struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        Host {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn write(&self, path: &str, text: impl AsRef<[u8]>) {
        let path = self.dir.path().join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn sources(&self) -> Sources {
        let root = HostRoot::open(self.dir.path(), Arc::default()).unwrap();
        Sources::new(root, self.dir.path().join("proc"))
    }

    fn name(&self, runtime: Runtime, user: Option<u32>) -> Result<Option<String>, String> {
        let entry = self.sources().look_up(&wanted(runtime, user))?;
        Ok(entry.name)
    }
}

fn wanted(runtime: Runtime, user: Option<u32>) -> Wanted {
    Wanted {
        runtime,
        id: ID.to_owned(),
        pod_uid: Some(POD.to_owned()),
        user,
    }
}

fn docker_file(name: &str) -> String {
    format!(r#"{{"ID":"{ID}","Name":"/{name}","Config":{{}}}}"#)
}

fn bundle(name: &str) -> String {
    format!(
        r#"{{"ociVersion":"1.1.0","annotations":{{"io.kubernetes.container.name":"{name}","io.kubernetes.pod.name":"web"}}}}"#
    )
}

fn table(name: &str) -> String {
    format!(r#"[{{"id":"{ID}","names":["{name}"]}}]"#)
}

#[test]
fn each_runtime_has_its_files() {
    use Runtime::{Containerd, CriO, Docker, Kubernetes, Podman};
    let file = format!("/containers/{ID}/config.v2.json");
    let task = format!("/io.containerd.runtime.v2.task/k8s.io/{ID}/config.json");
    let userdata = format!("/overlay-containers/{ID}/userdata/config.json");
    let log = format!("/var/log/containers/web_shop_php-{ID}.log");
    let storage = "/var/lib/containers/storage";
    for (runtimes, path, text) in [
        (
            &[Docker, Kubernetes][..],
            format!("/var/lib/docker{file}"),
            docker_file("a"),
        ),
        (
            &[Docker],
            format!("/var/lib/docker/165536.165536{file}"),
            docker_file("a"),
        ),
        (
            &[Docker],
            format!("/var/snap/docker/common/var-lib-docker{file}"),
            docker_file("a"),
        ),
        (
            &[Podman, CriO],
            format!("{storage}/overlay-containers/containers.json"),
            table("a"),
        ),
        (
            &[Podman],
            format!("{storage}/vfs-containers/volatile-containers.json"),
            table("a"),
        ),
        (
            &[Containerd, Kubernetes],
            format!("/run/containerd{task}"),
            bundle("a"),
        ),
        (
            &[Containerd],
            format!("/run/k3s/containerd{task}"),
            bundle("a"),
        ),
        (
            &[CriO, Kubernetes],
            format!("/run/containers/storage{userdata}"),
            bundle("a"),
        ),
        (&[CriO], format!("{storage}{userdata}"), bundle("a")),
    ] {
        let host = Host::new();
        host.write(&path, text);
        for runtime in runtimes {
            assert_eq!(
                host.name(*runtime, None),
                Ok(Some("a".into())),
                "{runtime} {path}"
            );
        }
    }
    let host = Host::new();
    host.write(&log, "");
    for runtime in [Containerd, CriO, Docker, Kubernetes] {
        assert_eq!(
            host.name(runtime, None),
            Ok(Some("php".into())),
            "{runtime}"
        );
    }
    assert!(
        host.name(Podman, None)
            .unwrap_err()
            .contains("containers.json")
    );
}

#[test]
fn the_data_root_is_found() {
    let host = Host::new();
    host.write("/etc/docker/daemon.json", r#"{"data-root":"/srv/docker"}"#);
    host.write(
        &format!("/srv/docker/containers/{ID}/config.v2.json"),
        docker_file("a"),
    );
    assert_eq!(host.name(Runtime::Docker, None), Ok(Some("a".into())));
    let host = Host::new();
    host.write("/proc/7/comm", "dockerd\n");
    host.write("/proc/7/cmdline", "dockerd\0--data-root\0/srv/other\0");
    host.write("/proc/8/comm", "other\n");
    host.write("/proc/8/cmdline", "other\0--data-root\0/srv/wrong\0");
    host.write(
        &format!("/srv/wrong/containers/{ID}/config.v2.json"),
        docker_file("b"),
    );
    host.write(
        &format!("/srv/other/containers/{ID}/config.v2.json"),
        docker_file("a"),
    );
    assert_eq!(host.name(Runtime::Docker, None), Ok(Some("a".into())));
    let host = Host::new();
    host.write(
        "/etc/containers/storage.conf",
        "graphroot = \"/srv/storage\"\n",
    );
    host.write(
        "/srv/storage/overlay-containers/containers.json",
        table("a"),
    );
    assert_eq!(host.name(Runtime::Podman, None), Ok(Some("a".into())));
}

#[test]
fn a_user_has_storage_of_his_own() {
    let host = Host::new();
    host.write("/etc/passwd", "ann:x:1000:1000::/home/ann:/bin/sh\n");
    host.write(
        "/var/lib/containers/storage/overlay-containers/containers.json",
        table("wrong"),
    );
    let storage = "/home/ann/.local/share/containers/storage";
    host.write(
        &format!("{storage}/overlay-containers/containers.json"),
        table("a"),
    );
    assert_eq!(host.name(Runtime::Podman, Some(1000)), Ok(Some("a".into())));
    assert_eq!(host.name(Runtime::Podman, None), Ok(Some("wrong".into())));
    assert!(
        host.name(Runtime::Podman, Some(1001)).is_err(),
        "without a home"
    );
    let docker = "/home/ann/.local/share/docker";
    host.write(
        &format!("{docker}/containers/{ID}/config.v2.json"),
        docker_file("a"),
    );
    assert_eq!(host.name(Runtime::Docker, Some(1000)), Ok(Some("a".into())));
}

#[test]
fn a_name_that_is_cut_off_is_incomplete_and_not_wrong() {
    let host = Host::new();
    host.write(&format!("/var/log/pods/shop_web_{POD}/php/0.log"), "");
    let entry = host
        .sources()
        .look_up(&wanted(Runtime::Containerd, None))
        .unwrap();
    assert_eq!((entry.name, entry.is_complete), (None, false));
    assert_eq!(
        (entry.pod.as_deref(), entry.namespace.as_deref()),
        (Some("web"), Some("shop"))
    );
}

#[test]
fn what_cannot_be_read_is_named() {
    let file = format!("/var/lib/docker/containers/{ID}/config.v2.json");
    let why = |host: &Host| host.name(Runtime::Docker, None).unwrap_err();
    let host = Host::new();
    let missing = why(&host);
    assert!(
        missing.starts_with("no file about it, for example /"),
        "{missing}"
    );
    assert!(missing.ends_with(&file), "{missing}");
    host.write(&file, &docker_file("a")[..20]);
    assert!(why(&host).contains("config.v2.json: it ends too early"));
    host.write(&file, vec![b' '; usize::try_from(MAX_FILE).unwrap() + 1]);
    assert!(why(&host).ends_with("config.v2.json: it is longer than 4 MiB"));
    let path = host.dir.path().join(file.trim_start_matches('/'));
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
    assert!(why(&host).ends_with("it is a symbolic link"));
    // Another source may know it.
    host.write(&format!("/var/log/containers/web_shop_php-{ID}.log"), "");
    assert_eq!(host.name(Runtime::Docker, None), Ok(Some("php".into())));
}

/// As nerdctl names them, with any namespace of containerd.
#[test]
fn any_namespace_of_containerd_is_searched() {
    let host = Host::new();
    let tasks = "/run/containerd/io.containerd.runtime.v2.task";
    let labels =
        r#"{"ociVersion":"1.1.0","annotations":{"nerdctl/name":"a","nerdctl/namespace":"blue"}}"#;
    host.write(&format!("{tasks}/k8s.io/other/config.json"), bundle("b"));
    host.write(&format!("{tasks}/blue/{ID}/config.json"), labels);
    assert_eq!(host.name(Runtime::Containerd, None), Ok(Some("a".into())));
}

#[test]
fn the_storage_of_a_user_is_where_the_configuration_says() {
    let own = "/home/ann/.config/containers/storage.conf";
    let all = "/etc/containers/storage.conf";
    for (config, text, storage) in [
        (own, "[storage]\ngraphroot = \"/srv/ann\"\n", "/srv/ann"),
        (
            own,
            "[storage]\ngraphroot = \"$HOME/pods\"\n",
            "/home/ann/pods",
        ),
        (
            own,
            "[storage]\nrootless_storage_path = \"/srv/$UID\"\n",
            "/srv/1000",
        ),
        (
            all,
            "[storage]\ngraphroot = \"/srv/of-root\"\nrootless_storage_path = \"/srv/${UID}/s\"\n",
            "/srv/1000/s",
        ),
        // What is no path after all is left aside.
        (
            own,
            "[storage]\ngraphroot = \"$SOMEWHERE/pods\"\n",
            "/home/ann/.local/share/containers/storage",
        ),
    ] {
        let host = Host::new();
        host.write("/etc/passwd", "ann:x:1000:1000::/home/ann:/bin/sh\n");
        host.write(config, text);
        host.write(
            &format!("{storage}/overlay-containers/containers.json"),
            table("a"),
        );
        let name = host.name(Runtime::Podman, Some(1000));
        assert_eq!(name, Ok(Some("a".into())), "{config}: {text}");
    }
}

/// The directory of the container is still listed, and its files are gone.
#[test]
fn a_container_that_was_removed_meanwhile_has_no_file() {
    let host = Host::new();
    let tasks = "/run/containerd/io.containerd.runtime.v2.task/default";
    host.write(&format!("{tasks}/{ID}/init.pid"), "7");
    host.write(&format!("/var/lib/docker/containers/{ID}/hostname"), "a");
    host.write(
        "/var/lib/containers/storage/overlay-containers/containers.json",
        "[]",
    );
    for runtime in [Runtime::Containerd, Runtime::Docker, Runtime::Podman] {
        let why = host.name(runtime, None).unwrap_err();
        assert!(why.starts_with("no file about it"), "{runtime}: {why}");
    }
    // A file that is just written is not read as half a name.
    host.write(&format!("{tasks}/{ID}/config.json"), "");
    let why = host.name(Runtime::Containerd, None).unwrap_err();
    assert!(why.contains("config.json: it ends too early"), "{why}");
}

/// Runs `work` on a thread that may read only what the modes of the files allow.
fn without_override(work: impl FnOnce() + Send) {
    use caps::{CapSet, Capability};
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            for capability in [
                Capability::CAP_DAC_OVERRIDE,
                Capability::CAP_DAC_READ_SEARCH,
            ] {
                caps::drop(None, CapSet::Effective, capability).unwrap();
            }
            work();
        });
        thread.join().unwrap();
    });
}

#[test]
fn what_may_not_be_read_is_said_with_its_error() {
    use std::os::unix::fs::PermissionsExt;
    let forbid = |host: &Host, path: &str| {
        let path = host.dir.path().join(path.trim_start_matches('/'));
        fs::set_permissions(path, fs::Permissions::from_mode(0o000)).unwrap();
    };
    let file = format!("/var/lib/docker/containers/{ID}/config.v2.json");
    let tasks = "/run/containerd/io.containerd.runtime.v2.task";
    let storage = "/var/lib/containers/storage";
    let table_of = format!("{storage}/overlay-containers/containers.json");
    for (runtime, written, text, forbidden) in [
        (Runtime::Docker, &file, docker_file("a"), file.as_str()),
        (Runtime::Docker, &file, docker_file("a"), "/var/lib/docker"),
        (
            Runtime::Containerd,
            &format!("{tasks}/blue/{ID}/config.json"),
            bundle("a"),
            tasks,
        ),
        (Runtime::Podman, &table_of, table("a"), storage),
        (
            Runtime::Kubernetes,
            &format!("/var/log/containers/web_shop_php-{ID}.log"),
            String::new(),
            "/var/log/containers",
        ),
    ] {
        let host = Host::new();
        host.write(written, text);
        forbid(&host, forbidden);
        without_override(|| {
            let why = host.name(runtime, None).unwrap_err();
            assert!(
                why.contains(forbidden) && why.ends_with("Permission denied (os error 13)"),
                "{runtime} {forbidden}: {why}"
            );
        });
    }
    // Another place that may be read is searched all the same.
    let host = Host::new();
    host.write(&format!("{tasks}/blue/x"), "");
    forbid(&host, tasks);
    host.write(
        &format!("/run/k3s/containerd/io.containerd.runtime.v2.task/k8s.io/{ID}/config.json"),
        bundle("a"),
    );
    without_override(|| assert_eq!(host.name(Runtime::Containerd, None), Ok(Some("a".into()))));
}

/// The table has very many that have exited; only the ids that are asked for are opened.
#[test]
fn a_table_is_read_once() {
    let host = Host::new();
    let path = "/var/lib/containers/storage/overlay-containers/containers.json";
    let rows: Vec<String> = (0..10_000)
        .map(|number| format!(r#"{{"id":"{number}","names":["old-{number}"],"metadata":"{{}}"}}"#))
        .chain([format!(r#"{{"id":"{ID}","names":["a"]}}"#)])
        .collect();
    host.write(path, format!("[{}]", rows.join(",")));
    let mut sources = host.sources();
    let find = |sources: &mut Sources| sources.look_up(&wanted(Runtime::Podman, None));
    assert_eq!(find(&mut sources).unwrap().name.as_deref(), Some("a"));
    fs::remove_file(host.dir.path().join(Path::new(&path[1..]))).unwrap();
    assert_eq!(find(&mut sources).unwrap().name.as_deref(), Some("a"));
}
