"""aioice and aiortc against the running program."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias, cast

import pytest
from aioice.turn import create_turn_endpoint
from aiortc import RTCBundlePolicy, RTCConfiguration, RTCIceServer, RTCPeerConnection
from aiortc.rtcconfiguration import RTCIceTransportPolicy

from relay.core.credentials import Credential, RelaySecret, mint
from tests.support.ice import converse
from tests.support.program import Program, ProgramStarter

SECONDS = 90

Address: TypeAlias = tuple[str, int]


class Echo(asyncio.DatagramProtocol):
    """An echo peer."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: Address) -> None:
        self.transport.sendto(data, addr)


class Collector(asyncio.DatagramProtocol):
    """Data received through a relay."""

    def __init__(self) -> None:
        self.received: asyncio.Queue[tuple[bytes, Address]] = asyncio.Queue()
        self.is_deleted = asyncio.Event()
        """Whether the allocation was deleted."""

    def datagram_received(self, data: bytes, addr: Address) -> None:
        self.received.put_nowait((data, addr))

    def connection_lost(self, exc: Exception | None) -> None:
        assert exc is None
        self.is_deleted.set()


@pytest.fixture
def secret_file(tmp_path: Path) -> str:
    path = tmp_path / "secret"
    path.write_text("secret for two\n")
    return str(path)


def credentials(count: int) -> list[Credential]:
    return [mint(RelaySecret("secret for two"), 1 << 33, f"salt{number}") for number in range(count)]


def test_an_aioice_endpoint_sends_through_the_relay_and_deletes_its_allocation(program: Program) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        peer, _ = await loop.create_datagram_endpoint(Echo, local_addr=("127.0.0.1", 0))
        transport, client = await create_turn_endpoint(
            Collector, (program.host, 3478), program.credential.username, program.credential.password
        )
        address = peer.get_extra_info("sockname")
        for number in range(50):
            transport.sendto(b"packet %d" % number, address)
            assert await client.received.get() == (b"packet %d" % number, address)
        assert program.dump()["relay.active_allocations"] == "1"
        transport.close()
        await client.is_deleted.wait()
        assert program.dump()["relay.active_allocations"] == "0"
        peer.close()

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_two_ice_agents_connect_through_one_relay(start_program: ProgramStarter, secret_file: str) -> None:
    program = start_program("--relay-secret-file", secret_file)
    asyncio.run(asyncio.wait_for(converse(program.host, credentials(2)), SECONDS))


@asynccontextmanager
async def webrtc_peers(program: Program) -> AsyncIterator[tuple[RTCPeerConnection, RTCPeerConnection]]:
    """Two peers with relayed candidates only."""
    peers = tuple(
        RTCPeerConnection(
            RTCConfiguration(
                iceServers=[
                    RTCIceServer(urls=f"turn:{program.host}:3478", username=each.username, credential=each.password)
                ],
                bundlePolicy=RTCBundlePolicy.MAX_BUNDLE,
                iceTransportPolicy=RTCIceTransportPolicy.RELAY,
            )
        )
        for each in credentials(2)
    )
    yield peers[0], peers[1]
    await asyncio.gather(*(peer.close() for peer in peers))


def test_two_webrtc_peers_exchange_messages_on_a_data_channel(start_program: ProgramStarter, secret_file: str) -> None:
    program = start_program("--relay-secret-file", secret_file)

    async def run() -> None:
        async with webrtc_peers(program) as (one, other):
            answered: asyncio.Queue[str] = asyncio.Queue()
            channel = one.createDataChannel("test")
            channel.on("open", lambda: channel.send("question"))
            channel.on("message", answered.put_nowait)
            other.on("datachannel", lambda there: there.on("message", lambda text: there.send(f"answer to {text}")))
            await one.setLocalDescription(await one.createOffer())
            await other.setRemoteDescription(one.localDescription)
            await other.setLocalDescription(await other.createAnswer())
            await one.setRemoteDescription(other.localDescription)
            assert "typ relay" in one.localDescription.sdp
            assert "typ host" not in one.localDescription.sdp
            assert await answered.get() == "answer to question"

    asyncio.run(asyncio.wait_for(run(), SECONDS))
