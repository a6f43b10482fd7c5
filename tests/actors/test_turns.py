"""The server actor hands in the rest of a message that takes too long."""

from random import Random
from typing import Any, cast

from relay.actors.messages import ClientDatagrams
from relay.actors.server import DataPaths, ServerActor
from relay.core.addresses import Family
from relay.core.data import Datagram
from relay.core.overload import TURN
from relay.core.server import Server
from relay.core.stun import MessageClass, Method, encode
from relay.core.timestamp import Timestamp
from relay.ops.totals import ServerCounters
from tests.support.core import CHANNEL, CONFIG, START, channel_data

REQUEST = encode(MessageClass.REQUEST, Method.BINDING, bytes(12), [])


class SlowClock:
    """A clock on which each request takes half a turn."""

    def __init__(self) -> None:
        self._at = START.monotonic

    def now(self) -> Timestamp:
        self._at += TURN / 2
        return Timestamp(self._at, START.unix)

    def monotonic(self) -> float:
        return self._at


class Sink:
    """A socket that counts."""

    def __init__(self) -> None:
        self.sent = 0

    def transmit(self, *_: object) -> None:
        self.sent += 1


def requests(count: int) -> list[Datagram]:
    return [(REQUEST, ("203.0.113.1", 1000 + number), 0, 0) for number in range(count)]


def actor_with(sink: Sink) -> ServerActor:
    paths = DataPaths(cast(Any, {Family.IPV4: sink}), {})
    return ServerActor(Server(CONFIG, Random(1)), paths, SlowClock(), ServerCounters(), lambda *_: None, lambda _: None)


def test_a_message_of_many_requests_takes_many_turns_and_every_request_is_answered() -> None:
    sink = Sink()
    actor = actor_with(sink)
    message: ClientDatagrams | None = ClientDatagrams(requests(20))
    turns = []
    while message is not None:
        before = sink.sent
        message = actor._handle_client_datagrams(message)  # noqa: SLF001 - one turn
        turns.append(sink.sent - before)
    assert sum(turns) == 20
    assert max(turns) <= 3


def test_the_rest_of_a_gro_batch_precedes_the_rest_of_its_message() -> None:
    sink = Sink()
    actor = actor_with(sink)
    batch: Datagram = (REQUEST * 40, ("203.0.113.1", 1), len(REQUEST), 0)
    later: Datagram = (channel_data(CHANNEL, b"later"), ("203.0.113.1", 1), 0, 0)
    rest = actor._handle_client_datagrams(ClientDatagrams([batch, later]))  # noqa: SLF001 - one turn
    assert rest is not None
    assert [each[0] for each in rest.batch] == [REQUEST] * (40 - sink.sent) + [later[0]]
