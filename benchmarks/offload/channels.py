"""Installation and removal of many channels: the relay's own code, with the tables of the XDP program."""

import time
from typing import Final

from benchmarks.results import Metrics
from relay.config import LOWEST_PORT
from relay.core.addresses import ChannelNumber, ClientAddress, PeerAddress, RelayedPort
from relay.core.commands import InstallChannel, OffloadCommand, RemoveChannel
from relay.offload import elf
from relay.offload.channels import Channels
from relay.offload.program import XdpProgram, bindings_for

_SECONDS: Final = 600.0
_PORT: Final = 10_000
_CHANNEL: Final = ChannelNumber(0x4000)


def measure_channels(count: int) -> Metrics:
    """Install many channels at once, refresh them, and remove them."""
    program = XdpProgram(bindings_for(count), elf.packaged())
    try:
        channels = Channels(program)
        installing, removing = _commands(count)
        metrics = {
            "install_ms": _milliseconds(channels, installing),
            "refresh_ms": _milliseconds(channels, installing),
            "remove_ms": _milliseconds(channels, removing),
        }
        if channels.failures or channels.refused or channels.installed:
            raise OSError(f"of {count:,} channels, {channels.refused:,} were rejected, {len(channels.installed):,} are left")
        return metrics
    finally:
        program.close()


def _milliseconds(channels: Channels, commands: list[OffloadCommand]) -> float:
    before = time.perf_counter()
    channels.carry_out(commands)
    return (time.perf_counter() - before) * 1000


def _commands(count: int) -> tuple[list[OffloadCommand], list[OffloadCommand]]:
    """Return the commands that install and that remove all channels; each has a client and a peer of its own."""
    until, flows = time.monotonic() + _SECONDS, []
    for number in range(count):
        host = f"{number // 250}.{number % 250}"
        client, peer = ClientAddress((f"10.1.{host}", _PORT)), PeerAddress((f"10.2.{host}", _PORT))
        flows.append((client, _CHANNEL, RelayedPort(LOWEST_PORT + number), peer))
    return [InstallChannel(*flow, until) for flow in flows], [RemoveChannel(*flow) for flow in flows]
