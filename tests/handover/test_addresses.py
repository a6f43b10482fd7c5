"""A successor on a machine with several addresses sends to each client from the address that the client asked."""

from pathlib import Path
from typing import Final

from relay.core.addresses import Family, socket_address
from tests.support.handover import SECRET, credential_of
from tests.support.offload.topology import CLIENT, PEER, row
from tests.support.program import Program
from tests.support.requirements import needs_ipv6
from tests.support.turn_client import TurnClient

pytestmark = needs_ipv6

PUBLIC: Final = ("203.0.113.77", "2001:db8:77::77")
"""Of a NAT: the relay is bound to all addresses."""
ASKED: Final = {Family.IPV4: "10.77.2.1", Family.IPV6: "fd77:2::1"}
"""Of the interface to the peer. The route to the client prefers another address."""
CHANNEL: Final = 0x4000


def test_packets_to_clients_leave_from_the_address_that_they_asked_the_former_relay(tmp_path: Path, path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    options = (
        *("--handover-socket", str(path), "--relay-secret-file", str(secret)),
        *("--health-check-addr", "127.0.0.1:0", "--control-endpoint", "127.0.0.1:0"),
    )
    with row() as network:
        with network.relay.entered():
            relay = Program(*options, hosts=PUBLIC)
        try:
            relay.wait_until_ready()
            clients = []
            for family in Family:
                with network.client.entered():
                    client = TurnClient((ASKED[family], 3478), credential_of(f"user{family}"), CLIENT[family])
                # A connected socket receives nothing from other addresses.
                client.socket.connect(client.server)
                peer = network.peer.udp(PEER[family])
                (relayed,) = client.allocate(family=family)
                assert client.bind_channel(CHANNEL, socket_address(*peer.getsockname()[:2])) is None
                clients.append((client, peer, (ASKED[family], relayed[1])))
            with network.relay.entered():
                successor = Program(*options, "--take-over", hosts=PUBLIC)
            try:
                assert relay.wait() == 0, relay.log
                successor.wait_for_log("taken over")
                for client, peer, at in clients:
                    peer.sendto(b"to the client", at)
                    assert client.receive() == (CHANNEL, b"to the client")
                    assert client.refresh(600) is None
                    client.socket.close()
                    peer.close()
                assert successor.stop() == 0
            finally:
                successor.close()
        finally:
            relay.close()
