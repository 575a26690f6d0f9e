//! The cgroup paths that each runtime makes.

use super::*;
use proptest::prelude::*;

const ID: &str = "3f4a9b2c1d0e5f6a7b8c9d0e1f2a3b4c5d6e7f8091a2b3c4d5e6f708192a3b4c";
const OTHER: &str = "c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00";
const POD: &str = "8bd1fb9b-72ff-4a6f-8f9e-5d0f3a6c2b17";
const POD_: &str = "8bd1fb9b_72ff_4a6f_8f9e_5d0f3a6c2b17";
const STATIC_POD: &str = "f7c0d7a55f0b9c6c8c1b1d8f0a3e4b21";

/// Replaces `{ID}`, `{OTHER}`, `{POD}`, `{POD_}` and `{STATIC}` in `text` by the constants.
fn expand(text: &str) -> String {
    text.replace("{ID}", ID)
        .replace("{OTHER}", OTHER)
        .replace("{POD}", POD)
        .replace("{POD_}", POD_)
        .replace("{STATIC}", STATIC_POD)
}

/// `unit | runtime id name pod`, with `-` for an unknown field.
fn summary(text: &str) -> String {
    let cgroup = Cgroup::parse(&expand(text));
    let or_dash = |text: &Option<String>| text.clone().unwrap_or("-".into());
    let container = cgroup.container.map_or("-".into(), |c| {
        format!(
            "{} {} {} {}",
            c.runtime,
            or_dash(&c.id),
            or_dash(&c.name),
            or_dash(&c.pod_uid)
        )
    });
    format!("{} | {container}", or_dash(&cgroup.unit))
}

#[test]
fn paths_of_every_runtime() {
    let table = [
        // systemd, cgroup v2.
        ("0::/system.slice/nginx.service", "nginx.service | -"),
        (
            "0::/system.slice/system-getty.slice/getty@tty1.service",
            "getty@tty1.service | -",
        ),
        ("0::/system.slice/nginx.service/worker", "nginx.service | -"),
        (
            "0::/user.slice/user-1000.slice/session-3.scope",
            "session-3.scope | -",
        ),
        (
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-gnome-firefox-4711.scope",
            "app-gnome-firefox-4711.scope | -",
        ),
        (
            "0::/user.slice/user-1000.slice/user@1000.service/init.scope",
            "user@1000.service | -",
        ),
        ("0::/init.scope", "init.scope | -"),
        ("0::/system.slice", "- | -"),
        ("0::/", "- | -"),
        ("0::/system.slice/old.service (deleted)", "old.service | -"),
        // docker, systemd driver and cgroupfs, v2.
        (
            "0::/system.slice/docker-{ID}.scope",
            "docker-{ID}.scope | docker {ID} - -",
        ),
        ("0::/docker/{ID}", "- | docker {ID} - -"),
        // systemd in a container.
        (
            "0::/docker/{ID}/system.slice/ssh.service",
            "ssh.service | docker {ID} - -",
        ),
        ("0::/docker/{ID}/init.scope", "init.scope | docker {ID} - -"),
        // Rootless docker.
        (
            "0::/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{ID}.scope",
            "docker-{ID}.scope | docker {ID} - -",
        ),
        // Seen from a sibling's cgroup namespace.
        (
            "0::/../docker-{ID}.scope",
            "docker-{ID}.scope | docker {ID} - -",
        ),
        // dockerd and containerd themselves.
        ("0::/system.slice/docker.service", "docker.service | -"),
        (
            "0::/system.slice/containerd.service",
            "containerd.service | -",
        ),
        // docker, v1 without systemd, then hybrid.
        (
            "11:memory:/docker/{ID}\n4:cpu,cpuacct:/docker/{ID}\n1:name=systemd:/docker/{ID}\n",
            "- | docker {ID} - -",
        ),
        (
            "12:pids:/system.slice/docker-{ID}.scope\n1:name=systemd:/system.slice/docker-{ID}.scope\n\
             0::/system.slice/docker-{ID}.scope\n",
            "docker-{ID}.scope | docker {ID} - -",
        ),
        // Amazon ECS.
        (
            "9:memory:/ecs/my-cluster/0123456789abcdef0123456789abcdef/{ID}",
            "- | docker {ID} - -",
        ),
        // containerd by nerdctl, root and rootless, and cgroupfs.
        (
            "0::/system.slice/nerdctl-{ID}.scope",
            "nerdctl-{ID}.scope | containerd {ID} - -",
        ),
        ("0::/default/{ID}", "- | containerd {ID} - -"),
        // kubernetes with containerd, systemd driver: burstable, guaranteed, static pod.
        (
            "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{POD_}.slice/\
             cri-containerd-{ID}.scope",
            "cri-containerd-{ID}.scope | containerd {ID} - {POD}",
        ),
        (
            "0::/kubepods.slice/kubepods-pod{POD_}.slice/cri-containerd-{ID}.scope",
            "cri-containerd-{ID}.scope | containerd {ID} - {POD}",
        ),
        (
            "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC}.slice/\
             cri-containerd-{ID}.scope",
            "cri-containerd-{ID}.scope | containerd {ID} - {STATIC}",
        ),
        // The kubelet uses systemd, containerd does not.
        (
            "0::/system.slice/containerd.service/kubepods-besteffort-pod{POD_}.slice:cri-containerd:{ID}",
            "containerd.service | containerd {ID} - {POD}",
        ),
        // cgroupfs: the path does not name the runtime.
        (
            "0::/kubepods/burstable/pod{POD}/{ID}",
            "- | kubernetes {ID} - {POD}",
        ),
        (
            "11:cpuset:/kubepods/besteffort/pod{POD}/{ID}\n1:name=systemd:/kubepods/besteffort/pod{POD}/{ID}",
            "- | kubernetes {ID} - {POD}",
        ),
        // A node of kind, which is a docker container.
        (
            "0::/system.slice/docker-{OTHER}.scope/kubelet.slice/kubelet-kubepods.slice/\
             kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{POD_}.slice/\
             cri-containerd-{ID}.scope",
            "cri-containerd-{ID}.scope | containerd {ID} - {POD}",
        ),
        (
            "0::/docker/{OTHER}/kubelet/kubepods/burstable/pod{POD}/{ID}",
            "- | kubernetes {ID} - {POD}",
        ),
        // kubernetes with docker.
        (
            "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{POD_}.slice/\
             docker-{ID}.scope",
            "docker-{ID}.scope | docker {ID} - {POD}",
        ),
        // CRI-O, its monitor, and cgroupfs.
        (
            "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{POD_}.slice/\
             crio-{ID}.scope",
            "crio-{ID}.scope | cri-o {ID} - {POD}",
        ),
        (
            "0::/kubepods.slice/kubepods-pod{POD_}.slice/crio-{ID}.scope/container",
            "crio-{ID}.scope | cri-o {ID} - {POD}",
        ),
        (
            "0::/kubepods.slice/kubepods-pod{POD_}.slice/crio-conmon-{ID}.scope",
            "crio-conmon-{ID}.scope | -",
        ),
        ("0::/kubepods/pod{POD}/crio-{ID}", "- | cri-o {ID} - {POD}"),
        // podman: as root, rootless, in a podman pod, with cgroupfs, in a unit made by quadlet.
        (
            "0::/machine.slice/libpod-{ID}.scope",
            "libpod-{ID}.scope | podman {ID} - -",
        ),
        (
            "0::/machine.slice/libpod-{ID}.scope/container",
            "libpod-{ID}.scope | podman {ID} - -",
        ),
        (
            "0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container",
            "libpod-{ID}.scope | podman {ID} - -",
        ),
        (
            "0::/machine.slice/machine-libpod_pod_{OTHER}.slice/libpod-{ID}.scope",
            "libpod-{ID}.scope | podman {ID} - -",
        ),
        ("9:pids:/libpod_parent/libpod-{ID}", "- | podman {ID} - -"),
        (
            "0::/system.slice/web.service/libpod-payload-{ID}",
            "web.service | podman {ID} - -",
        ),
        // The monitor of podman is not a container.
        (
            "0::/machine.slice/libpod-conmon-{ID}.scope",
            "libpod-conmon-{ID}.scope | -",
        ),
        ("0::/system.slice/web.service/runtime", "web.service | -"),
        // systemd-nspawn: started by machinectl, its own process, started by hand, an escaped name.
        (
            "0::/machine.slice/systemd-nspawn@web.service/payload/system.slice/nginx.service",
            "nginx.service | systemd-nspawn - web -",
        ),
        (
            "0::/machine.slice/systemd-nspawn@web.service/supervisor",
            "systemd-nspawn@web.service | -",
        ),
        (
            "0::/machine.slice/machine-web.scope/payload/init.scope",
            "machine-web.scope | systemd-nspawn - web -",
        ),
        (
            "1:name=systemd:/machine.slice/machine-web\\x2d1.scope/system.slice/nginx.service",
            "nginx.service | systemd-nspawn - web-1 -",
        ),
        (
            "0::/machine.slice/machine-web.scope/supervisor",
            "machine-web.scope | -",
        ),
        // A virtual machine of libvirt.
        (
            "0::/machine.slice/machine-qemu\\x2d1\\x2dvm.scope/libvirt/emulator",
            "machine-qemu\\x2d1\\x2dvm.scope | -",
        ),
        // LXC: cgroup v1, LXC 4.0, later versions and their monitor, Proxmox VE.
        (
            "4:memory:/lxc/web\n1:name=systemd:/lxc/web/system.slice/ssh.service",
            "ssh.service | lxc - web -",
        ),
        ("0::/lxc.payload/web", "- | lxc - web -"),
        (
            "0::/lxc.payload.web/system.slice/nginx.service",
            "nginx.service | lxc - web -",
        ),
        ("0::/lxc.monitor.web", "- | -"),
        (
            "0::/lxc/101/ns/system.slice/nginx.service",
            "nginx.service | lxc - 101 -",
        ),
        // docker in LXC: the innermost container counts.
        (
            "0::/lxc.payload.web/system.slice/docker-{ID}.scope",
            "docker-{ID}.scope | docker {ID} - -",
        ),
        // Names that resemble a container.
        (
            "0::/system.slice/docker-cleanup.service",
            "docker-cleanup.service | -",
        ),
        ("0::/docker/buildkit/x1", "- | -"),
        ("0::/podcast/{ID}", "- | -"),
        ("0::/kubepods/burstable/podabc/{ID}", "- | -"),
        ("0::/.service/.scope", "- | -"),
        // No valid line.
        ("", "- | -"),
        ("nonsense\n0:\n0::relative\n", "- | -"),
    ];
    for (text, expected) in table {
        assert_eq!(summary(text), expand(expected), "{text}");
    }
}

#[test]
fn unit_and_container_may_come_from_different_hierarchies() {
    // A hybrid host: only the hierarchy of systemd has the unit, only a controller has the container.
    let text = "5:memory:/docker/{ID}\n1:name=systemd:/system.slice/web.service\n0::/\n";
    assert_eq!(summary(text), expand("web.service | docker {ID} - -"));
    let cgroup = Cgroup::parse("3:cpu:/a\n2:pids:/b\n1:name=systemd:/b\n0::/c\n");
    assert_eq!(cgroup.paths, ["/c", "/b", "/a"]);
}

#[test]
fn below_is_the_cgroup_and_all_in_it() {
    assert!(Cgroup::default().is_below("/"));
    let cgroup = Cgroup::parse("0::/system.slice/web.service/worker\n4:memory:/limits/web\n");
    for path in [
        "/system.slice",
        "/system.slice/",
        "/system.slice/web.service",
        "/system.slice/web.service/worker",
        "/limits",
        "/limits/web",
        "/",
    ] {
        assert!(cgroup.is_below(path), "{path}");
    }
    for path in [
        "/system",
        "/system.slice/web",
        "/system.slice/web.service/worker/x",
        "/web",
    ] {
        assert!(!cgroup.is_below(path), "{path}");
    }
}

/// The kernel does not escape names, and refuses a line feed in them (kernel/cgroup/cgroup.c, cgroup_mkdir).
#[test]
fn a_name_that_looks_like_a_mark_of_the_kernel_is_a_name_too() {
    let cgroup = Cgroup::parse("0::/batch/x y (deleted)");
    for path in ["/batch", "/batch/x y (deleted)", "/batch/x y"] {
        assert!(cgroup.is_below(path), "{path}");
    }
    assert!(!cgroup.is_below("/batch/x"));
    let below = Cgroup::parse("0::/batch (deleted)/web.service");
    assert_eq!(below.unit.as_deref(), Some("web.service"));
    assert!(below.is_below("/batch (deleted)") && !below.is_below("/batch"));
}

#[test]
fn the_id_of_a_container_may_be_abbreviated() {
    let docker = container(&format!("docker/{ID}"));
    assert!(docker.has_id(ID));
    assert!(docker.has_id(&ID[..12]) && docker.has_id(&ID[..8]));
    assert!(!docker.has_id(&ID[..7]), "too short to mean one");
    assert!(!docker.has_id(&OTHER[..12]) && !docker.has_id(""));
    assert!(docker.may_have_a_name() && docker.may_be_in_a_pod());
    let lxc = container("lxc.payload.webserver-1");
    assert!(!lxc.has_id("webserver-1"));
    assert!(!lxc.may_have_a_name() && !lxc.may_be_in_a_pod());
}

#[test]
fn a_container_is_shown_by_the_shortest_clear_text() {
    let lxc = container("lxc.payload.webserver-1");
    assert_eq!(lxc.to_string(), "lxc webserver-1");
    let mut one = container(&format!("docker/{ID}"));
    assert_eq!(one.to_string(), "docker 3f4a9b2c1d0e");
    one.name = Some("my-leaky-app".into());
    assert_eq!(one.to_string(), "my-leaky-app");
    one.name = Some("php".into());
    one.facts.pod = Some("web-5c9".into());
    assert_eq!(one.to_string(), "web-5c9 (php)");
    one.facts.namespace = Some("shop".into());
    assert_eq!(one.to_string(), "shop/web-5c9 (php)");
    one.name = None;
    assert_eq!(one.to_string(), "shop/web-5c9");
}

fn container(path: &str) -> Container {
    let cgroup = Cgroup::parse(&format!("0::/{path}"));
    cgroup.container.expect("a container")
}

#[test]
fn escapes_of_systemd() {
    assert_eq!(unescape("a\\x2db"), "a-b");
    assert_eq!(unescape("\\xe2\\x82\\xac"), "€");
    for same in ["", "a-b", "a\\", "a\\x2", "a\\xzz", "\\xff"] {
        assert_eq!(unescape(same), same);
    }
}

proptest! {
    #[test]
    fn no_text_is_too_strange(text in "[0-9a-f:/.@\\\\x_podlkubescrini=\n -]{0,300}") {
        let cgroup = Cgroup::parse(&text);
        prop_assert!(cgroup.paths.iter().all(|path| path.starts_with('/')));
    }

    #[test]
    fn unescaping_never_panics(text in "[\\\\xa-f0-9é]{0,30}") {
        unescape(&text);
    }
}

#[test]
fn the_user_who_runs_a_container() {
    let user = |path: &str| Cgroup::parse(&format!("0::{path}")).user();
    let of_user = "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-77.scope";
    assert_eq!(user(of_user), Some(1000));
    assert_eq!(user("/user.slice/user-0.slice/session-1.scope"), None);
    assert_eq!(user("/machine.slice/libpod-77.scope"), None);
}
