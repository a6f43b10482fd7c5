"""ICE agents on separate machines that use only the relay: the kernel relays their messages."""

import asyncio
import queue
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeAlias

import pytest
from aioice import Candidate, Connection

from relay.core.addresses import Family
from tests.support.offload.fixtures import needs_bpf
from tests.support.offload.relays import Lab, credential
from tests.support.offload.topology import RELAY, Host
from tests.support.requirements import needs_ipv6

pytestmark = [needs_bpf, needs_ipv6, pytest.mark.usefixtures("object_file")]

SECONDS = 90
MESSAGES = 50


class Introduction(NamedTuple):
    """Credentials and candidates of an agent."""

    username: str
    password: str
    candidates: list[str]


Letterbox: TypeAlias = "queue.SimpleQueue[Introduction]"


class Agent:
    """An agent in its own thread on a machine."""

    def __init__(self, host: Host, server: str, *, first: bool, own: Letterbox, others: Letterbox) -> None:
        self._host = host
        self._server = server
        self._first = first
        self._own = own
        self._others = others

    def run(self) -> list[bytes]:
        """Connect to the other agent, exchange messages, and return the received messages."""
        with self._host.entered():
            return asyncio.run(asyncio.wait_for(self._talk(), SECONDS))

    async def _talk(self) -> list[bytes]:
        login = credential()
        connection = Connection(
            ice_controlling=self._first,
            turn_server=(self._server, 3478),
            turn_username=login.username,
            turn_password=login.password,
        )
        await self._meet(connection)
        heard = []
        for number in range(MESSAGES):
            said = b"message %d of a conversation by nobody but the relay" % number
            if self._first:
                await connection.send(said)
                heard.append(await connection.recv())
            else:
                heard.append(await connection.recv())
                await connection.send(said)
        await connection.close()
        return heard

    async def _meet(self, connection: Connection) -> None:
        await connection.gather_candidates()
        relayed = [each.to_sdp() for each in connection.local_candidates if each.type == "relay"]
        assert relayed, "no relayed candidate"
        self._own.put(Introduction(connection.local_username, connection.local_password, relayed))
        other = await asyncio.to_thread(self._others.get, timeout=SECONDS)
        for each in other.candidates:
            await connection.add_remote_candidate(Candidate.from_sdp(each))
        await connection.add_remote_candidate(None)
        connection.remote_username, connection.remote_password = other.username, other.password
        await connection.connect()


def test_two_ice_agents_communicate_through_the_kernel(lab: Lab) -> None:
    network, relay, _ = lab
    letters: tuple[Letterbox, Letterbox] = queue.SimpleQueue(), queue.SimpleQueue()
    server = RELAY[Family.IPV4]
    one = Agent(network.client, server, first=True, own=letters[0], others=letters[1])
    other = Agent(network.peer, server, first=False, own=letters[1], others=letters[0])
    before = relay.counts()
    with ThreadPoolExecutor(2) as pool:
        heard = [each.result(SECONDS) for each in [pool.submit(one.run), pool.submit(other.run)]]
    expected = [b"message %d of a conversation by nobody but the relay" % number for number in range(MESSAGES)]
    assert heard == [expected, expected]
    counts = relay.counts().since(before)
    # Each message goes from its sender to a relayed address, and from there to the client of the second relayed address.
    assert min(counts[:2]) >= 2 * MESSAGES, counts
