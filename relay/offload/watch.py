"""The check that interfaces run the XDP program."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from relay.offload.program import Device

INTERVAL: Final = 30.0
"""Seconds between two looks. Some drivers update their statistics only every two seconds."""

LOOKS: Final = 2
"""Consecutive intervals without a frame, after which the program stands still."""

PACKETS: Final = 100
"""Minimum of packets of an interface, and of the sockets, in an interval."""

_STATISTICS: Final = Path("/proc/net/dev")


class Figures(NamedTuple):
    """Counters at a look."""

    frames: Sequence[int]
    """Frames that the program has received, by place of the interface in its settings."""
    received: Mapping[str, int]
    """Packets that the interfaces have received."""
    by_sockets: int
    """Packets that the sockets have relayed."""


class ProgramWatch:
    """Finds interfaces that receive packets without running the program.

    A working interface runs the program for every frame: also for fragments, IP options, unknown next hops, VLAN tags, and
    packets of other programs. So a single frame proves that the program runs. Packets of an interface without the program
    are no sign of a failure, so the statistics of the interface count too.
    """

    def __init__(self) -> None:
        self._devices: list[Device] = []
        self._at = 0.0
        self._before = Figures((), {}, 0)
        self._idle: Counter[str] = Counter()

    def look(self, now: float, devices: list[Device], read: Callable[[], Figures]) -> list[str]:
        """Return the interfaces on which the program stands still, each once. Before the end of an interval, do nothing."""
        if devices == self._devices and now < self._at + INTERVAL:
            return []
        before, after = self._before, read()
        is_comparable = devices == self._devices
        self._devices, self._at, self._before = devices, now, after
        if not is_comparable:
            self._idle.clear()
            return []
        frames: Counter[str] = Counter()
        for device, earlier, later in zip(devices, before.frames, after.frames, strict=False):
            frames[device.name] += later - earlier
        found = []
        for name, count in frames.items():
            received = after.received.get(name, 0) - before.received.get(name, 0)
            is_idle = not count and min(received, after.by_sockets - before.by_sockets) >= PACKETS
            self._idle[name] = self._idle[name] + 1 if is_idle else 0
            if self._idle[name] == LOOKS:
                found.append(name)
        return found


def received_packets(statistics: Path = _STATISTICS) -> dict[str, int]:
    """Return the number of packets that each interface of this network namespace has received."""
    lines = (line.rpartition(":") for line in statistics.read_text().splitlines()[2:])
    return {name.strip(): int(counts.split()[1]) for name, _, counts in lines}
