"""One failure concerns one allocation, or ends the process; never something in between."""

import random
import resource
import socket
from collections.abc import Callable, Iterable, Iterator

import pykka
import pytest
import structlog

from relay.actors.messages import FromClients
from relay.actors.news import Failure, Request
from relay.actors.server import DataPaths, ServerActor, ServerCounters
from relay.core.addresses import Family
from relay.core.counters import FreeReason
from relay.core.instant import Instant
from relay.core.server import Server
from relay.core.stun import MessageClass, Method, encode
from relay.core.trains import Arrival
from relay.net.udp import UdpSocket
from relay.ops import threads
from tests.actors.conftest import JumpingClock, Relay
from tests.actors.test_lifetime import allocate_refused, server_of, settle, wait_until_bindable
from tests.conftest import wait_until
from tests.turn_client import TIMEOUT, udp_socket


def relayed_socket(relay: Relay) -> socket.socket:
    """The socket of the only allocation."""
    (serving,) = server_of(relay).proxy().serving.get(timeout=TIMEOUT).values()
    opened: socket.socket = serving.sockets.by_family[Family.IPV4]
    return opened


def break_socket(opened: socket.socket, how: int) -> None:
    # An unconnected socket says so, and is shut down all the same.
    with pytest.raises(OSError, match="not connected"):
        opened.shutdown(how)


def test_an_allocation_whose_actor_fails_is_freed_and_its_client_can_allocate_again(relay: Relay) -> None:
    client, other = relay.client(), relay.client()
    (relayed,) = client.allocate()
    with structlog.testing.capture_logs() as log:
        break_socket(relayed_socket(relay), socket.SHUT_RD)
        other.allocate()
        wait_until_bindable(relayed)
        settle(relay)
    assert relay.system.core.counters.allocations_freed[FreeReason.FAILED] == 1
    assert [entry["event"] for entry in log if entry["log_level"] != "debug"] == ["allocation failed"]
    assert client.refresh(600) == 437
    client.allocate()
    assert other.refresh(600) is None


def test_an_allocation_that_can_not_send_any_more_is_freed(relay: Relay) -> None:
    client = relay.client()
    (relayed,) = client.allocate()
    with udp_socket("127.0.0.1") as peer:
        assert client.bind_channel(0x4000, peer.getsockname()) is None
        break_socket(relayed_socket(relay), socket.SHUT_WR)
        client.send(0x4000, b"x")
    # Requests come another way than data, so one may overtake it.
    wait_until(lambda: relay.system.core.counters.allocations_freed[FreeReason.FAILED] == 1)
    assert client.refresh(600) == 437
    wait_until_bindable(relayed)
    client.allocate()
    assert relay.system.server_counters.udp.send_errors == {"EPIPE": 1}


def test_a_send_that_fails_loses_one_packet_and_no_more(relay: Relay) -> None:
    """No route to a peer is everyday life: ICE tries addresses that can't be reached."""
    client = relay.client()
    client.allocate()
    with udp_socket("127.0.0.1") as peer:
        # From loopback to the outside: the kernel refuses.
        assert client.bind_channel(0x4000, ("192.0.2.1", 9)) is None
        assert client.bind_channel(0x4001, peer.getsockname()) is None
        client.send(0x4000, b"lost")
        client.send(0x4001, b"arrives")
        assert peer.recv(100) == b"arrives"
    assert sum(relay.system.server_counters.udp.send_errors.values()) == 1


def test_508_without_descriptors_and_service_once_there_are_some(relay: Relay) -> None:
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


def test_a_server_actor_that_fails_ends_the_system_with_an_error_and_closes_what_it_served(relay: Relay) -> None:
    (relayed,) = relay.client().allocate()
    server_of(relay).tell("what is this?")
    wait_until_bindable(relayed)
    with structlog.testing.capture_logs() as log:
        assert relay.system.run(dump=lambda: None) == 1
    (entry,) = log
    assert entry["actor"] == "server"


@pytest.mark.parametrize("name", ["listener-ipv4-1", "requests-ipv4"])
def test_a_listener_that_fails_ends_the_system_with_an_error(relay: Relay, name: str) -> None:
    """Half a relay would be worse than none: clients would go on asking it."""
    steered = relay.system._steered[Family.IPV4]
    listened_to = {"listener-ipv4-1": steered.data[0], "requests-ipv4": steered.rest}[name]
    if listened_to is None:
        pytest.skip("this kernel steers nothing (SO_ATTACH_REUSEPORT_CBPF): there is NO SOCKET for requests alone")
    break_socket(listened_to, socket.SHUT_RD)
    with structlog.testing.capture_logs() as log:
        assert relay.system.run(dump=lambda: None) == 1
    assert [entry["actor"] for entry in log] == [name]


def test_a_system_that_is_told_to_stop_ends_well_and_dumps_when_told_to(relay: Relay) -> None:
    dumps: list[None] = []
    relay.system.news.put(Request.DUMP)
    relay.system.news.put(Request.STOP)
    relay.system.news.put(Failure("nobody", RuntimeError()))
    assert relay.system.run(dump=lambda: dumps.append(None)) == 0
    assert len(dumps) == 1


POISON = b"\x00poison"


class Fragile(Server):
    """A core with a bug."""

    def handle_client_arrival(self, arrival: Arrival, now: Instant) -> None:
        if arrival[0] == POISON:
            raise ZeroDivisionError
        super().handle_client_arrival(arrival, now)

    def handle_client_arrivals(self, arrivals: Iterable[Arrival], now: Instant, *, is_flood: bool = False) -> None:
        def checked() -> Iterator[Arrival]:
            for arrival in arrivals:
                if arrival[0] == POISON:
                    raise ZeroDivisionError
                yield arrival

        super().handle_client_arrivals(checked(), now, is_flood=is_flood)


@pytest.mark.parametrize("alone", [True, False])
def test_a_datagram_that_the_core_fails_on_is_counted_and_ends_nobodys_session(
    relay: Relay, request: pytest.FixtureRequest, *, alone: bool
) -> None:
    """Whoever finds a bug in the core shall not end the relay with it."""
    core = Fragile(relay.system.core._config, random.Random(1))
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
        with structlog.testing.capture_logs() as log:
            for batch in [[poison], [poison], [poison], [binding]] if alone else [[poison, poison, poison, binding]]:
                server.tell(FromClients(batch))
            assert client.recv(100)[8:20] == bytes(12)
    assert counters.faults == 3
    assert len(log) == 1
    assert failures == []


def test_stopping_ends_every_thread_that_was_started(make_relay: Callable[[], Relay]) -> None:
    before = set(threads.names())
    relay = make_relay()
    for _ in range(10):
        relay.client().allocate()
    assert len(set(threads.names()) - before) > 10
    relay.system.__exit__(None, None, None)
    wait_until(lambda: not set(threads.names()) - before)
    assert not pykka.ActorRegistry.get_all()
