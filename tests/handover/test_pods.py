"""Two pods of the DaemonSet on one node, without an engine: the new pod takes over the relay of the old pod.

Each pod is process 1 of a PID namespace, with mounts of its own. The pods share the network and the directory of the socket.
"""

import http.client
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, TypeAlias

import pytest
import yaml

from tests.support.handover import CHANNEL, HOST, Traffic
from tests.support.program import Program
from tests.support.requirements import is_root, needs_nobody
from tests.support.scripted_portal import ScriptedPortal
from tests.support.turn_client import TurnClient
from tests.support.waiting import wait_until

MANIFEST: Final = Path(__file__).parents[2] / "deploy" / "kubernetes" / "relay" / "daemonset.yaml"

KUBELET: Final = """
mount -t proc none /proc
mount -t tmpfs none /run
while [ "$1" != -- ]
do
    mkdir -p "$2"
    mount --bind "$1" "$2"
    shift 2
done
shift
mount -o remount,bind,ro /
exec "$@"
"""

Manifest: TypeAlias = dict[str, Any]

pytestmark = [is_root, needs_nobody]


class Node:
    """Starts containers as the kubelet would.

    Args:
        directory: for the volumes.
        variables: replace variables of the manifest.
    """

    def __init__(self, directory: Path, variables: dict[str, str]) -> None:
        self._pod: Manifest = yaml.safe_load(MANIFEST.read_text())["spec"]["template"]["spec"]
        (self._container,) = self._pod["containers"]
        (self._initial,) = self._pod["initContainers"]
        self._variables = variables
        self._volumes: dict[str, Path] = {each["name"]: directory / each["name"] for each in self._pod["volumes"]}
        for each in self._pod["volumes"]:
            volume = self._volumes[each["name"]]
            volume.mkdir(mode=0o755)
            if "secret" in each:
                token = volume / "token"
                token.write_text("the token of both pods")
                os.chown(token, 0, self._pod["securityContext"]["fsGroup"])
                token.chmod(each["secret"]["defaultMode"])

    def prepare(self) -> Path:
        """Run the first container of a pod. Return its directory."""
        subprocess.run([*self._start(self._initial), *self._initial["command"]], check=True, timeout=60)
        (mount,) = self._initial["volumeMounts"]
        return self._volumes[mount["name"]]

    def run(self) -> Program:
        """Start the relay of a pod."""
        given = {each["name"]: each["value"] for each in self._container["env"] if "value" in each}
        return Program(
            *("--allow-peer", "127.0.0.0/8"),
            hosts=(HOST,),
            network={},
            variables=given | self._variables,
            by=self._start(self._container),
        )

    def probe(self, kind: str) -> int:
        """Return the status of a probe. Probes of both pods have the same address."""
        get = self._container[f"{kind}Probe"]["httpGet"]
        connection = http.client.HTTPConnection(HOST, get["port"], timeout=30)
        try:
            connection.request("GET", get["path"])
            return connection.getresponse().status
        finally:
            connection.close()

    def _start(self, container: Manifest) -> tuple[str, ...]:
        context = self._pod["securityContext"] | container["securityContext"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        mounts = [(str(self._volumes[each["name"]]), each["mountPath"]) for each in container["volumeMounts"]]
        user = (f"--reuid={context['runAsUser']}", f"--regid={context['runAsGroup']}", f"--groups={context['fsGroup']}")
        return (
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", KUBELET, "sh"),
            *(word for mount in mounts for word in mount),
            # The change of the user resets the signal of --kill-child.
            *("--", "setpriv", *user, "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--pdeathsig=KILL"),
        )


def terminate(pod: Program) -> None:
    """Send SIGTERM to process 1 of a pod."""
    outside = pod.process.pid
    (first,) = Path(f"/proc/{outside}/task/{outside}/children").read_text().split()
    os.kill(int(first), signal.SIGTERM)


@pytest.fixture
def portal() -> Iterator[ScriptedPortal]:
    with ScriptedPortal() as portal:
        yield portal


@pytest.fixture
def node(portal: ScriptedPortal, tmp_path: Path) -> Node:
    return Node(tmp_path, {"FIREZONE_API_URL": portal.url})


@pytest.fixture
def start_pod(node: Node) -> Iterator[Callable[[], Program]]:
    with ExitStack() as stack:

        def started() -> Program:
            node.prepare()
            pod = node.run()
            stack.callback(pod.close)
            return pod

        yield started


@pytest.fixture
def clients(portal: ScriptedPortal) -> Iterator[Callable[[int, socket.socket], list[TurnClient]]]:
    """Return clients with a channel to a peer."""
    with ExitStack() as stack:

        def allocated(count: int, peer: socket.socket) -> list[TurnClient]:
            made = [
                stack.enter_context(TurnClient((HOST, 3478), portal.mint(f"user{number}"), "127.0.0.1"))
                for number in range(count)
            ]
            for client in made:
                client.allocate()
                assert client.bind_channel(CHANNEL, peer.getsockname()) is None
            return made

        yield allocated


def test_the_directory_of_the_socket_belongs_to_the_relay_only(node: Node) -> None:
    for _ in range(2):
        status = node.prepare().stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (0, 65532, 0o770)


def test_a_new_pod_takes_over_and_the_old_pod_ends_on_request(
    portal: ScriptedPortal,
    node: Node,
    start_pod: Callable[[], Program],
    clients: Callable[[int, socket.socket], list[TurnClient]],
    peer: socket.socket,
) -> None:
    old = start_pod()
    old.wait_until_ready()
    wait_until(lambda: node.probe("readiness") == 200)
    allocated = clients(10, peer)
    traffic = Traffic(allocated, peer)
    try:
        new = start_pod()
        new.wait_for_log("taken over")
        old.wait_for_log("this container can be stopped")
        # The new pod responds to the probes of both.
        wait_until(lambda: node.probe("readiness") == 200)
        assert (node.probe("startup"), node.probe("liveness")) == (200, 200)
        assert old.process.poll() is None
        terminate(old)
        assert old.wait() == 0
    finally:
        traffic.stop()
    traffic.check()
    assert all(client.refresh(0) is None for client in allocated)
    assert portal.presence.drops == 0
    terminate(new)
    assert new.wait() == 0
    portal.wait_until_left()


def test_an_early_request_to_end_does_not_disturb_a_takeover(
    portal: ScriptedPortal, start_pod: Callable[[], Program], clients: Callable[..., list[TurnClient]], peer: socket.socket
) -> None:
    old = start_pod()
    old.wait_until_ready()
    (client,) = clients(1, peer)
    portal.script.sends_init = False
    new = start_pod()
    new.wait_for_log("taken over")
    second = portal.wait_for_connection(2)
    second.wait_for("phx_join")
    terminate(old)
    assert client.refresh(600) is None
    second.send_init()
    # No second request is needed.
    assert old.wait() == 0
    assert client.refresh(0) is None
    assert not portal.wait_for_connection(1).left
