"""The XDP program matches its model for any tables and any packets, and does not access memory out of bounds."""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from hypothesis import given
from hypothesis import strategies as st

from relay.offload.layout import CHANNEL as CHANNEL_LAYOUT
from relay.offload.layout import NEXT_HOP, NextHop, Own
from tests.support.examples import examples
from tests.support.offload.model import NEVER, SECOND, Channel, Device, Hop, Model, Settings, Tables, Way
from tests.support.offload.packets import channel_data, is_ipv4, pseudo_header, sum_of, with_right_header
from tests.support.offload.runners import ENTRIES, HostRunner
from tests.support.offload.world import (
    BACK_MAC,
    CLIENT,
    CLIENT_PORT,
    ELSEWHERE,
    FRONT_MAC,
    HERE,
    NUMBER,
    OTHER,
    OTHER_NUMBER,
    OTHER_PORT,
    OTHER_RELAYED,
    OUR_MAC,
    OWN,
    PEER,
    PEER_PORT,
    RELAYED,
    SERVICE,
    check,
    check_counters,
    datagram,
    hairpin,
    world,
)

FRAMES: Final = examples(2_000).max_examples
"""Frames of the fuzz test, which take half a second. Long tests use more."""
FRAMES_PER_TABLES: Final = 25

NOW: Final = 10_100 * SECOND

# Few values of each kind, so that equal values and limits are frequent.
ADDRESSES: Final = (*OWN.values(), *CLIENT.values(), *OTHER.values(), *PEER.values(), bytes(16), b"\xff" * 16)
PORTS: Final = (SERVICE, CLIENT_PORT, OTHER_PORT, PEER_PORT, RELAYED, OTHER_RELAYED, 49152, 65535, 49151, 0)
NUMBERS: Final = (NUMBER, OTHER_NUMBER, 0x4000, 0x7FFF, 0x3FFF, 0x8000)
SLOTS: Final = (0, 1, 2, 3, ENTRIES // 2 - 1, ENTRIES // 2, ENTRIES, (1 << 30) - 1)
TIMES: Final = (0, NOW - SECOND, NOW - SECOND + 1, NOW - 1, NOW, NOW + 1, NOW + SECOND, NEVER, (1 << 64) - 1)
NUDGED: Final = (0, *(NOW + each for each in (-SECOND, 1 - SECOND, -1, 0, 1, 2 * SECOND)))
VLANS: Final = (0, 0, 0, 7, 0x0FFF)
WAYS: Final = (None, Way(1), Way(1), Way(2), Way(1, 7), Way(0x12345))
MTUS: Final = (0, 60, 68, 127, 128, 576, 1280, 1500, 9000, 0xFFFFFFFF)
SIZES: Final = (*range(24), 60, 61, 127, 128, 129, 1279, 1452, 1468, 1472, 1473, 2047, 8000)
MACS: Final = (OUR_MAC, FRONT_MAC, BACK_MAC, b"\xff" * 6)
FAMILIES: Final = (4, 6)


class Source:
    """Generates tables and packets."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def one(self, choices: Sequence[Any]) -> Any:  # noqa: ANN401 - any element of the sequence
        return self._chance.choice(choices)

    def bits(self, count: int) -> int:
        return self._chance.getrandbits(count)

    def below(self, limit: int) -> int:
        return self._chance.randrange(limit)

    def happens(self, one_in: int) -> bool:
        return not self._chance.randrange(one_in)

    def octets(self, length: int) -> bytes:
        return self._chance.randbytes(length)

    def tables(self) -> Tables:
        """Return mostly valid tables with changes, and sometimes arbitrary tables."""
        if self.happens(8):
            return self._any_tables()
        one, other, third = (self.one(FAMILIES) for _ in range(3))
        tables = hairpin(one, other, third) if self.happens(3) else world(one, other, self.one((0, 0, 1, 0xFFFF)))
        changes: list[Callable[[Tables], Tables]] = [
            lambda it: it.with_channels(self._index(it), expires=self.one((*TIMES, None))),
            lambda it: it.with_channels(self._index(it), is_hairpin=bool(self.bits(1))),
            lambda it: it.with_channels(self._index(it), client=self._end(NUMBERS)),
            lambda it: it.with_channels(self._index(it), peer=self._end(PORTS)),
            lambda it: it.with_flipped(self.below(8 * CHANNEL_LAYOUT.size - 32)),
            lambda it: replace(it, clients={end: self.one(list(it.clients.values())) for end in it.clients}),
            lambda it: replace(it, peers={end: self.one(list(it.clients.values())) for end in it.peers}),
            lambda it: replace(it, clients={end: each._replace(slot=self.one(SLOTS)) for end, each in it.clients.items()}),
            lambda it: it.with_next_hops(mtu=self.one(MTUS), ifindex=self.one((HERE, ELSEWHERE))),
            lambda it: it.with_next_hops(flipped=self.below(8 * NEXT_HOP.size - 128)),
            lambda it: it.with_next_hops(stale=bool(self.bits(1)), nudged=self.one(NUDGED)),
            lambda it: it.with_next_hops(vlan=self.bits(16), to_mac=self.octets(6), from_mac=self.octets(6)),
            lambda it: it.with_settings(own=self._settings().own),
            lambda it: it.in_vlan(self.one(VLANS)),
            lambda it: it.with_settings(devices=self._settings().devices),
            lambda it: replace(it, ways={end[0]: self.one(WAYS) for end in (*it.clients, *it.peers)}),
            lambda it: it.with_settings(lowest_port=self.one(PORTS), highest_port=self.one(PORTS)),
        ]
        for _ in range(self.one((0, 1, 1, 2, 4))):
            tables = self.one(changes)(tables)
        return tables

    def _settings(self) -> Settings:
        own = tuple(Own(self.one(ADDRESSES), self.one(VLANS)) for _ in range(self.below(17)))
        devices = tuple(
            Device(1 + self.below(10), self.one(MACS), bool(self.bits(1)), bool(self.bits(1)), self.one((0, 0, 1, 0x12345)))
            for _ in range(self.below(9))
        )
        return Settings(own, devices, *(self.one(PORTS) for _ in range(3)))

    def _any_tables(self) -> Tables:
        return Tables.of(
            self._settings(),
            {self.one((*range(10), ENTRIES - 1)): self._channel() for _ in range(self.below(9))},
            dict(self._hop() for _ in range(4)),
        )

    def _index(self, tables: Tables) -> int:
        return int(self.one(list(tables.channels) or [0]))

    def _end(self, tags: Sequence[int]) -> tuple[bytes, int, int]:
        return self.one(ADDRESSES), self.one(PORTS), self.one(tags)

    def _channel(self) -> Channel:
        return Channel(self._end(NUMBERS), self._end(PORTS), self.one(TIMES), self.happens(3))

    def _hop(self) -> tuple[bytes, Hop]:
        family = self.one(FAMILIES)
        destination = self.one((OWN, CLIENT, OTHER, PEER))[family]
        macs = self.octets(6), self.octets(6)
        vlan, stale = self.one((0, 7)), self.happens(3)
        return destination, Hop(NextHop(1 + self.below(3), OWN[family], *macs, vlan, self.one(MTUS), stale))

    def frame(self, tables: Tables) -> bytes:
        """Return mostly a frame of a channel, sometimes damaged."""
        if tables.clients and self.happens(2):
            address, port, number = self.one(list(tables.clients))
            payload = channel_data(number, self.octets(self.one(SIZES)))
            target = tables.settings.service_port
        elif tables.peers:
            address, port, target = self.one(list(tables.peers))
            payload = self.octets(self.one(SIZES))
        else:
            address, port, target = self.one(ADDRESSES), self.one(PORTS), self.one(PORTS)
            payload = channel_data(self.one(NUMBERS), self.octets(self.one(SIZES)))
        family = 4 if is_ipv4(address) else 6
        partial = sum_of(pseudo_header(address, OWN[family], 8 + len(payload)))
        frame = datagram(
            (address, port),
            (OWN[family], target),
            payload,
            ip={"traffic_class": self.bits(8), "hop_limit": self.one((0, 1)) if self.happens(20) else 2 + self.below(254)},
            udp_fields={"checksum": self.one((0, 0xFFFF, partial, self.bits(16)))} if self.happens(8) else {},
            tags=self._tags(tables.settings.vlan_of(OWN[family]) or 0),
            to_mac=tables.settings.devices[0].mac if tables.settings.devices else OUR_MAC,
        )
        frame += self.octets(self._trailing(len(frame)))
        return self.damaged(frame) if self.happens(4) else frame

    def _tags(self, vlan: int) -> tuple[int, ...]:
        """Return mostly the tag of packets for an address of this VLAN."""
        if self.happens(6):
            return tuple(self.one(((0,), (1,), (7,), (0xFFFF,), (1, 2), (7, 7), ())))
        priority = self.bits(4) << 12
        return (priority | vlan,) if vlan or self.happens(6) else ()

    def _trailing(self, length: int) -> int:
        """Return no bytes, padding, or more bytes than padding."""
        padded = max(self.one((59, 60, 63, 64, 65)) - length, 0)
        return int(self.one((0, padded, padded, self.one((1, 4, 14)) if self.happens(4) else 0)))

    def damaged(self, frame: bytes) -> bytes:
        """Return the frame with a few changed bytes, mostly in the headers."""
        damaged = bytearray(frame)
        for _ in range(1 + self.below(3)):
            at = self.below(min(len(damaged), 90)) if damaged else 0
            match self.below(6):
                case 0:
                    damaged[at:] = b""
                case 1:
                    damaged[at:at] = self.octets(self.below(9))
                case 2:
                    damaged[at : at + 1 + self.below(4)] = b""
                case 3:
                    damaged[at : at + 2] = self.one((b"\0\0", b"\xff\xff", b"\0\x04", b"\0\x08", b"\x40\0", self.octets(2)))
                case _:
                    damaged[at : at + 1] = bytes([damaged[at] ^ 1 << self.below(8)]) if damaged else b"\0"
        return with_right_header(bytes(damaged)) if self.bits(1) else bytes(damaged)

    def ifindex(self, tables: Tables) -> int:
        devices = tables.settings.devices
        return self.one(devices).ifindex if devices and not self.happens(10) else HERE


def compare(host: HostRunner, source: Source, frames: int) -> None:
    """Compare program and model on random frames and tables."""
    tables = source.tables()
    headroom = source.one((0, 4, 20, 28)) if source.happens(6) else 256
    host.load(tables)
    host.set_headroom(headroom)
    model = Model(tables, headroom)
    with host.at(NOW):
        for number in range(frames):
            frame, ifindex = source.frame(tables), source.ifindex(tables)
            # Half a second each: a stale neighbour is probed in every second step.
            now = NOW + number * (SECOND // 2) if source.happens(4) else host.now()
            host.set_clock(max(now, host.now()))
            check(host.run(frame, ifindex), model.run(frame, ifindex, host.now()))
        check_counters(host, model)


@examples(50)
@given(st.randoms(use_true_random=False))
def test_the_program_matches_the_model(host: HostRunner, chance: random.Random) -> None:
    compare(host, Source(chance), frames=4)


def test_no_frame_causes_an_out_of_bounds_access_or_a_mismatch(host: HostRunner) -> None:
    given_seed = os.environ.get("XDP_FUZZ_SEED")
    first = int(given_seed) if given_seed else 0 if os.environ.get("CI") else random.SystemRandom().getrandbits(32)
    for seed in range(first, first + FRAMES // FRAMES_PER_TABLES):
        try:
            compare(host, Source(random.Random(seed)), FRAMES_PER_TABLES)
        except BaseException as error:
            error.add_note(f"again: XDP_FUZZ_SEED={seed}")
            raise
