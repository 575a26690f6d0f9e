"""Renders the manifests and the chart of packaging/kubernetes with kustomize and helm, and checks them.

manifests.py --renew: writes the files of base/ that are the chart with its defaults.
manifests.py DIR: writes what the test of a node needs to DIR: for each mode the DaemonSet and the ConfigMap, as JSON.
"""

import json
import pathlib
import re
import subprocess
import sys

import helm_python as helm
import kubernetes_validate
import yaml

HERE = pathlib.Path(__file__).resolve().parent.parent
CHART = HERE / "helm" / "cwkill"
# The oldest that has appArmorProfile, and the newest of the validator.
VERSIONS = ["1.30", "1.34", "1.37"]
CHECKSUM = "checksum/config"

OBSERVING = ["SYS_PTRACE", "DAC_READ_SEARCH", "SYS_ADMIN"]
ACTING = OBSERVING + ["NET_ADMIN", "NET_RAW"]


def fail(message):
    sys.exit(f"packaging/kubernetes: {message}")


def expect(condition, message):
    if not condition:
        fail(message)


def chart(values):
    """The files of the chart, by name."""
    with helm.Chart.load(CHART) as loaded:
        loaded.validate_schema(values)
        rendered = loaded.render(values, name="cwkill", namespace="cwkill", is_install=True)
    files = {path.rsplit("/", 1)[1]: text for path, text in rendered.items()}
    files.pop("NOTES.txt", None)
    return files


def resources(text):
    """The resources of a text, by kind."""
    found = [one for one in yaml.safe_load_all(text) if one]
    by_kind = {one["kind"]: one for one in found}
    expect(len(by_kind) == len(found), "two resources of one kind")
    return by_kind


def of_chart(values):
    return resources("\n---\n".join(chart(values).values()))


def kustomized(directory):
    """What kustomize makes of a directory."""
    kubectl = pathlib.Path(sys.executable).with_name("kubectl")
    text = subprocess.run(
        [kubectl, "kustomize", HERE / directory], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return resources(text)


def without_checksum(found):
    """The chart notices a change of the configuration by an annotation, which the files for kustomize do not have."""
    found = json.loads(json.dumps(found))
    annotations = found["DaemonSet"]["spec"]["template"]["metadata"]["annotations"]
    expect(re.fullmatch("[0-9a-f]{64}", annotations.pop(CHECKSUM)), "no checksum of the configuration")
    return found


def base_files():
    """The files of base/ that are the chart."""
    files = {}
    for name, text in chart({}).items():
        lines = [line for line in text.splitlines() if CHECKSUM not in line]
        files[name] = "# The chart of ../helm/cwkill with its defaults: scripts/test-kubernetes --renew writes this file.\n" + (
            "\n".join(lines).strip() + "\n"
        )
    return files


def renew():
    for name, text in base_files().items():
        (HERE / "base" / name).write_text(text)


def check_agreement():
    """The chart and the files for kustomize are one source."""
    for name, text in base_files().items():
        expect(
            (HERE / "base" / name).read_text() == text,
            f"base/{name} is not the chart with its defaults: scripts/test-kubernetes --renew",
        )
    policies = yaml.safe_load((HERE / "act" / "policies.yaml").read_text())["data"]["policies.toml"]
    for directory, values in [("base", {}), ("act", {"mode": "act", "policies": policies})]:
        files = kustomized(directory)
        namespace = files.pop("Namespace")
        expect(namespace["metadata"]["name"] == "cwkill", "another namespace")
        expect(files == without_checksum(of_chart(values)), f"{directory} and the chart with {values} differ")


def check_chart():
    """helm lint, as of a release that treats warnings as errors; and values that it must refuse."""
    for values in [{}, {"mode": "act"}, {"imagePullSecrets": [{"name": "x"}], "priorityClassName": "y"}]:
        for version in VERSIONS:
            report = helm.lint(CHART, values, strict=True, namespace="cwkill", kube_version=f"v{version}.0")
            # Severity 1 is information: the chart has no icon.
            bad = [message for message in report["messages"] if message["severity"] > 1]
            expect(not bad and not report["errors"], f"helm lint with {values} for {version}: {report}")
    for values in [
        {"mode": "kill"},
        {"mdoe": "act"},
        {"interval": "fast"},
        {"nameDirectories": ["var/log"]},
        {"seccompProfile": "None"},
        {"image": {"repository": ""}},
        {"address": "localhost"},
    ]:
        try:
            chart(values)
        except helm.HelmError:
            continue
        fail(f"the chart takes {values}")


def check_valid(found):
    for version in VERSIONS:
        for resource in found.values():
            kubernetes_validate.validate(resource, version, strict=True)
    # A validator that accepts everything would prove nothing.
    broken = json.loads(json.dumps(found["DaemonSet"]))
    broken["spec"]["template"]["spec"]["hostPid"] = True
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(broken, version, strict=True)
        except kubernetes_validate.ValidationError:
            continue
        fail(f"the validator takes a field that does not exist in {version}")


def check_confined(found, capabilities):
    """What the DaemonSet may do, and what it may not."""
    expect(set(found) <= {"Namespace", "ConfigMap", "DaemonSet"}, f"also {set(found)}: no role and no service account")
    pod = found["DaemonSet"]["spec"]["template"]["spec"]
    expect(pod["hostPID"] is True, "no hostPID")
    for field in ["hostNetwork", "hostIPC", "serviceAccountName", "initContainers"]:
        expect(field not in pod, f"the pod has {field}")
    expect(pod["automountServiceAccountToken"] is False, "the pod has a token")
    [container] = pod["containers"]
    context = container["securityContext"]
    expect(context["capabilities"] == {"drop": ["ALL"], "add": capabilities}, f"capabilities {context['capabilities']}")
    expect(context["readOnlyRootFilesystem"] is True, "the root can be written")
    expect("privileged" not in context, "it is privileged")
    expect(context["seccompProfile"] == {"type": "RuntimeDefault"}, "another seccomp profile")
    expect(("--observe" in container["args"]) == (capabilities == OBSERVING), f"arguments {container['args']}")
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = container["volumeMounts"]
    expect(sorted(volumes) == sorted(mount["name"] for mount in mounts), "a volume is mounted twice or never")
    for mount in mounts:
        is_own = mount["mountPath"] in ["/var/lib/cwkill", "/run/cwkill"]
        expect(is_own != mount.get("readOnly", False), f"{mount} can be written, or not")
        if mount["mountPath"].startswith("/host/"):
            expect("/host" + volumes[mount["name"]]["hostPath"]["path"] == mount["mountPath"], f"{mount} is another path")
    for probe in ["startupProbe", "readinessProbe", "livenessProbe"]:
        expect(container[probe]["httpGet"] == {"path": "/healthz", "port": "metrics"}, probe)
    [port] = container["ports"]
    annotations = found["DaemonSet"]["spec"]["template"]["metadata"]["annotations"]
    expect(
        (annotations["prometheus.io/port"], annotations["prometheus.io/path"]) == (str(port["containerPort"]), "/metrics"),
        "the annotations for Prometheus",
    )


def check_version():
    cargo = (HERE / "../../Cargo.toml").read_text()
    version = re.search(r'^version = "(.*)"', cargo, re.MULTILINE)[1]
    chart_file = yaml.safe_load((CHART / "Chart.yaml").read_text())
    expect(chart_file["appVersion"] == version, f"Chart.yaml is of version {chart_file['appVersion']}")
    expect(chart_file["version"] == version, f"the chart has version {chart_file['version']}")


# As the example of act/policies.yaml, but it acts, and at once.
POLICY = """
[[policy]]
name = "shop-php"
mode = "act"
expires = 2100-01-01
match = { namespace = "shop", container = "php", cause = "drained" }
min_age = "1m"
share = "100%"
"""


def main():
    if sys.argv[1:] == ["--renew"]:
        return renew()
    check_version()
    check_agreement()
    check_chart()
    modes = {"observe": kustomized("base"), "act": kustomized("act")}
    for mode, capabilities in [("observe", OBSERVING), ("act", ACTING)]:
        check_valid(modes[mode])
        check_confined(modes[mode], capabilities)
        # The daemon of both modes gets the same policy. A sweep each second, so that the test is quick.
        running = of_chart({"mode": mode, "interval": "1s", "policies": POLICY})
        check_confined(running, capabilities)
        check_valid(running)
        # Whole or not at all: the other half waits for it.
        written = pathlib.Path(sys.argv[1], "new")
        written.write_text(json.dumps({**modes[mode], "running": running}))
        written.rename(written.with_name(f"{mode}.json"))
    print("manifests: kustomize and helm agree, valid for Kubernetes", ", ".join(VERSIONS))
    return None


main()
