"""The kernel's data path, opened by the process before it starts a thread and drops its capabilities."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from relay.config import Config, OffloadConfig, UsageError
from relay.core.addresses import ChannelNumber, ClientAddress
from relay.offload import capabilities, devices, elf
from relay.offload.channels import Channels
from relay.offload.devices import Devices
from relay.offload.elf import BrokenObjectError, NotBuiltError
from relay.offload.layout import SIZE_STEP
from relay.offload.netlink import Network
from relay.offload.network import Link
from relay.offload.program import Usage, XdpProgram, bindings_for

OLDEST_KERNEL: Final = (5, 19)
"""Older kernels require CAP_BPF for every use of a map, and the relay has dropped CAP_BPF by then."""

_PORTION: Final = 256
"""Channels per read of usage counters. A read takes about 1 ms, during which no packet is relayed by the sockets."""

_MILLISECONDS: Final = 3
"""Decimal places of seconds. The program's clock is no more precise."""


class ChannelUsage(NamedTuple):
    """Traffic that the kernel relayed for a channel since its installation."""

    client: ClientAddress
    number: ChannelNumber
    to_peer: Usage
    to_client: Usage

    def readable(self, now: float) -> dict[str, object]:
        """Return the usage for the page, at a time in monotonic seconds."""
        return {"to_peer": _readable(self.to_peer, now), "to_client": _readable(self.to_client, now)}


@dataclass(frozen=True, slots=True)
class Datapath:
    """The program with its tables and interfaces."""

    program: XdpProgram
    channels: Channels
    devices: Devices
    notes: tuple[str, ...] = ()
    """Messages to log after the log is set up."""

    def detach(self) -> None:
        """Detach the program: the sockets relay everything."""
        self.program.write_settings((), ())
        self.devices.detach()

    def close(self) -> None:
        """Detach the program and release all resources."""
        self.devices.detach()
        self.program.close()

    def state(self) -> dict[str, object]:
        """Return the state and the counters for the status page."""
        totals = self.program.totals()
        return {
            "xdp_attached": self.devices.modes,
            "xdp_failures": dict(self.devices.failures),
            "xdp_channels": len(self.channels.installed),
            "xdp_channels_refused": self.channels.refused,
            "xdp_table_failures": self.channels.failures,
            "xdp_stalls": self.devices.stalls,
            "xdp_frames": sum(totals.frames),
            "xdp_packets": totals.packets,
            "xdp_bytes": totals.bytes,
            "xdp_sizes": {
                direction: {f"{at * SIZE_STEP}+": count for at, count in enumerate(counts) if count}
                for direction, counts in totals.sizes.items()
            },
            "xdp_passed": {reason.name.lower(): count for reason, count in totals.passed.items()},
        }

    def usage(self) -> Iterator[list[ChannelUsage]]:
        """Return the usage of all channels in portions. Let other threads run between the portions."""
        for first in range(0, len(self.channels.by_slot), _PORTION):
            keys = self.channels.by_slot[first : first + _PORTION]
            read = zip(keys, self.program.usage(first, len(keys)), strict=True)
            yield [ChannelUsage(*key, *both) for key, both in read if key is not None]


def open_datapath(
    config: Config, offload: OffloadConfig, packaged: Callable[[], bytes] = elf.packaged, *, is_successor: bool = False
) -> Datapath:
    """Load and attach the program, and drop the capabilities for this.

    Call this before starting a thread: dropping a capability affects only the calling thread and threads started later.

    Args:
        config: the settings.
        offload: the settings of offload.
        packaged: returns the object file.
        is_successor: attach the program later, in place of the predecessor's.

    Raises:
        UsageError: the machine, the process or the package does not support offload.
    """
    _check_kernel(os.uname().release)
    with asking(), Network() as network:
        links = network.links()
    devices.check(offload, links)
    missing = capabilities.missing()
    if missing:
        raise UsageError(
            f"--ebpf-offloading needs {', '.join(missing)}: run as root, or with AmbientCapabilities= of the unit file"
        )
    program = _load(config, packaged)
    try:
        channels = Channels(program)
        attached = Devices(program, offload)
        notes = [] if is_successor else _attach(attached, links)
        capabilities.drop()
    except BaseException:
        program.close()
        raise
    return Datapath(program, channels, attached, tuple(notes))


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """Convert errors of rtnetlink queries.

    Raises:
        UsageError: the query failed.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"--ebpf-offloading: can't ask the kernel about its network ({error.strerror}): allow AF_NETLINK"
        ) from error


def _readable(usage: Usage, now: float) -> dict[str, float | None]:
    idle = None if usage.last_used is None else round(now - usage.last_used, _MILLISECONDS)
    return {"packets": usage.packets, "bytes": usage.bytes, "idle_seconds": idle}


def _load(config: Config, packaged: Callable[[], bytes]) -> XdpProgram:
    try:
        return XdpProgram(bindings_for(config.capacity), packaged(), config.service_port, config.ports)
    except NotBuiltError as error:
        raise UsageError(
            "--ebpf-offloading: this package was built without clang: install clang and build it again"
        ) from error
    except BrokenObjectError as error:
        raise UsageError(f"--ebpf-offloading: {error}: install this package again") from error
    except OSError as error:
        if error.filename is not None:
            raise UsageError(f"--ebpf-offloading: {error.filename} is not readable: mount /sys") from error
        raise UsageError(
            f"--ebpf-offloading: the kernel does not take the program ({error.strerror}): relay without it"
        ) from error


def _attach(attached: Devices, links: list[Link]) -> list[str]:
    """Attach the program to all interfaces, or to none."""
    notes = attached.attach(links)
    if attached.failures:
        attached.detach()
        raise UsageError(f"--ebpf-offloading: {next(iter(attached.failures.values()))}")
    return notes


def _check_kernel(release: str) -> None:
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None or (int(found[1]), int(found[2])) < OLDEST_KERNEL:
        wanted = ".".join(map(str, OLDEST_KERNEL))
        raise UsageError(f"--ebpf-offloading needs Linux {wanted}, this is {release}: relay without it")
