"""Allocations as the status lists them: each becomes text by itself.

To turn a large page into JSON in one go would take milliseconds, in which no packet is looked at.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from relay.core.addresses import AllocationId, Family, show, socket_address
from relay.core.allocations import Allocation, Allocations, ChannelBinding, DeadlineKey
from relay.core.credentials import parse_username
from relay.status import model
from relay.status.census import Findings, tally_of
from relay.status.kernel import Tally
from relay.status.pace import Pace
from relay.status.parameters import MOST_CHANNELS
from relay.status.shown import flows_of, seconds


class Rows:
    """Writes allocations.

    Args:
        tables: where they are.
        hosts: of their relayed addresses.
        clock: gives monotonic seconds.
    """

    def __init__(self, tables: Allocations, hosts: Mapping[Family, str], clock: Callable[[], float]) -> None:
        self._tables = tables
        self._hosts = hosts
        self._clock = clock

    def write(self, listed: Iterable[AllocationId], findings: Findings, channels: int, pace: Pace) -> Iterator[str]:
        """Write some allocations as JSON, without those that are gone.

        Args:
            listed: which.
            findings: what is known of what the kernel relayed, and of rates.
            channels: how many to list of each.
            pace: rests.
        """
        left = MOST_CHANNELS
        for id_ in listed:
            allocation = self._tables.by_id.get(id_)
            pace()
            if allocation is not None:
                yield self._row(allocation, findings, min(channels, left), pace)
                left -= min(channels, left, len(allocation.channels))

    def _row(self, allocation: Allocation, findings: Findings, most: int, pace: Pace) -> str:
        channels = list(allocation.channels.values())
        written = []
        for channel in channels[:most]:
            written.append(json.dumps(self._channel(channel, findings.kernel_tally_of(channel))))
            pace()
        to_peer, to_client = flows_of(*tally_of(allocation, channels, findings.by_kernel, pace))
        username = parse_username(allocation.username)
        rates = findings.rates_of(allocation.id)
        row = model.Allocation(
            id=allocation.id,
            client=show(allocation.client),
            state=allocation.state.value,
            relayed=[show(socket_address(self._hosts[family], allocation.port)) for family in allocation.families],
            credential_expires_at=None if username is None else username.expiry,
            age=seconds(self._clock() - allocation.made_at),
            time_left=self._time_left((allocation.id, None)),
            to_peer=to_peer,
            to_client=to_client,
            to_peer_rate=None if rates is None else round(rates[0], 1),
            to_client_rate=None if rates is None else round(rates[1], 1),
            channel_count=len(channels),
            channels=[],
        )
        # They are the last field.
        return f"{json.dumps(row)[:-2]}{', '.join(written)}]}}"

    def _channel(self, channel: ChannelBinding, by_kernel: Sequence[int]) -> model.Channel:
        relayed = Tally(channel.to_peer_packets, channel.to_peer_bytes, channel.to_client_packets, channel.to_client_bytes)
        to_peer, to_client = flows_of(relayed.plus(by_kernel), by_kernel)
        return {
            "number": channel.number,
            "peer": show(channel.peer),
            "state": "live" if channel.live else "cooling",
            "time_left": self._time_left((channel.allocation, channel.number)),
            "to_peer": to_peer,
            "to_client": to_client,
        }

    def _time_left(self, key: DeadlineKey) -> float:
        at = self._tables.deadlines.get(key)
        return 0.0 if at is None else seconds(at - self._clock())
