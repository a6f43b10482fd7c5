"""The kernel's tables from the core's commands: the kernel relays by these tables only, without knowledge of requests."""

from collections.abc import Iterable
from typing import NamedTuple

from relay.core.commands import Command, InstallChannel, RemoveChannel
from tests.simulation.clock import BrokenError
from tests.simulation.wire import Address


class Entry(NamedTuple):
    """A channel relayed by the kernel."""

    client: Address
    number: int
    port: int
    peer: Address
    until: float
    inside: bool


class Kernel:
    """Relays installed channels until they expire."""

    def __init__(self) -> None:
        self.by_channel: dict[tuple[Address, int], Entry] = {}
        self.by_peer: dict[tuple[int, Address], Entry] = {}

    def take(self, commands: Iterable[Command]) -> None:
        """Execute the kernel's commands.

        Raises:
            BrokenError: the command contradicts the tables.
        """
        for command in commands:
            match command:
                case InstallChannel():
                    self._install(Entry(*command))
                case RemoveChannel(client, number, port, peer):
                    entry = self.by_channel.pop((client, number), None)
                    if entry is None or entry[:4] != command or self.by_peer.pop((port, peer), None) is not entry:
                        raise BrokenError(f"the kernel is to remove {command}, and has {entry}")
                case _:
                    pass

    def to_peer(self, client: Address, number: int, now: float) -> Entry | None:
        entry = self.by_channel.get((client, number))
        return entry if entry is not None and now < entry.until else None

    def to_client(self, port: int, peer: Address, now: float) -> Entry | None:
        entry = self.by_peer.get((port, peer))
        return entry if entry is not None and now < entry.until else None

    def _install(self, entry: Entry) -> None:
        old, other = self.by_channel.get((entry.client, entry.number)), self.by_peer.get((entry.port, entry.peer))
        if old is not other or (old is not None and old[:4] != entry[:4]):
            raise BrokenError(f"the kernel is to relay {entry}, and has {old} and {other}")
        self.by_channel[entry.client, entry.number] = self.by_peer[entry.port, entry.peer] = entry
