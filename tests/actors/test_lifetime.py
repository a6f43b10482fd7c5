"""What ends an allocation in a running relay, and what is left of it."""

import gc
import socket

import pykka
import pytest

from relay.actors import server
from relay.actors.messages import AreYouThere, Tick
from relay.actors.server import ServerActor
from relay.core.addresses import SocketAddress
from relay.core.counters import DropReason, FreeReason
from tests.actors.conftest import Relay, RelayMaker
from tests.conftest import HAS_IPV6, wait_until
from tests.turn_client import TIMEOUT, TurnClient, udp_socket


def server_of(_: Relay) -> pykka.ActorRef[ServerActor]:
    """The server actor of the only relay there is."""
    (found,) = pykka.ActorRegistry.get_by_class(ServerActor)
    return found


def settle(relay: Relay) -> None:
    """Wait until the server actor has worked off what was told before."""
    server_of(relay).ask(Tick(), timeout=TIMEOUT)


def wait_until_bindable(address: SocketAddress) -> None:
    """Wait until the sockets of a freed allocation are closed: its actor does that, in its own time."""

    def is_bindable() -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
            try:
                opened.bind((address[0], address[1]))
            except OSError:
                return False
        return True

    wait_until(is_bindable)


def test_an_allocation_ends_with_its_lifetime_and_its_port_is_free_again(relay: Relay) -> None:
    client = relay.client()
    (relayed,) = client.allocate()
    relay.clock.jump(601)
    settle(relay)
    assert relay.system.core.counters.allocations_freed[FreeReason.EXPIRED] == 1
    wait_until_bindable(relayed)
    assert client.refresh(600) == 437


def test_the_deadline_wakes_the_server_without_any_traffic(relay: Relay) -> None:
    client = relay.client()
    client.allocate()
    relay.clock.jump(599.8)
    # Any message makes its thread look at the clock, and sleep for the fifth of a second that is left.
    server_of(relay).ask(AreYouThere(), timeout=TIMEOUT)
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
        # Two threads read what comes from peers and from clients: nothing but the count tells which came first.
        wait_until(lambda: relay.system.core.counters.drops[DropReason.UNBOUND_PEER] == 1)
        assert client.bind_channel(0x4000, peer.getsockname()) is None
        peer.sendto(b"in time", (relayed[0], relayed[1]))
        assert client.receive() == (0x4000, b"in time")


def is_free(port: int) -> bool:
    """Tell whether nobody has a port of loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as four, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as six:
        try:
            four.bind(("127.0.0.1", port))
            if HAS_IPV6:
                six.bind(("::1", port))
        except OSError:
            return False
    return True


def test_what_allocations_leave_has_no_cycles(relay: Relay) -> None:
    """So that Python need not look for any among all that there is: `relay.__main__.SELDOM`."""
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


def test_a_deleted_allocation_frees_its_port(make_relay: RelayMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a single port, the next client gets it at once: the server actor waits for it to be closed."""
    monkeypatch.setattr(server, "CLOSE_TIMEOUT", TIMEOUT)
    # None of those that Linux gives to whoever asks for any.
    only = next(port for port in range(20000, 30000) if is_free(port))
    relay = make_relay(lowest_port=only, highest_port=only)
    for _ in range(20):
        client = relay.client()
        (relayed,) = client.allocate()
        assert relayed[1] == only
        assert client.refresh(0) is None


def test_a_client_that_moves_takes_its_username_along_and_the_old_port_is_freed(relay: Relay) -> None:
    credential = relay.credential()
    old = relay.client(credential=credential)
    (left,) = old.allocate()
    relay.client(credential=credential).allocate()
    wait_until_bindable(left)
    assert old.refresh(600) == 437


def test_a_port_that_another_program_has_is_skipped(make_relay: RelayMaker) -> None:
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


def allocate_refused(client: TurnClient) -> int:
    with pytest.raises(AssertionError, match="was answered") as caught:
        client.allocate()
    return int(str(caught.value).splitlines()[0].rsplit(" ", 1)[-1])


def test_508_when_other_programs_have_every_port_and_service_once_they_let_go(make_relay: RelayMaker) -> None:
    with udp_socket("127.0.0.1") as other:
        taken = other.getsockname()[1]
        relay = make_relay(lowest_port=taken, highest_port=taken, public_ip6=None)
        client = relay.client()
        assert allocate_refused(client) == 508
    (relayed,) = client.allocate()
    assert relayed[1] == taken
    assert relay.system.server_counters.bind_errors == {"EADDRINUSE": 1}


def test_a_credential_expires_by_the_wall_clock_and_the_allocation_by_its_lifetime(relay: Relay) -> None:
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
def test_a_wall_clock_that_steps_by_a_day_ends_no_allocation_and_no_channel(relay: Relay, step: int) -> None:
    client = relay.client(credential=relay.credential(ttl=10 * 86400))
    (relayed,) = client.allocate()
    with udp_socket("127.0.0.1") as peer:
        assert client.bind_channel(0x4000, peer.getsockname()) is None
        relay.clock.step_wall_clock(step)
        assert client.refresh(600) is None
        peer.sendto(b"there", (relayed[0], relayed[1]))
        assert client.receive() == (0x4000, b"there")
