"""Runs cwkill as the DaemonSet does, on a node that this process makes: its pid namespace, in which it is process 1, with its network
namespace, a pod that leaks in a network namespace of its own, and the pod of cwkill in a third one.

node.py CWKILL DIR: manifests.py writes to DIR what this one reads, meanwhile: a policy waits for a minute, and the leaks must be as old.
Run it by `unshare --pid --fork --kill-child --mount --mount-proc --net`.
"""

import ctypes
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
import urllib.request

CWKILL = pathlib.Path(sys.argv[1]).resolve()
WORK = pathlib.Path(sys.argv[2]).resolve()
LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNET = 0x40000000
# A policy waits for the first minute of it.
PATIENCE = 180
# As containerd with the cgroup driver of systemd names it.
ID = "3f4a9b2c" * 8
POD = "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod8bd1fb9b_72ff_4a6f_8f9e_5d0f3a6c2b17.slice"
POD_OF_CWKILL = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod5a0c7a52_0d8b_4b0e_9d55_6f1f1b1f7c11.slice"
LEAK = """
import socket, sys, threading
listener = socket.create_server(("127.0.0.1", 8080))
kept = []
for _ in range(int(sys.argv[1])):
    client = socket.create_connection(("127.0.0.1", 8080))
    accepted, _ = listener.accept()
    client.close()
    accepted.recv(1)
    kept.append(accepted)
print("leaks", flush=True)
threading.Event().wait()
"""


def fail(message):
    sys.exit(f"packaging/kubernetes/test/node.py: {message}")


def expect(condition, message):
    if not condition:
        fail(message)


def run(*command, **options):
    return subprocess.run(command, check=True, text=True, **options)


def wait_until(what, is_so, patience=PATIENCE):
    end = time.monotonic() + patience
    while not (found := is_so()):
        if time.monotonic() > end:
            fail(f"not within {patience} s: {what}")
        time.sleep(0.05)
    return found


def stuck(process):
    """The sockets in CLOSE-WAIT in the network namespace of a process, by ss."""
    return len(inside(process, "ss", "-Htn", "state", "close-wait").splitlines())


def inside(process, *command):
    return run("nsenter", f"--net=/proc/{process.pid}/ns/net", *command, stdout=subprocess.PIPE).stdout


def leak(count, *prefix):
    """A program that keeps this number of connections whose peer has closed them."""
    command = [*prefix, "/usr/bin/python3", "-c", LEAK, str(count)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    expect(process.stdout.readline() == "leaks\n", "the leak does not start")
    return process


class Pod:
    """The container of a DaemonSet: its mounts, its read-only root, its capabilities, its arguments."""

    def __init__(self, manifests, name):
        spec = manifests["DaemonSet"]["spec"]["template"]["spec"]
        [self.container] = spec["containers"]
        self.volumes = {volume["name"]: volume for volume in spec["volumes"]}
        self.config = manifests["ConfigMap"]["data"]
        expect(spec["hostPID"], "no hostPID")
        self.root = WORK / name
        self.script = self.write_script(name)

    def source(self, volume):
        """The directory of the node for a volume."""
        if "hostPath" in volume:
            path = NODE / volume["hostPath"]["path"].lstrip("/")
            if volume["hostPath"]["type"] == "DirectoryOrCreate":
                path.mkdir(parents=True, exist_ok=True)
            expect(path.is_dir(), f"{path} is missing")
            return path
        directory = pathlib.Path(f"{self.root}-config")
        for item in volume["configMap"]["items"]:
            path = directory / item["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.config[item["key"]])
        return directory

    def write_script(self, name):
        """A script that builds the root of the container in its mount namespace, and runs a command in it."""
        mounts = [
            ("/usr", "/usr", True),
            ("/etc/ld.so.cache", "/etc/ld.so.cache", True),
            (CWKILL, "/cwkill", True),
        ]
        for mount in self.container["volumeMounts"]:
            source = self.source(self.volumes[mount["name"]])
            mounts.append((source, mount["mountPath"], mount.get("readOnly", False)))
        lines = ["set -e", f"mkdir -p {self.root}", f"mount -t tmpfs tmpfs {self.root}", f"cd {self.root}", "mkdir proc"]
        lines.append("for link in bin lib lib64 sbin; do cp -a /$link . ; done")
        for source, target, is_read_only in mounts:
            make = "mkdir -p" if os.path.isdir(source) else "mkdir -p etc; touch"
            lines.append(f"{make} .{target}; mount --bind {source} .{target}")
            if is_read_only:
                lines.append(f"mount -o remount,bind,ro .{target}")
        lines.append("mount -t proc proc proc")
        context = self.container["securityContext"]
        if context["readOnlyRootFilesystem"]:
            lines.append(f"mount -o remount,ro {self.root}")
        expect(context["capabilities"]["drop"] == ["ALL"], "not all are dropped")
        added = ",".join("+" + name.lower() for name in context["capabilities"]["add"])
        lines.append("ip link set lo up")
        # A runtime gives root the capabilities of the manifest as its bounding set. The environment is that of a pod.
        lines.append(
            f"exec env -i KUBERNETES_SERVICE_HOST=10.0.0.1 PATH=/usr/bin:/usr/sbin chroot {self.root}"
            f' setpriv --bounding-set=-all,{added} --inh-caps=-all --ambient-caps=-all "$@"'
        )
        script = WORK / f"{name}.sh"
        script.write_text("\n".join(lines) + "\n")
        return script

    def command(self, *arguments):
        # In a cgroup of its own, which is the root of its cgroup namespace: it sees the cgroups of others as /../..
        cgroup = CGROUP / POD_OF_CWKILL / f"cri-containerd-{'c0ffee00' * 8}.scope"
        cgroup.mkdir(parents=True, exist_ok=True)
        enter = 'echo $$ >"$1/cgroup.procs"; shift; exec unshare --cgroup --mount --net sh "$@"'
        return ["sh", "-ec", enter, "sh", cgroup, self.script, *arguments]

    def cwkill(self, *arguments):
        found = subprocess.run(self.command("/cwkill", *arguments), text=True, capture_output=True)
        expect(found.returncode in (0, 1), f"cwkill {arguments}: {found.returncode}: {found.stdout}{found.stderr}")
        return found.stdout


def check_doctor(pod, refused, missing):
    document = json.loads(pod.cwkill("doctor", "--host-root", "/host", "--json"))
    # For sockets of the own user, of others, and without an owner, where that applies.
    columns = ["own", "others", "ownerless"]
    found = {method["name"]: [method[column] for column in columns] for method in document["methods"]}
    expected = {
        "shutdown": ["yes", "yes", None],
        "destroy": ["yes", "yes", "yes"],
        "rst": ["yes", "yes", "yes"],
        "probe": ["yes", "yes", "yes"],
        "reclaim": ["yes", "yes", None],
    }
    expect(found == {**expected, **refused}, f"doctor says {found}: {json.dumps(document['methods'], indent=1)}")
    confinement = document["confinement"]
    expect(confinement["container"] == "kubernetes", confinement)
    found = confinement["missing"]["manifest"]
    # The pid namespace of this test is not the first one of the machine.
    expect(found.pop(0) == "hostPID: true", found)
    expect(found == missing, f"doctor misses {found}, not {missing}")
    directories = [one["path"] for one in confinement["name_directories"]]
    expect(directories == ["/host/var/log/containers", "/host/var/log/pods"], directories)


class Daemon:
    def __init__(self, pod):
        self.log = open(f"{pod.root}.log", "w+")
        command = pod.command("/cwkill", *pod.container["args"])
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        self.port = pod.container["ports"][0]["containerPort"]
        self.probe = pod.container["livenessProbe"]["httpGet"]["path"]

    def get(self, path):
        """As Prometheus and the kubelet do, but from inside the pod. Empty if there is no answer, or another status than 200."""
        expect(self.process.poll() is None, f"the daemon has ended: {self.said()}")
        answer = []

        def ask():
            # Of this thread alone.
            with open(f"/proc/{self.process.pid}/ns/net") as netns:
                expect(LIBC.setns(netns.fileno(), CLONE_NEWNET) == 0, "setns")
            try:
                url = f"http://127.0.0.1:{self.port}{path}"
                answer.append(urllib.request.urlopen(url, timeout=9).read().decode())
            except OSError:
                pass

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        return "".join(answer)

    def said(self):
        self.log.flush()
        return pathlib.Path(self.log.name).read_text()

    def sweeps(self):
        lines = self.get("/metrics").splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith("cwkill_sweeps_total{"))

    def has(self, *series):
        def is_there():
            lines = self.get("/metrics").splitlines()
            return all(one in lines for one in series)

        end = time.monotonic() + PATIENCE
        while not is_there():
            if time.monotonic() > end:
                fail(f"{series} is missing: {self.get('/metrics')}\n{self.said()}")
            time.sleep(0.2)

    def end(self):
        self.process.terminate()
        self.process.wait(PATIENCE)
        expect(self.process.returncode == 0, f"exit status {self.process.returncode}: {self.said()}")


def owner(metric, namespace, pod, container):
    return f'{metric}{{process="python3",unit="",namespace="{namespace}",pod="{pod}",container="{container}"}}'


def check_daemon(manifests, mode, node, web):
    pod = Pod(manifests[mode]["running"], f"daemon-{mode}")
    listed = json.loads(pod.cwkill("--all-netns", "--json"))
    expect(len(listed["sockets"]) == 5, f"the listing: {json.dumps(listed, indent=1)}")
    daemon = Daemon(pod)
    wait_until(f"{daemon.probe} answers", lambda: daemon.get(daemon.probe))
    stuck_sockets = "cwkill_owner_stuck_sockets"
    # Its own, the one of the node and the one of the pod that leaks.
    daemon.has("cwkill_namespaces 3", owner(stuck_sockets, "", "", "") + " 2")
    if mode == "observe":
        daemon.has(
            owner(stuck_sockets, "shop", "web-5c9", "php") + " 3",
            'cwkill_policy_chosen_sockets{policy="shop-php"} 3',
            'cwkill_policy_held{policy="shop-php",reason="observe-mode"} 1',
        )
        # Nothing is missing without NET_ADMIN, also of the listeners of the node and of the pod.
        daemon.has('cwkill_unseen{what="namespaces"} 0', 'cwkill_unseen{what="sockets-without-namespace"} 0')
        before = daemon.sweeps()
        wait_until("three more sweeps", lambda: daemon.sweeps() >= before + 3)
        expect(stuck(web) == 3, "it has closed sockets, and was only to observe")
        expect("--observe keeps policy shop-php from acting" in daemon.said(), daemon.said())
    else:
        daemon.has('cwkill_policy_acts_total{policy="shop-php",result="closed"} 3')
        expect(stuck(web) == 0, "sockets are left")
    expect(stuck(node) == 2, "no policy selects the sockets of the node")
    expect(web.poll() is None and node.poll() is None, "an owner has ended")
    daemon.end()


def prepare_node():
    """The root of the node, with what the kubelet writes, and the pod that leaks."""
    for directory in ["var/log/containers", "var/log/pods/shop_web-5c9_8bd1fb9b-72ff-4a6f-8f9e-5d0f3a6c2b17"]:
        (NODE / directory).mkdir(parents=True)
    (NODE / f"var/log/containers/web-5c9_shop_php-{ID}.log").symlink_to("/var/log/pods/none")
    run("ip", "link", "set", "lo", "up")
    # Of another user than cwkill.
    node = leak(2, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all")
    web = leak(3, "unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    run("mount", "-t", "cgroup2", "none", "/mnt")
    cgroup = CGROUP / POD / f"cri-containerd-{ID}.scope"
    cgroup.mkdir(parents=True)
    (cgroup / "cgroup.procs").write_text(str(web.pid))
    expect((stuck(node), stuck(web)) == (2, 3), "the leaks are not there")
    return node, web


def remove_cgroups(web):
    web.kill()
    web.wait()
    # After a failure there may be more. The kernel removes a cgroup only when its processes are gone.
    (CGROUP / "cgroup.kill").write_text("1")
    wait_until("the processes of the test", lambda: "populated 0" in (CGROUP / "cgroup.events").read_text())
    for directory, _, _ in os.walk(CGROUP, topdown=False):
        os.rmdir(directory)


NODE = WORK / "node"
CGROUP = pathlib.Path(f"/mnt/cwkill-test-kubernetes-{WORK.name}")


def main():
    run("mount", "--make-rprivate", "/")
    node, web = prepare_node()
    try:
        wait_until("the manifests", (WORK / "act.json").exists, patience=1800)
        manifests = {mode: json.loads((WORK / f"{mode}.json").read_text()) for mode in ["observe", "act"]}
        for mode, refused, missing in [
            ("act", {}, []),
            (
                "observe",
                {"destroy": ["no"] * 3, "rst": ["no"] * 3, "probe": ["yes", "yes", "no"]},
                [
                    "containers:",
                    "- securityContext:",
                    "    capabilities: {add: [NET_ADMIN, NET_RAW]}  # NET_ADMIN, NET_RAW: only to act",
                ],
            ),
        ]:
            pod = Pod(manifests[mode], f"doctor-{mode}")
            check_doctor(pod, refused, missing)
            touched = subprocess.run(pod.command("touch", "/x"), capture_output=True, text=True)
            expect("Read-only file system" in touched.stderr, f"the root can be written: {touched}")
            said = pod.cwkill("daemon", "--check-config")
            expect("looks into every network namespace every 30s" in said, said)
        for mode in ["observe", "act"]:
            check_daemon(manifests, mode, node, web)
    finally:
        remove_cgroups(web)
    print("a node: doctor, and the daemon in both modes")


main()
