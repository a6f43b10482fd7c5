"""A second process takes a running relay over: clients, peers and the portal notice nothing."""

import json
import os
import re
import signal
import socket
import urllib.request
from pathlib import Path

import pytest

from tests.support.handover import CHANNEL, HOST, Allocator, Starter, Traffic
from tests.support.program import Program
from tests.support.turn_client import TurnClient
from tests.support.waiting import wait_until


def succeed(start: Starter, relay: Program, *options: str) -> Program:
    """Return the process that has taken a relay over, after the former process has ended."""
    successor = start("--take-over", *options)
    assert relay.wait() == 0, relay.log
    successor.wait_for_log("taken over")
    # Then it listens for its own successor.
    successor.wait_for_log(" ready ")
    return successor


def exchange(client: TurnClient, peer: socket.socket) -> None:
    """Relay a packet each way."""
    client.send(CHANNEL, b"to the peer")
    assert peer.recvfrom(100) == (b"to the peer", client.relayed)
    peer.sendto(b"to the client", client.relayed)
    assert client.receive() == (CHANNEL, b"to the client")


def test_allocations_and_channels_go_on_and_new_ones_are_possible(
    start: Starter, allocated: Allocator, peer: socket.socket
) -> None:
    relay = start()
    relay.wait_until_ready()
    clients = [allocated() for _ in range(3)]
    assert all(client.bind_channel(CHANNEL, peer.getsockname()) is None for client in clients)
    for _ in range(2):
        relay = succeed(start, relay)
        for client in clients:
            exchange(client, peer)
            assert client.refresh(600) is None
            # The channel is bound to this peer still.
            assert client.bind_channel(CHANNEL, ("127.0.0.1", 5000)) == 400
        clients.append(allocated())
        assert clients[-1].bind_channel(CHANNEL, peer.getsockname()) is None
    assert clients[0].refresh(0) is None
    assert clients[0].refresh(600) == 437
    assert relay.stop() == 0


def test_no_packet_is_lost_repeated_or_misdirected(start: Starter, allocated: Allocator, peer: socket.socket) -> None:
    relay = start()
    relay.wait_until_ready()
    clients = [allocated() for _ in range(20)]
    for client in clients:
        assert client.bind_channel(CHANNEL, peer.getsockname()) is None
    traffic = Traffic(clients, peer)
    try:
        for _ in range(3):
            relay = succeed(start, relay)
    finally:
        traffic.stop()
    traffic.check()


def test_what_was_counted_of_an_allocation_goes_on(start: Starter, allocated: Allocator, peer: socket.socket) -> None:
    relay = start("--control-endpoint", f"{HOST}:9999")
    relay.wait_until_ready()
    client = allocated()
    assert client.bind_channel(CHANNEL, peer.getsockname()) is None
    for _ in range(5):
        exchange(client, peer)
    relay = succeed(start, relay, "--control-endpoint", f"{HOST}:9999")
    exchange(client, peer)

    def counted() -> list[int]:
        with urllib.request.urlopen(f"http://{HOST}:9999/status") as page:
            status = json.loads(page.read())
        return [status["allocations"][0][way]["packets"] for way in ("to_peer", "to_client")]

    wait_until(lambda: counted() == [6, 6])


def test_handovers_are_counted_over_all_processes(start: Starter) -> None:
    control = ("--control-endpoint", f"{HOST}:9999")
    relay = start(*control)
    relay.wait_until_ready()
    for number in (1, 2):
        relay = succeed(start, relay, *control)
        with urllib.request.urlopen(f"http://{HOST}:9999/metrics") as page:
            metrics = page.read().decode()
        assert f"relay_handovers_total {number}" in metrics
        (waited,) = re.findall(r"(?m)^relay_handover_wait_seconds (\S+)$", metrics)
        assert 0 < float(waited) < 2


def test_a_successor_without_a_relay_to_take_over_starts_as_always(start: Starter, allocated: Allocator) -> None:
    relay = start("--take-over")
    relay.wait_until_ready()
    assert allocated().refresh(600) is None


def test_the_socket_of_a_relay_that_was_killed_is_used_again(start: Starter, allocated: Allocator, path: Path) -> None:
    relay = start()
    relay.wait_until_ready()
    wait_until(path.exists)
    relay.process.kill()
    relay.wait()
    assert path.exists()
    second = start("--take-over")
    second.wait_until_ready()
    succeed(start, second)
    assert allocated().refresh(600) is None


def test_a_stopped_relay_removes_its_socket(start: Starter, path: Path) -> None:
    relay = start()
    relay.wait_until_ready()
    wait_until(path.exists)
    assert relay.stop() == 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--health-check-addr", f"{HOST}:8081"), "the health address may not change in one step"),
        (("--bind-ip4-addr", "0.0.0.0"), "the bound addresses may not change in one step"),
        (("--lowest-port", "65535"), "an allocation has a port outside of 65535-65535"),
    ],
)
def test_an_unfit_successor_is_refused_and_the_relay_goes_on(
    start: Starter, allocated: Allocator, options: tuple[str, ...], reason: str
) -> None:
    relay = start()
    relay.wait_until_ready()
    client = allocated()
    unfit = start("--take-over", *options)
    assert unfit.wait() == 2
    (line,) = unfit.log.splitlines()
    assert line.startswith("firezone-relay: can't take over the running relay: ")
    assert reason in line
    relay.wait_for_log("not handed over: this relay goes on")
    assert reason in relay.log
    assert client.refresh(600) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces take root")
def test_a_successor_in_another_network_is_refused(start: Starter, allocated: Allocator) -> None:
    """As a container without the network of the host, with the directory of the socket."""
    relay = start()
    relay.wait_until_ready()
    client = allocated()
    unfit = start("--take-over", by=("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"))
    assert unfit.wait() == 2
    assert unfit.log.endswith("can't take over the running relay: it is in another network namespace\n")
    assert client.refresh(600) is None


def test_a_successor_with_another_secret_gives_up_and_the_relay_goes_on(
    start: Starter, allocated: Allocator, tmp_path: Path
) -> None:
    relay = start()
    relay.wait_until_ready()
    client = allocated()
    other = tmp_path / "other"
    other.write_text("another secret, of sufficient length")
    other.chmod(0o600)
    unfit = start("--take-over", "--relay-secret-file", str(other))
    assert unfit.wait() == 2
    (line,) = unfit.log.splitlines()
    assert line.endswith("the relay's secret may not change in one step")
    relay.wait_for_log("not handed over: this relay goes on")
    assert client.refresh(600) is None


def test_a_relay_that_shuts_down_is_not_handed_over(start: Starter, allocated: Allocator) -> None:
    relay = start("--drain-timeout", "60")
    relay.wait_until_ready()
    client = allocated()
    relay.process.send_signal(signal.SIGTERM)
    relay.wait_for_log("draining")
    late = start("--take-over")
    assert late.wait() == 2
    assert "the relay is shutting down" in late.log
    assert client.refresh(600) is None


def test_detached_the_command_exits_when_its_child_relays(start: Starter, allocated: Allocator) -> None:
    relay = start(real=True)
    relay.wait_until_ready()
    client = allocated()
    command = start("--take-over", "--detach", real=True)
    assert command.process.wait(30) == 0
    assert client.refresh(600) is None
    assert relay.wait() == 0
    # The child has the streams of the command.
    last = start("--take-over")
    last.wait_for_log("taken over")
    assert command.wait() == 0
    assert client.refresh(600) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="PID namespaces take root")
def test_the_first_process_of_a_container_waits_for_its_end(start: Starter, allocated: Allocator) -> None:
    """A container engine would restart it, and it would take the relay back."""
    relay = start(by=("unshare", "--pid", "--fork", "--kill-child"))
    relay.wait_until_ready()
    client = allocated()
    successor = start("--take-over")
    successor.wait_for_log("taken over")
    relay.wait_for_log("handed over: this container can be stopped")
    assert client.refresh(600) is None
    outside = relay.process.pid
    (first,) = Path(f"/proc/{outside}/task/{outside}/children").read_text().split()
    os.kill(int(first), signal.SIGTERM)
    assert relay.wait() == 0
    assert client.refresh(600) is None


def test_detached_without_a_relay_is_a_usage_error(start: Starter) -> None:
    command = start("--take-over", "--detach", real=True)
    assert command.wait() == 2
    assert "no relay listens at" in command.log
