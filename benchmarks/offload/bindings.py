"""What it takes to install and to remove many channels: the relay's own code, with the kernel's tables behind it."""

import time
from typing import Final

from benchmarks.offload.cases import Case
from benchmarks.offload.network import RELAY_HOSTS
from benchmarks.packets import Metrics
from relay.config import HIGHEST_PORT, LOWEST_PORT
from relay.core.addresses import ChannelNumber, ClientAddress, PeerAddress, RelayedPort
from relay.core.commands import InstallChannel, OffloadCommand, RemoveChannel
from relay.offload.channels import Channels
from relay.offload.program import XdpProgram, bindings_for

_SECONDS: Final = 600.0
_CLIENTS_AT_ONE_HOST: Final = 100
_PEERS: Final = 16
_FIRST_PORT: Final = 10_000
_CHANNEL: Final = ChannelNumber(0x4000)
_MILLISECONDS: Final = 1000


def measure_bindings(case: Case, count: int) -> Metrics:
    """Install many channels in one go, then refresh, then remove them all.

    Raises:
        OSError: the kernel does not take the program.
    """
    program = XdpProgram(bindings_for(count))
    try:
        channels = Channels(program, range(LOWEST_PORT, HIGHEST_PORT + 1), RELAY_HOSTS[:1])
        installing, removing = _commands(count, shared=case.name == "bindings-shared")
        metrics = {
            "install_ms": _carry_out(channels, installing),
            "refresh_ms": _carry_out(channels, installing),
            "remove_ms": _carry_out(channels, removing),
        }
        if channels.failures or channels.refused or channels.installed:
            raise OSError(
                0, f"of {count:,} channels, {channels.refused:,} were refused, {len(channels.installed):,} are left"
            )
        return metrics
    finally:
        program.close()


def _carry_out(channels: Channels, commands: list[OffloadCommand]) -> float:
    before = time.perf_counter()
    channels.carry_out(commands)
    return (time.perf_counter() - before) * _MILLISECONDS


def _commands(count: int, *, shared: bool) -> tuple[list[OffloadCommand], list[OffloadCommand]]:
    """Give what installs all channels, and what removes them."""
    until = time.monotonic() + _SECONDS
    installing: list[OffloadCommand] = []
    removing: list[OffloadCommand] = []
    for number in range(count):
        port = RelayedPort(LOWEST_PORT + number)
        client, peer = _ends(number, shared=shared)
        installing.append(InstallChannel(client, _CHANNEL, port, peer, until))
        removing.append(RemoveChannel(client, _CHANNEL, port, peer))
    return installing, removing


def _ends(number: int, *, shared: bool) -> tuple[ClientAddress, PeerAddress]:
    if shared:
        host, port = divmod(number, _CLIENTS_AT_ONE_HOST)
        return (
            ClientAddress((f"198.51.100.{host}", _FIRST_PORT + port)),
            PeerAddress((f"203.0.113.{number % _PEERS}", _FIRST_PORT + number)),
        )
    high, low = divmod(number, 250)
    return ClientAddress((f"10.1.{high}.{low}", _FIRST_PORT)), PeerAddress((f"10.2.{high}.{low}", _FIRST_PORT))
