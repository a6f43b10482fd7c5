"""Two ICE agents with relayed candidates only."""

import asyncio
from collections.abc import Sequence

from aioice import Candidate, Connection

from relay.core.credentials import Credential


async def connect(one: Connection, other: Connection) -> None:
    """Exchange relayed candidates only, and run ICE."""
    await asyncio.gather(one.gather_candidates(), other.gather_candidates())
    for here, there in ((one, other), (other, one)):
        relayed = [candidate for candidate in there.local_candidates if candidate.type == "relay"]
        assert relayed, "no relayed candidate"
        for candidate in relayed:
            await here.add_remote_candidate(Candidate.from_sdp(candidate.to_sdp()))
        await here.add_remote_candidate(None)
        here.remote_username, here.remote_password = there.local_username, there.local_password
    await asyncio.gather(one.connect(), other.connect())


async def converse(host: str, credentials: Sequence[Credential]) -> None:
    """Connect two agents through the relay on a host, with two credentials, and exchange messages."""
    one, other = (
        Connection(
            ice_controlling=controlling,
            turn_server=(host, 3478),
            turn_username=credential.username,
            turn_password=credential.password,
        )
        for controlling, credential in zip((True, False), credentials, strict=True)
    )
    await connect(one, other)
    await one.send(b"hello")
    assert await other.recv() == b"hello"
    await other.send(b"good day")
    assert await one.recv() == b"good day"
    await asyncio.gather(one.close(), other.close())
