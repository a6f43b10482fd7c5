"""Open the sockets of the port for clients and the kernel's data path, or continue with those of another process."""

import contextlib
import gc
import resource
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from relay.actors.messages import OwnAddresses
from relay.config import Config
from relay.core.addresses import Family
from relay.core.server import Server
from relay.net.asked import AskedAddresses
from relay.net.handover import close_all
from relay.net.reuseport import ReuseportGroup
from relay.net.udp import UdpCounters
from relay.ops.clock import Clock
from relay.ops.machine import UNSPECIFIED, open_service_sockets

if TYPE_CHECKING:
    # Imported only by relays that use them.
    from relay.offload.datapath import Datapath
    from relay.system.offload import Offloading
    from relay.system.succession import Inheritance


class OwnNetwork(NamedTuple):
    """The addresses of this machine."""

    hosts: Mapping[Family, str]
    """The hosts of the port for clients, by family."""
    addresses: OwnAddresses


def open_data_paths(  # noqa: PLR0913, PLR0917 - the parts of a process
    config: Config,
    network: OwnNetwork,
    core: Server,
    counters: UdpCounters,
    clock: Clock,
    datapath: "Datapath | None",
    inheritance: "Inheritance | None",
    stack: contextlib.ExitStack,
) -> tuple[dict[Family, ReuseportGroup], "Offloading | None"]:
    """Return the sockets by family, and offload. With a predecessor, this process relays from the end on.

    Raises:
        UsageError: a socket can't be opened, the kernel refuses offload, or the predecessor is not taken over.
    """
    groups: dict[Family, ReuseportGroup] = {}
    asked: dict[Family, AskedAddresses] = {}
    if inheritance is not None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        inheritance.receive(config, network.hosts, core, counters, limit)
        groups = inheritance.groups
    for family, host in network.hosts.items():
        if inheritance is None:
            groups[family] = open_service_sockets(family, host, config.service_port, counters)
        for each in groups[family].all:
            stack.callback(each.close)
        if host == UNSPECIFIED[family]:
            is_needed = family in network.addresses.several
            asked[family] = AskedAddresses(core.allocations.by_client, is_needed=is_needed)
            groups[family].answer_from(asked[family])
    offload = None
    if datapath is not None:
        from relay.system.offload import Offloading  # noqa: PLC0415 - for few relays only

        def relayed_packets() -> int:
            return core.counters.to_peer_packets + core.counters.to_client_packets

        listening = {family: group.data[0] for family, group in groups.items()}
        offload = Offloading(datapath, network.addresses.hosts, listening, clock, relayed_packets)
        stack.callback(offload.stop)
        offload.start(None if inheritance is None else inheritance.take_links())
    if inheritance is not None:
        # Without offload here, the links stay until the predecessor ends.
        close_all(inheritance.take_links().descriptors)
        _succeed(core, counters, inheritance, asked, offload)
    return groups, offload


def _succeed(
    core: Server,
    counters: UdpCounters,
    inheritance: "Inheritance",
    asked: Mapping[Family, AskedAddresses],
    offload: "Offloading | None",
) -> None:
    def prepare() -> None:
        for family, each in asked.items():
            inheritance.restore(each, family, core)
        if offload is not None:
            offload.install(core.drain())

    # Most of the state, while the predecessor goes on. The rest follows at the decision.
    prepare()
    # A collection of all this would stop everything for up to a second.
    gc.freeze()
    inheritance.decide(core, counters, prepare)
    if offload is not None:
        # Before the first change of an allocation.
        offload.replace()
