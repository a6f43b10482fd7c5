"""The kernel's data path, from its opening at the start of the process: before any thread, while there are capabilities."""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from relay.config import BadUseError, Config, OffloadConfig
from relay.core.addresses import ChannelNumber, ClientAddress, show
from relay.offload import capabilities, devices
from relay.offload.channels import Channels
from relay.offload.devices import Devices
from relay.offload.elf import BrokenObjectError, NotBuiltError
from relay.offload.layout import SIZE_STEP
from relay.offload.netlink import Network
from relay.offload.network import Link
from relay.offload.program import Usage, XdpProgram, bindings_for

OLDEST_KERNEL: Final = (5, 19)
"""Before it, nobody without CAP_BPF could use a table, though it is his own; and we have given that up by then."""

_PORTION: Final = 256
"""Channels whose usage is read in one go: a millisecond, in which no packet is looked at."""

_MILLISECONDS: Final = 3
"""Digits of seconds. The program's clock is no better than that."""


class ChannelUsage(NamedTuple):
    """What the kernel relayed for a channel since it was installed."""

    client: ClientAddress
    number: ChannelNumber
    to_peer: Usage
    to_client: Usage


@dataclass(frozen=True, slots=True)
class Datapath:
    """The program with its tables, and where it is attached."""

    program: XdpProgram
    channels: Channels
    devices: Devices
    notes: tuple[str, ...] = ()
    """What is to be logged, once there is a log."""

    def detach(self) -> None:
        """Have the sockets relay everything."""
        self.program.write_settings((), ())
        self.devices.detach()

    def close(self) -> None:
        """Detach it, and give everything back."""
        self.devices.detach()
        self.program.close()

    def state(self) -> dict[str, object]:
        """Give what there is to be seen, in numbers."""
        totals = self.program.totals()
        return {
            "xdp_attached": self.devices.modes,
            "xdp_failures": dict(self.devices.failures),
            "xdp_channels": len(self.channels.installed),
            "xdp_channels_refused": self.channels.refused,
            "xdp_table_failures": self.channels.failures,
            "xdp_packets": totals.packets,
            "xdp_bytes": totals.bytes,
            "xdp_sizes": {
                direction: {f"{at * SIZE_STEP}+": count for at, count in enumerate(counts) if count}
                for direction, counts in totals.sizes.items()
            },
            "xdp_passed": {reason.name.lower(): count for reason, count in totals.passed.items()},
        }

    def usage(self) -> Iterator[list[ChannelUsage]]:
        """Give what each channel relayed, in portions: let others run between them."""
        for first in range(0, len(self.channels.by_index), _PORTION):
            channels = self.channels.by_index[first : first + _PORTION]
            read = zip(channels, self.program.usage(first, len(channels)), strict=True)
            yield [ChannelUsage(*channel[0], *both) for channel, both in read if channel is not None]


def open_datapath(config: Config, offload: OffloadConfig) -> Datapath:
    """Load the program, attach it, and give up what that took.

    To be called before any thread is started: only the thread that gives up a capability is without it, and those that it
    starts from then on.

    Raises:
        BadUseError: this machine, this process or this package can't do it.
    """
    _check_kernel(os.uname().release)
    with asking(), Network() as network:
        links = network.links()
    devices.check(offload, links)
    missing = capabilities.missing()
    if missing:
        raise BadUseError(
            f"--ebpf-offloading needs {', '.join(missing)}: run as root, or with AmbientCapabilities= of the unit file"
        )
    program = _load(config)
    try:
        channels = Channels(program, config.ports, config.public_hosts.values())
        attached = Devices(program, offload)
        notes = _attach(attached, links)
        capabilities.drop()
    except BaseException:
        program.close()
        raise
    return Datapath(program, channels, attached, tuple(notes))


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """Ask the kernel about its network.

    Raises:
        BadUseError: it can't be asked.
    """
    try:
        yield
    except OSError as error:
        raise BadUseError(
            f"--ebpf-offloading: can't ask the kernel about its network ({error.strerror}): allow AF_NETLINK"
        ) from error


def usage_by_client(portion: list[ChannelUsage], now: float) -> dict[str, dict[str, object]]:
    """Give usage for people and programs to read: by client, and so by allocation; then by channel.

    Args:
        portion: what was read.
        now: monotonic seconds.
    """
    told: dict[str, dict[str, object]] = {}
    for client, number, to_peer, to_client in portion:
        told.setdefault(show(client), {})[f"{number:#06x}"] = {
            "to_peer": _readable(to_peer, now),
            "to_client": _readable(to_client, now),
        }
    return told


def _readable(usage: Usage, now: float) -> dict[str, float | None]:
    idle = None if usage.last_used is None else round(now - usage.last_used, _MILLISECONDS)
    return {"packets": usage.packets, "bytes": usage.bytes, "idle_seconds": idle}


def _load(config: Config) -> XdpProgram:
    try:
        program = XdpProgram(bindings_for(config.capacity))
    except NotBuiltError as error:
        raise BadUseError(
            "--ebpf-offloading: this package was built without clang: install clang and build it again"
        ) from error
    except BrokenObjectError as error:
        raise BadUseError(f"--ebpf-offloading: {error}: install this package again") from error
    except OSError as error:
        raise BadUseError(
            f"--ebpf-offloading: the kernel does not take the program ({error.strerror}): relay without it"
        ) from error
    program.listen_to(config.service_port, config.ports)
    return program


def _attach(attached: Devices, links: list[Link]) -> list[str]:
    """Attach to all interfaces, or to none."""
    notes = attached.attach({each.ifindex: each for each in links})
    if attached.failures:
        attached.detach()
        raise BadUseError(f"--ebpf-offloading: {next(iter(attached.failures.values()))}")
    return notes


def _check_kernel(release: str) -> None:
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None or (int(found[1]), int(found[2])) < OLDEST_KERNEL:
        wanted = ".".join(map(str, OLDEST_KERNEL))
        raise BadUseError(f"--ebpf-offloading needs Linux {wanted}, this is {release}: relay without it")
