"""The tables of allocations and their channels, and the only functions that write to the tables.

All live bindings of a client are one entry of the look-up tables for packets, so the end of an allocation takes the same
short time with one channel and with thousands. ChannelData of inside channels has a look-up table of its own, so all other
packets pay nothing for inside channels.

**The kernel** follows in portions of `KERNEL_PORTION`: removing a channel there takes several µs. Until the kernel has
removed all channels of a freed allocation, no other allocation gets its port.
"""

import itertools
from collections.abc import Callable

from relay.core.addresses import (
    AllocationId,
    ChannelNumber,
    ClientAddress,
    Family,
    PeerAddress,
    RelayedPort,
    family_of,
    network_of,
)
from relay.core.allocation import CHANNEL_GRACE_PERIOD, CHANNEL_LIFETIME, Allocation, AllocationState, ChannelBinding
from relay.core.commands import Commands, InstallChannel, RemoveChannel
from relay.core.deadlines import Deadlines
from relay.core.overload import KERNEL_PORTION


class Allocations:
    """The tables. Anything may read the tables; only the methods change them.

    Args:
        is_relayed: checks whether an address is a relayed address of this relay.
        offload: receives commands for the kernel. None: the kernel relays nothing.
    """

    def __init__(self, is_relayed: Callable[[PeerAddress], bool], offload: Commands | None = None) -> None:
        self._is_relayed = is_relayed
        self._offload = offload
        self.by_id: dict[AllocationId, Allocation] = {}
        self.by_client: dict[ClientAddress, Allocation] = {}
        self.by_username: dict[str, Allocation] = {}
        self.by_network: dict[str, int] = {}
        """The number of allocations of each client address, by `network_of`."""
        self.by_port: dict[RelayedPort, AllocationId] = {}
        """Established allocations."""
        self.live_channels: dict[ClientAddress, dict[ChannelNumber, ChannelBinding]] = {}
        """Bindings for ChannelData from clients: `Allocation.outside` of each client."""
        self.inside_channels: dict[ClientAddress, dict[ChannelNumber, ChannelBinding]] = {}
        """`Allocation.inside` of each client."""
        self.live_peers: dict[AllocationId, dict[PeerAddress, ChannelBinding]] = {}
        """Bindings for datagrams from peers: `Allocation.live_peers` of each allocation."""
        self.channels = 0
        """Channels of all allocations, in both states."""
        self.expired = 0
        """Those of them in their grace period."""
        self.deadlines = Deadlines()
        """The next deadline of each allocation: its own end, or of one of its channels."""
        self.changed: set[AllocationId] | None = None
        """Allocations that have changed since a handover began; None without a handover."""
        self._removing: dict[ClientAddress, dict[ChannelNumber, ChannelBinding]] = {}
        """Channels that have ended and that the kernel has still."""
        self._extending: dict[AllocationId, list[ChannelNumber]] = {}
        """Channels of extended allocations from `cut_short`, extended once each. A client may cut channels short again."""

    def add(self, allocation: Allocation, ends: float) -> None:
        """Add an allocation."""
        allocation.ends = ends
        self._enter(allocation)
        self.deadlines.set(allocation.id, ends)

    def restore(self, allocation: Allocation, bindings: list[ChannelBinding], at: float, sequence: int) -> None:
        """Add an allocation of another relay, with its channels and its deadline, or replace a former copy.

        The kernel relays its live channels from now on.
        """
        former = self.by_id.get(allocation.id)
        if former is not None:
            self._leave(former)
            for binding in former.live.values():
                self._uninstall(binding)
        self._enter(allocation)
        self.channels += len(bindings)
        for binding in bindings:
            self._put(allocation, binding)
        if allocation.state is AllocationState.ESTABLISHED:
            self.by_port[allocation.port] = allocation.id
        self.deadlines.restore(allocation.id, at, sequence)
        for binding in allocation.live.values() if self._offload is not None else ():
            self._install(allocation, binding)

    def replace_port(self, allocation: Allocation, port: RelayedPort) -> None:
        """Replace the port of an allocation that is not established, because the machine refused it."""
        allocation.refused_ports.append(allocation.port)
        allocation.port = port
        self._note(allocation)

    def extend(self, allocation: Allocation, ends: float) -> None:
        """Extend an established allocation."""
        self.by_port[allocation.port] = allocation.id
        allocation.ends = ends
        self._note(allocation)
        self._set_deadline(allocation)
        # Every granted lifetime is at least as long as a channel's, so no channel outlives the new end.
        if allocation.cut_short:
            self._extending[allocation.id] = [*allocation.cut_short]
            # Else a wake-up does both, and returns the port of the ended allocation.
            if not self._removing:
                self.update_kernel()

    def remove(self, allocation: Allocation) -> None:
        """Remove an allocation and its channels from all tables."""
        self.deadlines.discard(allocation.id)
        self._leave(allocation)
        del self.by_id[allocation.id]
        del self.by_client[allocation.client]
        del self.by_username[allocation.username]
        del self.live_channels[allocation.client]
        del self.inside_channels[allocation.client]
        self.by_port.pop(allocation.port, None)
        del self.live_peers[allocation.id]
        self._remove_from_kernel(allocation.client, allocation.live)

    def bind_channel(self, allocation: Allocation, number: ChannelNumber, peer: PeerAddress, now: float) -> None:
        """Bind or refresh a channel. Neither the number nor the peer may have another binding."""
        binding, _ = allocation.held(number, peer)
        if binding is None:
            binding = ChannelBinding(allocation.id, allocation.client, number, allocation.port, peer, self._is_relayed(peer))
            self.channels += 1
        elif binding.live:
            del allocation.live[number]
        else:
            self._take(allocation, binding)
        self._note(allocation)
        binding.live, binding.until = True, now + CHANNEL_LIFETIME
        self._put(allocation, binding)
        self._set_deadline(allocation)
        self._install(allocation, binding)

    def end_grace_periods(self, allocation: Allocation, now: float, most: int) -> int:
        """Remove channels whose grace period has ended, at most ``most``; return their number."""
        due = _due(allocation.expired, CHANNEL_GRACE_PERIOD, now, most)
        for binding in due:
            self.unbind_channel(allocation, binding)
        self._set_deadline(allocation)
        return len(due)

    def expire_channels(self, allocation: Allocation, now: float, most: int) -> list[ChannelBinding]:
        """End the lives of channels that have expired, at most ``most``; return the channels."""
        due = _due(allocation.live, 0, now, most)
        for binding in due:
            self.expire_channel(allocation, binding)
        self._set_deadline(allocation)
        return due

    def expire_channel(self, allocation: Allocation, binding: ChannelBinding) -> None:
        """End a live channel, and begin its grace period."""
        self._note(allocation)
        self._take(allocation, binding)
        self._put(allocation, binding)
        self._uninstall(binding)

    def cut_channel(self, allocation: Allocation, binding: ChannelBinding, now: float) -> None:
        """End a live channel early, and begin its grace period."""
        binding.until = now
        self.expire_channel(allocation, binding)
        self._set_deadline(allocation)

    def unbind_channel(self, allocation: Allocation, binding: ChannelBinding) -> None:
        """Remove a channel in either state from the tables."""
        self._note(allocation)
        self._take(allocation, binding)
        self.channels -= 1
        allocation.to_peer_packets += binding.to_peer_packets
        allocation.to_peer_bytes += binding.to_peer_bytes
        allocation.to_client_packets += binding.to_client_packets
        allocation.to_client_bytes += binding.to_client_bytes

    def remove_family(self, allocation: Allocation, family: Family) -> None:
        """Remove one relayed address of a dual allocation, and the channels to peers of the same family."""
        self._note(allocation)
        allocation.families = tuple(each for each in allocation.families if each is not family)
        ended = [each for each in allocation.channels.values() if family_of(each.peer) is family]
        live = {each.number: each for each in ended if each.live}
        for binding in ended:
            self.unbind_channel(allocation, binding)
        self._set_deadline(allocation)
        self._remove_from_kernel(allocation.client, live)

    def is_in_kernel(self, client: ClientAddress) -> bool:
        """Check whether the kernel still has channels of a client that have ended."""
        return client in self._removing

    def is_removal_long(self, allocation: Allocation) -> bool:
        """Check whether the kernel needs several portions to remove an allocation."""
        work = len(allocation.live) + sum(map(len, self._removing.values()))
        return self._offload is not None and work > KERNEL_PORTION

    @property
    def is_kernel_behind(self) -> bool:
        """Whether `update_kernel` has work left."""
        return bool(self._removing or self._extending)

    def update_kernel(self) -> None:
        """Remove ended channels from the kernel, or extend channels, at most `KERNEL_PORTION`."""
        left = KERNEL_PORTION
        while self._removing and left:
            client, bindings = next(iter(self._removing.items()))
            for number in tuple(itertools.islice(bindings, left)):
                self._uninstall(bindings.pop(number))
                left -= 1
            if not bindings:
                del self._removing[client]
        while self._extending and left:
            id_, numbers = next(iter(self._extending.items()))
            allocation = self.by_id.get(id_)
            while allocation is not None and numbers and left:
                if (number := numbers.pop()) in allocation.cut_short:
                    self._install(allocation, allocation.live[number])
                left -= 1
            if left:
                del self._extending[id_]

    def _enter(self, allocation: Allocation) -> None:
        """Add an allocation to the tables, or replace a copy that has left."""
        self._note(allocation)
        self.by_id[allocation.id] = allocation
        self.by_client[allocation.client] = allocation
        self.by_username[allocation.username] = allocation
        self.live_channels[allocation.client] = allocation.outside
        self.inside_channels[allocation.client] = allocation.inside
        self.live_peers[allocation.id] = allocation.live_peers
        network = network_of(allocation.client)
        self.by_network[network] = self.by_network.get(network, 0) + 1

    def _leave(self, allocation: Allocation) -> None:
        """Subtract an allocation from the totals."""
        self.channels -= allocation.channel_count
        self.expired -= len(allocation.expired)
        network = network_of(allocation.client)
        self.by_network[network] -= 1
        if not self.by_network[network]:
            del self.by_network[network]

    def _note(self, allocation: Allocation) -> None:
        if self.changed is not None:
            self.changed.add(allocation.id)

    def _set_deadline(self, allocation: Allocation) -> None:
        at = allocation.ends
        for binding in itertools.islice(allocation.live.values(), 1):
            at = min(at, binding.until)
        for binding in itertools.islice(allocation.expired.values(), 1):
            at = min(at, binding.until + CHANNEL_GRACE_PERIOD)
        if at != self.deadlines.get(allocation.id):
            self.deadlines.set(allocation.id, at)

    def _put(self, allocation: Allocation, binding: ChannelBinding) -> None:
        """Add a channel to the tables of its state."""
        number, peer = binding.number, binding.peer
        if binding.live:
            allocation.live[number] = allocation.live_peers[peer] = binding
            (allocation.inside if binding.inside else allocation.outside)[number] = binding
        else:
            allocation.expired[number] = allocation.expired_peers[peer] = binding
            self.expired += 1

    def _take(self, allocation: Allocation, binding: ChannelBinding) -> None:
        """Remove a channel from the tables of its state, and end its life."""
        number, peer = binding.number, binding.peer
        if binding.live:
            binding.live = False
            del allocation.live[number], allocation.live_peers[peer]
            del (allocation.inside if binding.inside else allocation.outside)[number]
            allocation.cut_short.pop(number, None)
        else:
            del allocation.expired[number], allocation.expired_peers[peer]
            self.expired -= 1

    def _install(self, allocation: Allocation, binding: ChannelBinding) -> None:
        """Let the kernel relay a channel until the channel or the allocation ends."""
        if self._offload is None:
            return
        former = self._removing.get(binding.client, {}).pop(binding.number, None)
        if former is not None:
            self._uninstall(former)
        if binding.until > allocation.ends:
            allocation.cut_short[binding.number] = None
        else:
            allocation.cut_short.pop(binding.number, None)
        until = min(binding.until, allocation.ends)
        self._offload.append(
            InstallChannel(binding.client, binding.number, binding.port, binding.peer, until, binding.inside)
        )

    def _uninstall(self, binding: ChannelBinding) -> None:
        if self._offload is not None:
            self._offload.append(RemoveChannel(binding.client, binding.number, binding.port, binding.peer))

    def _remove_from_kernel(self, client: ClientAddress, bindings: dict[ChannelNumber, ChannelBinding]) -> None:
        if self._offload is not None and bindings:
            self._removing.setdefault(client, {}).update(bindings)
            self.update_kernel()


def _due(bindings: dict[ChannelNumber, ChannelBinding], after: int, now: float, most: int) -> list[ChannelBinding]:
    """Return the first channels, at most ``most``, that have expired for ``after`` seconds or more."""
    due = itertools.takewhile(lambda binding: binding.until + after <= now, bindings.values())
    return list(itertools.islice(due, most))
