"""A failure ends either a single allocation or the process."""

import random
import resource
import socket
from collections.abc import Callable

import pykka
import pytest

from relay.actors.messages import ClientDatagrams
from relay.actors.server import DataPaths, ServerActor
from relay.core.addresses import Family
from relay.core.commands import SendToPeer
from relay.core.counters import FreeReason
from relay.core.data import Datagram
from relay.core.server import Server
from relay.core.stun import MessageClass, Method, encode
from relay.core.timestamp import Timestamp
from relay.net import threads
from relay.net.udp import UdpSocket
from relay.ops.totals import ServerCounters
from relay.system.core import server_config
from relay.system.events import Failure, SystemRequest
from relay.system.supervisor import supervise
from tests.support.log_lines import capture_logs
from tests.support.system import CONFIG, SECRET, JumpingClock, Relay, allocate_refused, settle, wait_until_bindable
from tests.support.turn_client import TIMEOUT, udp_socket
from tests.support.waiting import wait_until


def relayed_socket(relay: Relay) -> socket.socket:
    """Return the socket of the only allocation."""
    (serving,) = relay.system.server.proxy().allocations.get(timeout=TIMEOUT).values()
    opened: socket.socket = serving.sockets.by_family[Family.IPV4]
    return opened


def break_socket(opened: socket.socket, how: int) -> None:
    # shutdown() of an unconnected socket fails with ENOTCONN, but takes effect.
    with pytest.raises(OSError, match="not connected"):
        opened.shutdown(how)


def test_a_failed_actor_frees_its_allocation_for_a_new_request(relay: Relay) -> None:
    client, other = relay.client(), relay.client()
    (relayed,) = client.allocate()
    with capture_logs() as log:
        break_socket(relayed_socket(relay), socket.SHUT_RD)
        other.allocate()
        wait_until_bindable(relayed)
        settle(relay)
    assert relay.system.core.counters.allocations_freed[FreeReason.FAILED] == 1
    assert [entry["event"] for entry in log if entry["log_level"] != "debug"] == ["allocation failed"]
    assert client.refresh(600) == 437
    client.allocate()
    assert other.refresh(600) is None


def test_an_allocation_with_a_broken_socket_is_freed(relay: Relay) -> None:
    client = relay.client()
    (relayed,) = client.allocate()
    with udp_socket("127.0.0.1") as peer:
        assert client.bind_channel(0x4000, peer.getsockname()) is None
        break_socket(relayed_socket(relay), socket.SHUT_WR)
        client.send(0x4000, b"x")
    # Requests and data use separate sockets, so a request may overtake data.
    wait_until(lambda: relay.system.core.counters.allocations_freed[FreeReason.FAILED] == 1)
    assert client.refresh(600) == 437
    wait_until_bindable(relayed)
    client.allocate()
    assert relay.system.server_counters.udp.send_errors == {"EPIPE": 1}


def test_a_failed_send_drops_only_its_packet(relay: Relay) -> None:
    """A missing route to a peer is normal, because ICE tries unreachable addresses."""
    client = relay.client()
    client.allocate()
    with udp_socket("127.0.0.1") as peer:
        # The kernel rejects packets from loopback to other networks.
        assert client.bind_channel(0x4000, ("192.0.2.1", 9)) is None
        assert client.bind_channel(0x4001, peer.getsockname()) is None
        client.send(0x4000, b"lost")
        client.send(0x4001, b"arrives")
        assert peer.recv(100) == b"arrives"
    assert sum(relay.system.server_counters.udp.send_errors.values()) == 1


def test_allocate_gets_508_until_descriptors_are_available(relay: Relay) -> None:
    client = relay.client()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as probe:
        lowest_free = probe.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        assert allocate_refused(client) == 508
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    client.allocate()
    assert relay.system.server_counters.bind_errors == {"EMFILE": 1}


def test_a_failed_server_actor_ends_the_system_with_an_error(relay: Relay) -> None:
    (relayed,) = relay.client().allocate()
    relay.system.server.tell("what is this?")
    wait_until_bindable(relayed)
    with capture_logs() as log:
        assert supervise(relay.system, dump=lambda: None) == 1
    (entry,) = log
    assert entry["actor"] == "server"


@pytest.mark.parametrize("name", ["listener-ipv4-1", "requests-ipv4"])
def test_a_failed_listener_ends_the_system_with_an_error(relay: Relay, name: str) -> None:
    """Clients would keep using a relay with a failed listener."""
    group = relay.system.groups[Family.IPV4]
    listened_to = {"listener-ipv4-1": group.data[0], "requests-ipv4": group.rest}[name]
    if listened_to is None:
        pytest.skip("no SO_ATTACH_REUSEPORT_CBPF in this kernel: there is NO SOCKET for requests alone")
    break_socket(listened_to, socket.SHUT_RD)
    with capture_logs() as log:
        assert supervise(relay.system, dump=lambda: None) == 1
    assert [entry["actor"] for entry in log] == [name]


def test_stop_ends_the_system_and_dump_calls_the_dump(relay: Relay) -> None:
    dumps: list[None] = []
    relay.system.events.put(SystemRequest.DUMP)
    relay.system.events.put(SystemRequest.STOP)
    relay.system.events.put(Failure("nobody", RuntimeError()))
    assert supervise(relay.system, dump=lambda: dumps.append(None)) == 0
    assert len(dumps) == 1


POISON = b"\x00poison"


class Fragile(Server):
    """A core with a bug."""

    def handle_client_datagram(self, datagram: Datagram, now: Timestamp) -> SendToPeer | None:
        if datagram[0] == POISON:
            raise ZeroDivisionError
        return super().handle_client_datagram(datagram, now)


@pytest.mark.parametrize("alone", [True, False])
def test_an_exception_in_the_core_is_counted_and_survived(request: pytest.FixtureRequest, *, alone: bool) -> None:
    """A client that triggers a bug in the core must not stop the relay."""
    core = Fragile(server_config(CONFIG, SECRET, frozenset(), offloads=False), random.Random(1))
    counters = ServerCounters()
    failures: list[object] = []
    with UdpSocket(Family.IPV4, "127.0.0.1", 0) as listening, udp_socket("127.0.0.1") as client:
        server = ServerActor.start(
            core,
            DataPaths({Family.IPV4: listening}, {}),
            JumpingClock(),
            counters,
            lambda *failure: failures.append(failure),
            failures.append,
        )
        request.addfinalizer(server.stop)
        address = client.getsockname()
        poison = (POISON, address, 0, 0)
        binding = (encode(MessageClass.REQUEST, Method.BINDING, bytes(12), []), address, 0, 0)
        with capture_logs() as log:
            for batch in [[poison], [poison], [poison], [binding]] if alone else [[poison, poison, poison, binding]]:
                server.tell(ClientDatagrams(batch))
            assert client.recv(100)[8:20] == bytes(12)
    assert counters.faults == 3
    assert len(log) == 1
    assert failures == []


def test_stop_ends_every_started_thread(make_relay: Callable[[], Relay]) -> None:
    before = set(threads.names())
    relay = make_relay()
    for _ in range(10):
        relay.client().allocate()
    assert len(set(threads.names()) - before) > 10
    relay.system.__exit__(None, None, None)
    wait_until(lambda: not set(threads.names()) - before)
    assert not pykka.ActorRegistry.get_all()
