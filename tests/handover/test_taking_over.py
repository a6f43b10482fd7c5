"""A second process takes a running relay over: clients, peers and the portal notice nothing."""

import json
import os
import re
import signal
import socket
import struct
import threading
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from tests.support.handover import HOST, Allocator, Starter
from tests.support.program import Program
from tests.support.turn_client import TurnClient
from tests.support.waiting import wait_until

CHANNEL = 0x4000

MOST_UNDER_WAY = 200
"""Packets. An overloaded relay may drop packets, with or without a handover."""


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


class Traffic:
    """Numbered packets of clients to one peer and back, as many at once as any relay can hold."""

    def __init__(self, clients: list[TurnClient], peer: socket.socket) -> None:
        self._clients = clients
        self._peer = peer
        self._is_over = threading.Event()
        self.sent = 0
        self.to_peer: list[tuple[int, int]] = []
        self.to_clients: list[tuple[int, int]] = []
        self._threads = [
            threading.Thread(target=self._send),
            threading.Thread(target=self._receive_at_peer),
            *(threading.Thread(target=self._receive_at, args=(number,)) for number in range(len(clients))),
        ]
        for each in self._threads:
            each.start()

    def stop(self) -> None:
        """Send no more, and wait until all packets have arrived."""
        self._is_over.set()
        for each in self._threads:
            each.join()

    def _send(self) -> None:
        number = 0
        while not self._is_over.is_set():
            for index, client in enumerate(self._clients):
                client.send(CHANNEL, struct.pack("!II", index, number))
                self._peer.sendto(struct.pack("!II", index, number), client.relayed)
                self.sent += 1
            number += 1
            wait_until(lambda: 2 * self.sent - len(self.to_peer) - len(self.to_clients) < MOST_UNDER_WAY)
        for index, client in enumerate(self._clients):
            client.send(CHANNEL, b"end")
            self._peer.sendto(b"end", self._clients[index].relayed)

    def _receive_at_peer(self) -> None:
        ends = 0
        while ends < len(self._clients):
            data = self._peer.recv(100)
            if data == b"end":
                ends += 1
            else:
                self.to_peer.append(struct.unpack("!II", data))

    def _receive_at(self, index: int) -> None:
        while (data := self._clients[index].receive()[1]) != b"end":
            self.to_clients.append(struct.unpack("!II", data))


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
    for received in (traffic.to_peer, traffic.to_clients):
        assert len(received) == traffic.sent
        assert Counter(received).most_common(1)[0][1] == 1
        assert {index for index, _ in received} == set(range(20))


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
