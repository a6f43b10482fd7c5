"""A relay with a client and a peer in the program's tables, and their packets."""

from typing import Final

from relay.offload.layout import NextHop, Own, packed_address
from tests.support.offload.model import (
    Channel,
    Device,
    Hop,
    Model,
    Outcome,
    Settings,
    Tables,
    Verdict,
)
from tests.support.offload.packets import IPV4, IPV6, channel_data, ethernet, ipv4, ipv6, is_ipv4, udp
from tests.support.offload.runners import ENTRIES, Runner

OWN: Final = {4: packed_address("203.0.113.1"), 6: packed_address("2001:db8::1")}
CLIENT: Final = {4: packed_address("198.51.100.7"), 6: packed_address("2001:db8:1:f:e:d:c:7")}
OTHER: Final = {4: packed_address("198.51.100.8"), 6: packed_address("2001:db8:1:2:3:4:5:8")}
PEER: Final = {4: packed_address("192.0.2.9"), 6: packed_address("2001:db8:2:fedc:ba98:7654:3210:9")}

SERVICE: Final = 3478
CLIENT_PORT, OTHER_PORT, PEER_PORT = 40001, 40002, 9000
RELAYED, OTHER_RELAYED = 50000, 60001
NUMBER, OTHER_NUMBER = 0x4001, 0x7FFE

HERE, ELSEWHERE = 1, 2
"""Interfaces. Only the loopback interface exists everywhere."""
OUR_MAC: Final = bytes.fromhex("02a1a2a3a4a5")
FRONT_MAC: Final = bytes.fromhex("02b1b2b3b4b5")
"""Of the router to the clients."""
BACK_MAC: Final = bytes.fromhex("02c1c2c3c4c5")
"""Of the router to the peers."""

CHANNEL, OTHER_CHANNEL = 3, 4
"""Slots of the counters of channels."""

PAYLOAD: Final = bytes(range(100))
SETTINGS: Final = Settings((Own(OWN[4]), Own(OWN[6])), (Device(HERE, OUR_MAC, sends_back=True),), SERVICE)


def next_hop(destination: bytes, mac: bytes, vlan: int = 0) -> Hop:
    """Return a next hop through the receiving interface."""
    source = OWN[4 if is_ipv4(destination) else 6]
    return Hop(NextHop(HERE, source, mac, OUR_MAC, vlan, mtu=1500))


def world(client: int = 4, peer: int = 4, vlan: int = 0) -> Tables:
    """Return tables of a client with a channel to a peer, of families 4 or 6, optionally both behind a VLAN tag."""
    ends = (CLIENT[client], CLIENT_PORT, NUMBER), (PEER[peer], PEER_PORT, RELAYED)
    return Tables.of(
        SETTINGS,
        {CHANNEL: Channel(*ends)},
        {PEER[peer]: next_hop(PEER[peer], BACK_MAC, vlan), CLIENT[client]: next_hop(CLIENT[client], FRONT_MAC, vlan)},
    )


def hairpin(client: int = 4, other: int = 4, relayed: int = 4) -> Tables:
    """Return tables of two clients with channels to the relayed address of each other, of a separate family."""
    mine, others = (OWN[relayed], OTHER_RELAYED, RELAYED), (OWN[relayed], RELAYED, OTHER_RELAYED)
    return Tables.of(
        SETTINGS,
        {
            CHANNEL: Channel((CLIENT[client], CLIENT_PORT, NUMBER), mine, is_hairpin=True),
            OTHER_CHANNEL: Channel((OTHER[other], OTHER_PORT, OTHER_NUMBER), others, is_hairpin=True),
        },
        {OTHER[other]: next_hop(OTHER[other], FRONT_MAC)},
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
    """Return a frame, with correct values for all unspecified fields."""
    inner = udp(source, destination, payload, **(udp_fields or {}))
    if is_ipv4(destination[0]):
        packet = ipv4(source[0], destination[0], inner, **(ip or {}))  # type: ignore[arg-type]
    else:
        packet = ipv6(source[0], destination[0], inner, **(ip or {}))  # type: ignore[arg-type]
    natural = IPV4 if is_ipv4(destination[0]) else IPV6
    return ethernet(to_mac, FRONT_MAC, natural if kind is None else kind, packet + trailing, tags)


def from_client(family: int = 4, payload: bytes = PAYLOAD, *, number: int = NUMBER, **fields: object) -> bytes:
    """Return a frame with ChannelData; fields are those of `datagram`."""
    message = channel_data(number, payload)
    return datagram((CLIENT[family], CLIENT_PORT), (OWN[family], SERVICE), message, **fields)  # type: ignore[arg-type]


def client_says(message: bytes, trailing: bytes = b"") -> bytes:
    """Return a frame with another payload from the client."""
    return datagram((CLIENT[4], CLIENT_PORT), (OWN[4], SERVICE), message, trailing=trailing)


def from_peer(family: int = 4, payload: bytes = PAYLOAD, **fields: object) -> bytes:
    """Return a frame with a datagram; fields are those of `datagram`."""
    return datagram((PEER[family], PEER_PORT), (OWN[family], RELAYED), payload, **fields)  # type: ignore[arg-type]


def agreed(runner: Runner, tables: Tables, *frames: bytes, ifindex: int = HERE) -> list[Outcome]:
    """Run frames in sequence, check that program and model agree, and return results and counters."""
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
    """Compare the results: some runners do not know the target of a redirect."""
    assert outcome.verdict == expected.verdict, expected
    assert outcome.frame.hex(" ", 4) == expected.frame.hex(" ", 4)
    assert outcome.ifindex in (expected.ifindex, -1)
    if expected.verdict is Verdict.REDIRECT:
        assert expected.ifindex


def check_counters(runner: Runner, model: Model) -> None:
    """Compare all counters, and the probed neighbours."""
    assert runner.totals() == model.totals
    for index in {*range(2 * OTHER_CHANNEL + 2), *model.usage} & set(range(ENTRIES)):
        counted, expected = runner.usage(index), model.usage[index]
        assert counted[:2] == expected[:2]
        assert abs(counted.last_used - expected.last_used) <= runner.slack
    for destination, entry in model.next_hops.items():
        if entry.nudged:
            assert abs(runner.nudged(destination) - entry.nudged) <= runner.slack
