"""A relay with a client and a peer, as the XDP program knows them; and what they send."""

from typing import Final

from relay.offload.layout import NextHop, Own, packed_address
from tests.offload.model import (
    TICKS,
    Channel,
    Device,
    Hop,
    Model,
    Outcome,
    Settings,
    Tables,
    Verdict,
)
from tests.offload.packets import IPV4, IPV6, channel_data, ethernet, ipv4, ipv6, is_ipv4, udp
from tests.offload.runners import ENTRIES, Runner

OWN: Final = {4: packed_address("203.0.113.1"), 6: packed_address("2001:db8::1")}
CLIENT: Final = {4: packed_address("198.51.100.7"), 6: packed_address("2001:db8:1:f:e:d:c:7")}
OTHER: Final = {4: packed_address("198.51.100.8"), 6: packed_address("2001:db8:1:2:3:4:5:8")}
PEER: Final = {4: packed_address("192.0.2.9"), 6: packed_address("2001:db8:2:fedc:ba98:7654:3210:9")}

SERVICE: Final = 3478
CLIENT_PORT, OTHER_PORT, PEER_PORT = 40001, 40002, 9000
RELAYED, OTHER_RELAYED = 50000, 60001
NUMBER, OTHER_NUMBER = 0x4001, 0x7FFE

HERE, ELSEWHERE = 1, 2
"""Interfaces. The loopback one is the only one that is everywhere."""
OUR_MAC: Final = bytes.fromhex("02a1a2a3a4a5")
FRONT_MAC: Final = bytes.fromhex("02b1b2b3b4b5")
"""Of the router to the clients."""
BACK_MAC: Final = bytes.fromhex("02c1c2c3c4c5")
"""Of the router to the peers."""

TO_PEER, TO_CLIENT, TO_OTHER = 1, 2, 3
"""Indices of next hops."""
CHANNEL, OTHER_CHANNEL = 3, 4
"""Indices of channels."""

PAYLOAD: Final = bytes(range(100))
SETTINGS: Final = Settings((Own(OWN[4]), Own(OWN[6])), (Device(HERE, OUR_MAC, sends_back=True),), SERVICE)


def next_hop(destination: bytes, mac: bytes, vlan: int = 0) -> Hop:
    """The way there, by the interface that all comes from."""
    source = OWN[4 if is_ipv4(destination) else 6]
    return Hop(NextHop(HERE, destination, source, mac, OUR_MAC, vlan, mtu=1500))


def world(client: int = 4, peer: int = 4, vlan: int = 0) -> Tables:
    """A client with one channel to one peer, of families 4 or 6, both behind a VLAN tag if told so."""
    ends = (CLIENT[client], CLIENT_PORT, NUMBER), (PEER[peer], PEER_PORT, RELAYED)
    return Tables.of(
        SETTINGS,
        {CHANNEL: Channel(*ends, TO_CLIENT, TO_PEER, flow_label=0xABCDE)},
        {TO_PEER: next_hop(PEER[peer], BACK_MAC, vlan), TO_CLIENT: next_hop(CLIENT[client], FRONT_MAC, vlan)},
    )


def hairpin(client: int = 4, other: int = 4, relayed: int = 4) -> Tables:
    """Two clients with a channel to each other's relayed address, which are of a family of their own."""
    mine, others = (OWN[relayed], OTHER_RELAYED, RELAYED), (OWN[relayed], RELAYED, OTHER_RELAYED)
    return Tables.of(
        SETTINGS,
        {
            CHANNEL: Channel((CLIENT[client], CLIENT_PORT, NUMBER), mine, is_hairpin=True),
            OTHER_CHANNEL: Channel(
                (OTHER[other], OTHER_PORT, OTHER_NUMBER), others, TO_OTHER, flow_label=0x54321, is_hairpin=True
            ),
        },
        {TO_OTHER: next_hop(OTHER[other], FRONT_MAC)},
    )


def datagram(  # noqa: PLR0913 - all that can be different about a packet
    source: tuple[bytes, int],
    destination: tuple[bytes, int],
    payload: bytes,
    *,
    ip: dict[str, int | bytes] | None = None,
    udp_fields: dict[str, int] | None = None,
    tags: tuple[int, ...] = (),
    trailing: bytes = b"",
    to_mac: bytes = OUR_MAC,
    kind: int | None = None,
) -> bytes:
    """A frame. Fields that are not told are right."""
    inner = udp(source, destination, payload, **(udp_fields or {}))
    if is_ipv4(destination[0]):
        packet = ipv4(source[0], destination[0], inner, **(ip or {}))  # type: ignore[arg-type]
    else:
        packet = ipv6(source[0], destination[0], inner, **(ip or {}))  # type: ignore[arg-type]
    natural = IPV4 if is_ipv4(destination[0]) else IPV6
    return ethernet(to_mac, FRONT_MAC, natural if kind is None else kind, packet + trailing, tags)


def from_client(family: int = 4, payload: bytes = PAYLOAD, *, number: int = NUMBER, **fields: object) -> bytes:
    """A frame with ChannelData; fields are those of `datagram`."""
    message = channel_data(number, payload)
    return datagram((CLIENT[family], CLIENT_PORT), (OWN[family], SERVICE), message, **fields)  # type: ignore[arg-type]


def client_says(message: bytes, trailing: bytes = b"") -> bytes:
    """A frame with anything else."""
    return datagram((CLIENT[4], CLIENT_PORT), (OWN[4], SERVICE), message, trailing=trailing)


def from_peer(family: int = 4, payload: bytes = PAYLOAD, **fields: object) -> bytes:
    """A frame with a datagram; fields are those of `datagram`."""
    return datagram((PEER[family], PEER_PORT), (OWN[family], RELAYED), payload, **fields)  # type: ignore[arg-type]


def agreed(runner: Runner, tables: Tables, *frames: bytes, ifindex: int = HERE) -> list[Outcome]:
    """Run frames one after the other: what became of them, and of all counters, once program and model agree on it."""
    runner.load(tables)
    model = Model(tables)
    outcomes = []
    for frame in frames:
        now = runner.now()
        expected = model.run(frame, ifindex, now)
        check(runner.run(frame, ifindex), expected)
        outcomes.append(expected)
    check_counters(runner, model)
    return outcomes


def check(outcome: Outcome, expected: Outcome) -> None:
    """Compare what can be compared: not all runners know where it was redirected to."""
    assert outcome.verdict == expected.verdict, expected
    assert outcome.frame.hex(" ", 4) == expected.frame.hex(" ", 4)
    assert outcome.ifindex in (expected.ifindex, -1)
    if expected.verdict is Verdict.REDIRECT:
        assert expected.ifindex


def check_counters(runner: Runner, model: Model) -> None:
    """Compare all counts, and who was asked for."""
    assert runner.totals() == model.totals
    for index in {*range(2 * OTHER_CHANNEL + 2), *model.usage} & set(range(ENTRIES)):
        counted, expected = runner.usage(index), model.usage[index]
        assert counted[:2] == expected[:2]
        assert abs(counted.last_used - expected.last_used) <= runner.slack
    for index, entry in model.next_hops.items():
        assert _ticks_between(runner.nudged(index), entry.nudged) <= runner.slack


def _ticks_between(one: int, other: int) -> int:
    return min((one - other) % TICKS, (other - one) % TICKS)
