"""The manifests: Kubernetes' own schemas take them, and what they say fits the relay."""

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

from relay.actors.departure import LEAVE_TIMEOUT, STOP_TIMEOUT
from relay.actors.pages import LIVE_PATIENCE
from relay.cli import cli
from relay.config import SERVICE_PORT

TOP = Path(__file__).parents[2]
KUBERNETES = TOP / "deploy" / "kubernetes"

VERSIONS = ("1.28", "1.37")
"""The oldest that providers still run, and the newest whose schemas there are."""

BYTES_PER_ALLOCATION = 45_000
FILES = sorted(each for each in KUBERNETES.rglob("*.yaml") if each.name != "kustomization.yaml")

Manifest: TypeAlias = dict[str, Any]

needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kustomizations are not put together: kubectl is NOT INSTALLED"
)


def check(manifest: Manifest) -> None:
    """Find what a cluster would refuse, unknown fields included, without one.

    Raises:
        ValidationError: a cluster would.
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
    """Give its environment; what Kubernetes fills in is left out."""
    return {each["name"]: each["value"] for each in container["env"] if "value" in each}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(KUBERNETES)))
def test_kubernetes_takes_each_manifest(path: Path) -> None:
    for manifest in yaml.safe_load_all(path.read_text()):
        if path.parent.name != "relay":
            # A change to another: what is required is in that one.
            manifest["spec"] |= {"selector": {}}
            for each in manifest["spec"]["template"]["spec"]["containers"]:
                each.setdefault("image", "firezone-relay")
                each["env"] = [variable for variable in each["env"] if variable.pop("$patch", None) != "delete"]
        check(manifest)


def broken_type(manifest: Manifest) -> None:
    manifest["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"] = "3478"


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
def test_a_broken_manifest_would_be_found(daemonset: Manifest, breaks: Callable[[Manifest], None]) -> None:
    breaks(daemonset)
    with pytest.raises(ValidationError):
        check(daemonset)


@needs_kubectl
@pytest.mark.parametrize("components", [[], ["offload"], ["discovery"], ["offload", "discovery"]])
def test_what_kustomize_makes_of_them_is_taken_as_well(tmp_path: Path, components: list[str]) -> None:
    made = shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    top = yaml.safe_load((made / "kustomization.yaml").read_text())
    (made / "kustomization.yaml").write_text(yaml.safe_dump(top | {"components": components}))
    done = subprocess.run(["kubectl", "kustomize", str(made)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    manifests = {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}
    assert set(manifests) == {"Namespace", "PriorityClass", "DaemonSet"}
    for each in manifests.values():
        check(each)
    (container,) = manifests["DaemonSet"]["spec"]["template"]["spec"]["containers"]
    assert container["image"].startswith("registry.example.com/firezone-relay:")
    assert "FIREZONE_TOKEN" in settings(container)
    assert ("EBPF_OFFLOADING" in settings(container)) == ("offload" in components)
    # Asked of the cloud, the public address is not given: a given one would win.
    discovers = "discovery" in components
    names = {each["name"] for each in container["env"]}
    assert ("LISTEN_ADDRESS_DISCOVERY_METHOD" in names, "PUBLIC_IP4_ADDR" in names) == (discovers, not discovers)


def test_its_settings_are_taken_by_the_program(container: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in container["env"]:
        value = each.get("value") or {"status.hostIP": "192.0.2.7"}.get(each["valueFrom"]["fieldRef"]["fieldPath"], "node-1")
        monkeypatch.setenv(each["name"], value)
    with cli.make_context("firezone-relay", []) as context:
        assert str(context.params["public_ip4"]) == "192.0.2.7"
        assert context.params["name"] == "node-1"


def test_the_cloud_that_is_asked_is_one_that_the_program_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    patch = yaml.safe_load((KUBERNETES / "discovery" / "daemonset.yaml").read_text())
    (container,) = patch["spec"]["template"]["spec"]["containers"]
    method = settings(container)["LISTEN_ADDRESS_DISCOVERY_METHOD"]
    monkeypatch.setenv("LISTEN_ADDRESS_DISCOVERY_METHOD", method)
    with cli.make_context("firezone-relay", []) as context:
        assert context.params["discovery"] == method


def test_a_relay_that_drains_is_waited_for(pod: Manifest, container: Manifest) -> None:
    drain = int(settings(container)["DRAIN_TIMEOUT"].removesuffix("s"))
    assert pod["terminationGracePeriodSeconds"] >= drain + STOP_TIMEOUT


def test_a_relay_that_hangs_is_given_time_to_say_so_and_none_to_drain(pod: Manifest, container: Manifest) -> None:
    probe = container["livenessProbe"]
    assert LIVE_PATIENCE < probe["timeoutSeconds"] < probe["periodSeconds"]
    assert LEAVE_TIMEOUT <= probe["terminationGracePeriodSeconds"] < pod["terminationGracePeriodSeconds"] / 10


def test_the_token_is_a_file_where_the_relay_looks(pod: Manifest, container: Manifest) -> None:
    path = Path(settings(container)["FIREZONE_TOKEN"])
    (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"]
    assert Path(mount["mountPath"]) == path.parent
    assert path.name == "token", "as the command in kustomization.yaml names it"
    assert volume["secret"]["defaultMode"] & 0o040, "readable by fsGroup, which is the relay's"
    assert not volume["secret"]["defaultMode"] & 0o007


def test_probes_ask_pages_that_the_relay_has_where_it_has_them(container: Manifest) -> None:
    host, _, port = settings(container)["HEALTH_CHECK_ADDR"].rpartition(":")
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {(each["host"], ports[each["port"]]) for each in probes.values()} == {(host, int(port))}
    # A portal that is away must not restart relays: they serve their clients without it.
    paths = {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"}
    assert {kind: each["path"] for kind, each in probes.items()} == paths
    assert ports["turn"] == SERVICE_PORT


def test_it_may_do_what_the_image_needs_and_nothing_else(pod: Manifest, container: Manifest) -> None:
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


def test_relaying_in_the_kernel_takes_three_capabilities_and_root_to_have_them() -> None:
    patch = yaml.safe_load((KUBERNETES / "offload" / "daemonset.yaml").read_text())["spec"]["template"]["spec"]
    (container,) = patch["containers"]
    assert container["securityContext"] == {"capabilities": {"add": ["BPF", "NET_ADMIN", "PERFMON"]}}
    assert patch["securityContext"] == {"runAsNonRoot": False, "runAsUser": 0}
    assert settings(container).keys() == {"EBPF_OFFLOADING", "ALLOW_ROOT"}


def test_memory_is_enough_for_all_allocations(container: Manifest) -> None:
    resources = container["resources"]
    gibibytes = int(resources["limits"]["memory"].removesuffix("Gi"))
    assert gibibytes << 30 > 16_384 * BYTES_PER_ALLOCATION * 2
    assert "cpu" not in resources["limits"]


def test_one_relay_at_a_time_is_replaced_since_two_can_not_have_the_same_ports(daemonset: Manifest) -> None:
    assert daemonset["spec"]["updateStrategy"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0}
