"""The server actor sends packets that were held for a ChannelBind before the kernel relays their channel."""

import random

import pytest

from relay.actors.messages import ClientDatagrams
from relay.actors.server import DataPaths, ServerActor
from relay.core.addresses import AllocationId, ChannelNumber, ClientAddress, Family, PeerAddress, RelayedPort
from relay.core.commands import Command, InstallChannel, SendToClient, SendToPeer
from relay.core.credentials import RelaySecret
from relay.core.data import Datagram
from relay.core.server import Server
from relay.core.timestamp import Timestamp
from relay.net.udp import UdpSocket
from relay.ops.totals import ServerCounters
from relay.system.core import server_config
from tests.support.system import CONFIG, JumpingClock
from tests.support.turn_client import udp_socket

PEER = PeerAddress(("127.0.0.1", 9))
ALLOCATION = AllocationId(7)


class Binding(Server):
    """A core that binds a channel for each datagram."""

    def handle_client_datagram(self, datagram: Datagram, now: Timestamp) -> SendToPeer | None:
        client = ClientAddress(datagram[1])
        self.commands += [
            InstallChannel(client, ChannelNumber(0x4000), RelayedPort(50000), PEER, now.monotonic + 600),
            SendToPeer(ALLOCATION, b"early", PEER),
            SendToClient(b"success", client),
        ]
        return None


def test_early_packets_are_sent_before_the_kernel_relays_their_channel(request: pytest.FixtureRequest) -> None:
    core = Binding(server_config(CONFIG, RelaySecret("secret"), frozenset(), offloads=True), random.Random(1))
    counters = ServerCounters()
    sent_before: list[int] = []

    def offload(commands: list[Command]) -> None:
        assert any(isinstance(each, InstallChannel) for each in commands)
        # The allocation has no sockets, so a packet that was sent counts as late.
        sent_before.append(counters.late_sends)

    with UdpSocket(Family.IPV4, "127.0.0.1", 0) as listening, udp_socket("127.0.0.1") as client:
        paths = DataPaths({Family.IPV4: listening}, {}, offload)
        server = ServerActor.start(core, paths, JumpingClock(), counters, lambda *_: None, lambda _: None)
        request.addfinalizer(server.stop)
        server.tell(ClientDatagrams([(b"ChannelBind", client.getsockname(), 0, 0)]))
        assert client.recv(100) == b"success"
    assert sent_before == [1]
    assert counters.late_sends == 1
