"""The manifests match Kubernetes' schemas and the relay."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from kubernetes_validate import ValidationError

from relay.cli import cli
from relay.config import LIVE_TIMEOUT
from relay.system.shutdown import LEAVE_TIMEOUT, STOP_TIMEOUT
from relay.system.succession import PREPARATION

TOP = Path(__file__).parents[2]
KUBERNETES = TOP / "deploy" / "kubernetes"

VERSIONS = ("1.28", "1.37")
"""The oldest version that providers run, and the newest version with published schemas."""

BYTES_PER_ALLOCATION = 45_000
OF_TOOLS = {"kustomization.yaml", "podmonitor.yaml"}
"""Kinds that are not those of Kubernetes itself."""
FILES = sorted(each for each in KUBERNETES.rglob("*.yaml") if each.name not in OF_TOOLS)

Manifest: TypeAlias = dict[str, Any]

needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kustomizations are not put together: kubectl is NOT INSTALLED"
)


def check(manifest: Manifest) -> None:
    """Validate a manifest without a cluster, including unknown fields.

    Raises:
        ValidationError: a cluster would reject the manifest.
    """
    for version in VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.fixture
def daemonset() -> Manifest:
    loaded: Manifest = yaml.safe_load((KUBERNETES / "relay" / "daemonset.yaml").read_text())
    return loaded


@pytest.fixture
def pod(daemonset: Manifest) -> Manifest:
    spec: Manifest = daemonset["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def container(pod: Manifest) -> Manifest:
    (found,) = pod["containers"]
    assert isinstance(found, dict)
    return found


def settings(container: Manifest) -> dict[str, str]:
    """Return the environment without values filled in by Kubernetes."""
    return {each["name"]: each["value"] for each in container["env"] if "value" in each}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(KUBERNETES)))
def test_each_manifest_is_valid(path: Path) -> None:
    for manifest in yaml.safe_load_all(path.read_text()):
        if path.parent.name != "relay":
            # A patch: the base contains the required fields.
            manifest["spec"] |= {"selector": {}}
            for each in manifest["spec"]["template"]["spec"]["containers"]:
                each.setdefault("image", "firezone-relay")
                each["env"] = [variable for variable in each["env"] if variable.pop("$patch", None) != "delete"]
        check(manifest)


def broken_type(manifest: Manifest) -> None:
    manifest["spec"]["template"]["spec"]["volumes"][0]["hostPath"] = "/run/firezone-relay"


def broken_name(manifest: Manifest) -> None:
    probe = manifest["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]
    probe["periodSecond"] = probe.pop("periodSeconds")


def broken_place(manifest: Manifest) -> None:
    manifest["spec"]["template"]["spec"]["capabilities"] = {"drop": ["ALL"]}


def broken_lack(manifest: Manifest) -> None:
    del manifest["spec"]["selector"]


def broken_number(manifest: Manifest) -> None:
    manifest["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = "5m"


@pytest.mark.parametrize("breaks", [broken_type, broken_name, broken_place, broken_lack, broken_number])
def test_an_invalid_manifest_is_detected(daemonset: Manifest, breaks: Callable[[Manifest], None]) -> None:
    breaks(daemonset)
    with pytest.raises(ValidationError):
        check(daemonset)


def check_monitor(monitor: Manifest, template: Manifest) -> None:
    """Check that a PodMonitor selects the relays, and scrapes the metrics address."""
    assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    (container,) = template["spec"]["containers"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    # Prometheus would find a port by name or number among the declared ports only.
    assert endpoint.keys() == {"interval", "relabelings"}
    of_container, address, *_, without_pod = endpoint["relabelings"]
    assert (of_container["action"], of_container["regex"]) == ("keep", container["name"])
    assert address["targetLabel"] == "__address__"
    assert settings(container)["METRICS_ADDR"] == address["replacement"].replace("$1", "$(POD_IP)")
    assert without_pod == {"action": "labeldrop", "regex": "pod"}
    names = [each["name"] for each in container["env"]]
    assert names.index("POD_IP") < names.index("METRICS_ADDR"), "Kubernetes expands earlier variables only"


@needs_kubectl
@pytest.mark.parametrize("components", [[], ["offload"], ["discovery"], ["offload", "discovery", "metrics"]])
def test_the_output_of_kustomize_is_valid(tmp_path: Path, components: list[str]) -> None:
    made = shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    top = yaml.safe_load((made / "kustomization.yaml").read_text())
    (made / "kustomization.yaml").write_text(yaml.safe_dump(top | {"components": components}))
    done = subprocess.run(["kubectl", "kustomize", str(made)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    manifests = {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}
    monitors = [manifests.pop("PodMonitor")] if "metrics" in components else []
    assert set(manifests) == {"Namespace", "PriorityClass", "DaemonSet"}
    for each in manifests.values():
        check(each)
    check_ports(manifests["DaemonSet"])
    for monitor in monitors:
        check_monitor(monitor["spec"], manifests["DaemonSet"]["spec"]["template"])
    (container,) = manifests["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    assert container["image"].startswith("registry.example.com/firezone-relay:")
    assert "FIREZONE_TOKEN" in settings(container)
    assert ("EBPF_OFFLOADING" in settings(container)) == ("offload" in components)
    # With discovery no public address is set, because a set address would take precedence.
    discovers = "discovery" in components
    names = {each["name"] for each in container["env"]}
    assert ("LISTEN_ADDRESS_DISCOVERY_METHOD" in names, "PUBLIC_IP4_ADDR" in names) == (discovers, not discovers)


def test_the_program_accepts_the_settings(container: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in container["env"]:
        value = each.get("value") or {"status.hostIP": "192.0.2.7"}.get(each["valueFrom"]["fieldRef"]["fieldPath"], "node-1")
        monkeypatch.setenv(each["name"], value)
    with cli.make_context("firezone-relay", []) as context:
        assert str(context.params["public_ip4"]) == "192.0.2.7"
        assert context.params["name"] == "node-1"
        assert context.params["api_url"].is_tls


def test_the_cloud_for_discovery_is_a_supported_cloud(monkeypatch: pytest.MonkeyPatch) -> None:
    patch = yaml.safe_load((KUBERNETES / "discovery" / "daemonset.yaml").read_text())
    (container,) = patch["spec"]["template"]["spec"]["containers"]
    method = settings(container)["LISTEN_ADDRESS_DISCOVERY_METHOD"]
    monkeypatch.setenv("LISTEN_ADDRESS_DISCOVERY_METHOD", method)
    with cli.make_context("firezone-relay", []) as context:
        assert context.params["discovery"] == method


def test_the_grace_period_covers_the_drain(pod: Manifest, container: Manifest) -> None:
    drain = int(settings(container)["DRAIN_TIMEOUT"].removesuffix("s"))
    assert pod["terminationGracePeriodSeconds"] >= drain + STOP_TIMEOUT


def test_a_hanging_relay_gets_time_to_dump_and_none_to_drain(pod: Manifest, container: Manifest) -> None:
    probe = container["livenessProbe"]
    assert LIVE_TIMEOUT < probe["timeoutSeconds"] < probe["periodSeconds"]
    assert LEAVE_TIMEOUT <= probe["terminationGracePeriodSeconds"] < pod["terminationGracePeriodSeconds"] / 10


def test_the_token_is_mounted_at_the_configured_path(pod: Manifest, container: Manifest) -> None:
    path = Path(settings(container)["FIREZONE_TOKEN"])
    (volume,) = (each for each in pod["volumes"] if "secret" in each)
    (mount,) = (each for each in container["volumeMounts"] if each["name"] == volume["name"])
    assert Path(mount["mountPath"]) == path.parent
    assert mount["readOnly"]
    assert path.name == "token", "as the command in kustomization.yaml names it"
    assert volume["secret"]["defaultMode"] & 0o040, "readable by fsGroup, which is the relay's"
    assert not volume["secret"]["defaultMode"] & 0o007


def test_probes_use_existing_health_pages(container: Manifest) -> None:
    host, _, port = settings(container)["HEALTH_CHECK_ADDR"].rpartition(":")
    probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {(each["host"], each["port"]) for each in probes.values()} == {(host, int(port))}
    # A lost portal must not restart relays, which keep serving their clients.
    paths = {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"}
    assert {kind: each["path"] for kind, each in probes.items()} == paths


def test_the_container_has_minimal_privileges(pod: Manifest, container: Manifest) -> None:
    user = re.search(r"(?m)^USER (\d+):(\d+)$", (TOP / "Dockerfile").read_text())
    assert user is not None
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True
    assert (context["runAsUser"], context["runAsGroup"]) == (int(user[1]), int(user[2]))
    assert context["fsGroup"] == int(user[2])
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False


def test_the_offload_needs_three_capabilities_and_root() -> None:
    patch = yaml.safe_load((KUBERNETES / "offload" / "daemonset.yaml").read_text())["spec"]["template"]["spec"]
    (container,) = patch["containers"]
    assert container["securityContext"] == {"capabilities": {"add": ["BPF", "NET_ADMIN", "PERFMON"]}}
    assert patch["securityContext"] == {"runAsNonRoot": False, "runAsUser": 0}
    assert settings(container).keys() == {"EBPF_OFFLOADING", "ALLOW_ROOT"}


def test_the_memory_limit_fits_all_allocations(container: Manifest) -> None:
    resources = container["resources"]
    gibibytes = int(resources["limits"]["memory"].removesuffix("Gi"))
    assert gibibytes << 30 > 16_384 * BYTES_PER_ALLOCATION * 2
    assert "cpu" not in resources["limits"]


def check_ports(daemonset: Manifest) -> None:
    """Check that a node has room for two pods: each port on the host network is a host port."""
    pod = daemonset["spec"]["template"]["spec"]
    assert pod["hostNetwork"] is True
    for each in (*pod["initContainers"], *pod["containers"]):
        assert "ports" not in each


def test_a_new_pod_takes_over_beside_the_old_pod(daemonset: Manifest, container: Manifest) -> None:
    check_ports(daemonset)
    assert daemonset["spec"]["updateStrategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
    }
    assert settings(container)["TAKE_OVER"] == "true"
    # Until the takeover, the old relay responds to the readiness probe of the new pod. 15 s are for the start.
    assert daemonset["spec"]["minReadySeconds"] >= PREPARATION + 15


def test_both_pods_have_the_directory_of_the_socket(pod: Manifest, container: Manifest) -> None:
    (volume,) = (each for each in pod["volumes"] if "hostPath" in each)
    # Not in a directory that any user of the node can write to.
    assert Path(volume["hostPath"]["path"]).parent == Path("/run")
    assert volume["hostPath"]["type"] == "DirectoryOrCreate"
    (initial,) = pod["initContainers"]
    mounts = [each for each in (*initial["volumeMounts"], *container["volumeMounts"]) if each["name"] == volume["name"]]
    assert len(mounts) == 2
    assert all(each == {"name": volume["name"], "mountPath": mounts[0]["mountPath"]} for each in mounts)
    assert Path(settings(container)["HANDOVER_SOCKET"]).parent == Path(mounts[0]["mountPath"])


def test_the_first_container_gives_the_directory_to_the_relay_only(pod: Manifest, container: Manifest) -> None:
    (initial,) = pod["initContainers"]
    *command, path = initial["command"]
    assert path == initial["volumeMounts"][0]["mountPath"]
    assert command == ["install", "--directory", f"--group={pod['securityContext']['runAsGroup']}", "--mode=0770"]
    assert initial["image"] == container["image"]
    # Root without any capability.
    assert initial["securityContext"] == container["securityContext"] | {"runAsNonRoot": False, "runAsUser": 0}
