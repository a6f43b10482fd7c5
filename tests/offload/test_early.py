"""Data right behind a ChannelBind, while the kernel takes over the channel."""

import contextlib

import pytest

from relay.core.addresses import Family
from tests.support.offload.fixtures import needs_bpf
from tests.support.offload.relays import Lab
from tests.support.offload.topology import PEER
from tests.support.requirements import needs_ipv6
from tests.support.turn_client import PACKETS, send_behind_a_bind

pytestmark = [needs_bpf, needs_ipv6, pytest.mark.usefixtures("object_file")]

BINDS = 20


@pytest.mark.parametrize("family", Family, ids=lambda family: family.name)
def test_all_data_behind_a_channel_bind_arrives(lab: Lab, family: Family) -> None:
    """In order, except where the kernel overtakes packets that wait in a socket when it takes over the channel."""
    with lab.relay.client(lab.network.client, family) as client, contextlib.ExitStack() as peers:
        client.allocate(family=family)
        for number in range(0x4000, 0x4000 + BINDS):
            # All stay open: a peer's port must not come again, with another channel.
            peer = peers.enter_context(lab.network.peer.udp(PEER[family]))
            received = send_behind_a_bind(client, number, peer)
            assert sorted(received) == [*range(PACKETS)], f"at bind {number:#x}: {lab.relay.dropped()} dropped"
