"""What the core tells of, as lines of the log."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import structlog

from relay.core.addresses import ChannelNumber, PeerAddress, show
from relay.core.authentication import ErrorCode, Reason
from relay.core.events import (
    CORE_EVENTS,
    AllocationCreated,
    AllocationFreed,
    AllocationRefreshed,
    Answered,
    ChannelBound,
    ChannelExpired,
    ChannelRefreshed,
    CoreEvent,
    LimitReached,
    PeerRefused,
    RelayedAddressDeleted,
    RequestRefused,
)
from relay.core.stun import Method
from relay.ops.logs.filter import Level

_ALLOCATIONS = structlog.get_logger("relay.core.allocations")
_CHANNELS = structlog.get_logger("relay.core.channels")
_REQUESTS = structlog.get_logger("relay.core.requests")
_ANSWERS = structlog.get_logger("relay.core.answers")


_OfAllocation: TypeAlias = (
    AllocationCreated
    | AllocationRefreshed
    | RelayedAddressDeleted
    | AllocationFreed
    | ChannelBound
    | ChannelRefreshed
    | ChannelExpired
    | PeerRefused
)


class Watched(NamedTuple):
    """As whose event, how high, and as what a kind of event is written."""

    target: str
    level: Level
    event: str


WATCHED: dict[type[CoreEvent], Watched] = {
    AllocationCreated: Watched("relay.core.allocations", Level.INFO, "allocation created"),
    AllocationRefreshed: Watched("relay.core.allocations", Level.DEBUG, "allocation refreshed"),
    RelayedAddressDeleted: Watched("relay.core.allocations", Level.DEBUG, "relayed address deleted"),
    AllocationFreed: Watched("relay.core.allocations", Level.INFO, "allocation freed"),
    ChannelBound: Watched("relay.core.channels", Level.DEBUG, "channel bound"),
    ChannelRefreshed: Watched("relay.core.channels", Level.DEBUG, "channel refreshed"),
    ChannelExpired: Watched("relay.core.channels", Level.DEBUG, "channel expired"),
    PeerRefused: Watched("relay.core.requests", Level.INFO, "peer refused"),
    LimitReached: Watched("relay.core.requests", Level.WARN, "limit reached"),
    RequestRefused: Watched("relay.core.requests", Level.INFO, "request refused"),
    Answered: Watched("relay.core.answers", Level.DEBUG, "answered"),
}


def wanted(admits: Callable[[str, Level], bool]) -> frozenset[type[CoreEvent]]:
    """Give the events that the core needs to tell of, by what a filter admits."""
    return frozenset(kind for kind in CORE_EVENTS if admits(WATCHED[kind].target, WATCHED[kind].level))


class CoreLog:
    """Writes events of the core.

    Args:
        monotonic: gives the core's monotonic seconds.
        leaves_out: tells whether an event of some target, level and words comes too often to be written; None writes all.
    """

    def __init__(self, monotonic: Callable[[], float], leaves_out: Callable[[str, Level, str], bool] | None = None) -> None:
        self._monotonic = monotonic
        self._leaves_out = leaves_out
        self._writers: dict[type, Callable[[Any], None]] = {
            AllocationCreated: _write_created,
            AllocationRefreshed: _write_refreshed,
            RelayedAddressDeleted: _write_address_deleted,
            AllocationFreed: self._write_freed,
            ChannelBound: _write_bound,
            ChannelRefreshed: _write_channel_refreshed,
            ChannelExpired: _write_expired,
            PeerRefused: _write_peer_refused,
            LimitReached: _write_limit,
            RequestRefused: _write_request_refused,
            Answered: _write_answered,
        }

    def write(self, event: CoreEvent) -> None:
        """Write an event, if it does not come too often."""
        kind = type(event)
        # Before a line is made of it: when many clients allocate, that would be a tenth of what an allocation costs.
        if self._leaves_out is None or not self._leaves_out(*WATCHED[kind]):
            self._writers[kind](event)

    def _write_freed(self, event: AllocationFreed) -> None:
        _ALLOCATIONS.info(
            "allocation freed",
            **_whose(event),
            reason=event.reason.value,
            age=round(self._monotonic() - event.made_at),
            to_peer_bytes=event.to_peer_bytes,
            to_client_bytes=event.to_client_bytes,
        )


def _write_created(event: AllocationCreated) -> None:
    missing = {"not_served": [str(each) for each in event.missing_families]} if event.missing_families else {}
    relayed = [show(each) for each in event.relayed]
    _ALLOCATIONS.info("allocation created", **_whose(event), relayed=relayed, lifetime=event.lifetime, **missing)


def _write_refreshed(event: AllocationRefreshed) -> None:
    _ALLOCATIONS.debug("allocation refreshed", **_whose(event), lifetime=event.lifetime)


def _write_address_deleted(event: RelayedAddressDeleted) -> None:
    _ALLOCATIONS.debug("relayed address deleted", **_whose(event), family=str(event.family))


def _write_bound(event: ChannelBound) -> None:
    _CHANNELS.debug("channel bound", **_whose(event), **_channel(event.number, event.peer))


def _write_channel_refreshed(event: ChannelRefreshed) -> None:
    _CHANNELS.debug("channel refreshed", **_whose(event), **_channel(event.number, event.peer))


def _write_expired(event: ChannelExpired) -> None:
    _CHANNELS.debug("channel expired", **_whose(event), **_channel(event.number, event.peer))


def _write_peer_refused(event: PeerRefused) -> None:
    _REQUESTS.info(
        "peer refused", **_whose(event), peer=show(event.peer), request=_name(event.method), rule=event.rule.value
    )


def _write_limit(event: LimitReached) -> None:
    _REQUESTS.warning("limit reached", client=show(event.client), limit=event.limit.value, code=int(event.code))


def _write_request_refused(event: RequestRefused) -> None:
    _REQUESTS.info(
        "request refused", client=show(event.client), request=_name(event.method), **_why(event.code, event.reason)
    )


def _write_answered(event: Answered) -> None:
    outcome = {"success": True} if event.code is None else {"success": False, **_why(event.code, event.reason)}
    _ANSWERS.debug("answered", client=show(event.client), request=_name(event.method), **outcome)


def _whose(event: _OfAllocation) -> dict[str, object]:
    return {"allocation": event.allocation, "client": show(event.client)}


def _why(code: ErrorCode, reason: Reason | None) -> dict[str, object]:
    return {"code": int(code), "reason": reason.value if reason is not None else code.name.lower()}


def _channel(number: ChannelNumber, peer: PeerAddress) -> dict[str, object]:
    return {"channel": f"{number:#06x}", "peer": show(peer)}


def _name(method: Method) -> str:
    return method.name.lower()
