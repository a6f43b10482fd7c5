"""The end of allocations in a running relay, and the release of their resources."""

import gc
import socket

import pytest

from relay.actors.messages import Ping
from relay.config import Timeouts
from relay.core.counters import DropReason, FreeReason
from tests.support.requirements import HAS_IPV6
from tests.support.system import Relay, RelayMaker, allocate_refused, settle, wait_until_bindable
from tests.support.turn_client import TIMEOUT, udp_socket
from tests.support.waiting import wait_until


def test_an_expired_allocation_frees_its_port(relay: Relay) -> None:
    client = relay.client()
    (relayed,) = client.allocate()
    relay.clock.jump(601)
    settle(relay)
    assert relay.system.core.counters.allocations_freed[FreeReason.EXPIRED] == 1
    wait_until_bindable(relayed)
    assert client.refresh(600) == 437


def test_the_deadline_wakes_the_server_without_traffic(relay: Relay) -> None:
    client = relay.client()
    client.allocate()
    relay.clock.jump(599.8)
    # A message makes the actor read the clock and sleep for the remaining 0.2 s.
    relay.system.server.ask(Ping(), timeout=TIMEOUT)
    wait_until(lambda: not relay.system.core.allocations.by_id)


def test_a_channel_stops_relaying_when_it_expires(relay: Relay) -> None:
    client = relay.client()
    (relayed,) = client.allocate()
    with udp_socket("127.0.0.1") as peer:
        assert client.bind_channel(0x4000, peer.getsockname()) is None
        relay.clock.jump(300)
        assert client.refresh(3600) is None
        relay.clock.jump(301)
        peer.sendto(b"too late", (relayed[0], relayed[1]))
        # Separate threads read from peers and from clients. Only the counter shows their order.
        wait_until(lambda: relay.system.core.counters.drops[DropReason.UNBOUND_PEER] == 1)
        assert client.bind_channel(0x4000, peer.getsockname()) is None
        peer.sendto(b"in time", (relayed[0], relayed[1]))
        assert client.receive() == (0x4000, b"in time")


def is_free(port: int) -> bool:
    """Check whether a port is free on loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as four, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as six:
        try:
            four.bind(("127.0.0.1", port))
            if HAS_IPV6:
                six.bind(("::1", port))
        except OSError:
            return False
    return True


def test_freed_allocations_leave_no_reference_cycles(relay: Relay) -> None:
    """Full garbage collections can be rare: `relay.__main__.FULL_COLLECTION_THRESHOLD`."""
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(3):
            client = relay.client()
            (relayed,) = client.allocate()
            with udp_socket("127.0.0.1") as peer:
                assert client.bind_channel(0x4000, peer.getsockname()) is None
                peer.sendto(b"hello", (relayed[0], relayed[1]))
                assert client.receive() == (0x4000, b"hello")
            assert client.refresh(0) is None
            wait_until_bindable(relayed)
        settle(relay)
        gc.collect()
        left = [each for each in gc.garbage if type(each).__module__.startswith(("relay.", "pykka."))]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert not left


def test_a_deleted_allocation_frees_its_port(make_relay: RelayMaker) -> None:
    """With a single port, the next client gets the port at once, because the server actor waits for its closing."""
    # Not an ephemeral port.
    only = next(port for port in range(20000, 30000) if is_free(port))
    relay = make_relay(lowest_port=only, highest_port=only, timeouts=Timeouts(close_port=TIMEOUT))
    for _ in range(20):
        client = relay.client()
        (relayed,) = client.allocate()
        assert relayed[1] == only
        assert client.refresh(0) is None


def test_a_new_allocation_of_a_username_frees_the_old_port(relay: Relay) -> None:
    credential = relay.credential()
    old = relay.client(credential=credential)
    (left,) = old.allocate()
    relay.client(credential=credential).allocate()
    wait_until_bindable(left)
    assert old.refresh(600) == 437


def test_a_port_of_another_program_is_skipped(make_relay: RelayMaker) -> None:
    with udp_socket("127.0.0.1") as other:
        taken = other.getsockname()[1]
        relay = make_relay(lowest_port=taken, highest_port=taken + 1, public_ip6=None)
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as neighbour:
                neighbour.bind(("127.0.0.1", taken + 1))
        except OSError:
            pytest.skip(f"port {taken + 1} is taken too")
        (relayed,) = relay.client().allocate()
        assert relayed[1] == taken + 1


def test_allocate_gets_508_until_another_program_frees_a_port(make_relay: RelayMaker) -> None:
    with udp_socket("127.0.0.1") as other:
        taken = other.getsockname()[1]
        relay = make_relay(lowest_port=taken, highest_port=taken, public_ip6=None)
        client = relay.client()
        assert allocate_refused(client) == 508
    (relayed,) = client.allocate()
    assert relayed[1] == taken
    assert relay.system.server_counters.bind_errors == {"EADDRINUSE": 1}


def test_only_credentials_expire_by_the_wall_clock(relay: Relay) -> None:
    client = relay.client(credential=relay.credential(ttl=60))
    (relayed,) = client.allocate()
    with udp_socket("127.0.0.1") as peer:
        assert client.bind_channel(0x4000, peer.getsockname()) is None
        relay.clock.step_wall_clock(120)
        assert client.refresh(600) == 401
        client.send(0x4000, b"still relayed")
        assert peer.recvfrom(100) == (b"still relayed", relayed)
        relay.clock.jump(601)
        settle(relay)
    assert relay.system.core.counters.allocations_freed[FreeReason.EXPIRED] == 1


@pytest.mark.parametrize("step", [-86400, 86400])
def test_a_wall_clock_step_ends_no_allocation_or_channel(relay: Relay, step: int) -> None:
    client = relay.client(credential=relay.credential(ttl=10 * 86400))
    (relayed,) = client.allocate()
    with udp_socket("127.0.0.1") as peer:
        assert client.bind_channel(0x4000, peer.getsockname()) is None
        relay.clock.step_wall_clock(step)
        assert client.refresh(600) is None
        peer.sendto(b"there", (relayed[0], relayed[1]))
        assert client.receive() == (0x4000, b"there")
