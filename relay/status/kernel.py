"""What the kernel relays by itself, as far as it is to be seen."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from relay.offload.datapath import ChannelUsage, Datapath
from relay.status.model import Xdp


class Tally(NamedTuple):
    """What was relayed both ways."""

    to_peer_packets: int = 0
    to_peer_bytes: int = 0
    to_client_packets: int = 0
    to_client_bytes: int = 0

    def plus(self, other: Sequence[int]) -> "Tally":
        """Give the sum of both."""
        a, b, c, d = other
        return Tally(self.to_peer_packets + a, self.to_peer_bytes + b, self.to_client_packets + c, self.to_client_bytes + d)


class Kernel(Protocol):
    """What relays without the sockets."""

    def usage(self) -> Iterator[list[ChannelUsage]]:
        """Give what was relayed for each channel there is, in portions of about a millisecond."""

    def relayed(self) -> Tally:
        """Give what was relayed for all channels together, those that are gone among them."""

    def shown(self) -> Xdp:
        """Give where it does that."""


class OffloadedKernel:
    """A kernel with the relay's program.

    Args:
        datapath: the program.
    """

    def __init__(self, datapath: Datapath) -> None:
        self._datapath = datapath
        self.usage = datapath.usage

    def relayed(self) -> Tally:
        """Give what was relayed for all channels together, those that are gone among them."""
        totals = self._datapath.program.totals()
        packets, sizes = totals.packets, totals.bytes
        return Tally(packets["to_peer"], sizes["to_peer"], packets["to_client"], sizes["to_client"])

    def shown(self) -> Xdp:
        """Give where it does that."""
        devices, channels = self._datapath.devices, self._datapath.channels
        return {
            "interfaces": devices.modes,
            "failures": dict(devices.failures),
            "channels": len(channels.installed),
            "channels_refused": channels.refused,
        }
