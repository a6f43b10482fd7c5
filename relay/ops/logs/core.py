"""Log the events of the core."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from relay.core.addresses import show
from relay.core.errors import ErrorCode, Reason
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
from relay.logger import Level, emit

Fields: TypeAlias = dict[str, object]


class LoggedAs(NamedTuple):
    """The target, level, name and fields with which events of a type are logged."""

    target: str
    level: Level
    event: str
    fields: Callable[[Any], Fields]


def _allocation(event: Any, **fields: object) -> Fields:  # noqa: ANN401 - any event of an allocation
    return {"allocation": event.allocation, "client": show(event.client), **fields}


def _created(event: AllocationCreated) -> Fields:
    missing = {"not_served": [str(each) for each in event.missing_families]} if event.missing_families else {}
    return _allocation(event, relayed=[show(each) for each in event.relayed], lifetime=event.lifetime, **missing)


def _freed(event: AllocationFreed) -> Fields:
    flow = {"to_peer_bytes": event.to_peer_bytes, "to_client_bytes": event.to_client_bytes}
    return _allocation(event, reason=event.reason.value, **flow)


def _channel(event: ChannelBound | ChannelRefreshed | ChannelExpired) -> Fields:
    return _allocation(event, channel=f"{event.number:#06x}", peer=show(event.peer))


def _peer_refused(event: PeerRefused) -> Fields:
    return _allocation(event, peer=show(event.peer), request=event.method.name.lower(), rule=event.rule.value)


def _limit_reached(event: LimitReached) -> Fields:
    return {"client": show(event.client), "limit": event.limit.value, "code": int(event.code)}


def _request_refused(event: RequestRefused) -> Fields:
    return {"client": show(event.client), "request": event.method.name.lower(), **_error(event.code, event.reason)}


def _answered(event: Answered) -> Fields:
    outcome = {"success": True} if event.code is None else {"success": False, **_error(event.code, event.reason)}
    return {"client": show(event.client), "request": event.method.name.lower(), **outcome}


def _error(code: ErrorCode, reason: Reason | None) -> Fields:
    return {"code": int(code), "reason": reason.value if reason is not None else code.name.lower()}


_ALLOCATIONS, _CHANNELS, _REQUESTS = "relay.core.allocations", "relay.core.channels", "relay.core.requests"

LOGGED_AS: dict[type[CoreEvent], LoggedAs] = {
    AllocationCreated: LoggedAs(_ALLOCATIONS, Level.INFO, "allocation created", _created),
    AllocationRefreshed: LoggedAs(
        _ALLOCATIONS, Level.DEBUG, "allocation refreshed", lambda event: _allocation(event, lifetime=event.lifetime)
    ),
    RelayedAddressDeleted: LoggedAs(
        _ALLOCATIONS, Level.DEBUG, "relayed address deleted", lambda event: _allocation(event, family=str(event.family))
    ),
    AllocationFreed: LoggedAs(_ALLOCATIONS, Level.INFO, "allocation freed", _freed),
    ChannelBound: LoggedAs(_CHANNELS, Level.DEBUG, "channel bound", _channel),
    ChannelRefreshed: LoggedAs(_CHANNELS, Level.DEBUG, "channel refreshed", _channel),
    ChannelExpired: LoggedAs(_CHANNELS, Level.DEBUG, "channel expired", _channel),
    PeerRefused: LoggedAs(_REQUESTS, Level.INFO, "peer refused", _peer_refused),
    LimitReached: LoggedAs(_REQUESTS, Level.WARN, "limit reached", _limit_reached),
    RequestRefused: LoggedAs(_REQUESTS, Level.INFO, "request refused", _request_refused),
    Answered: LoggedAs("relay.core.answers", Level.DEBUG, "answered", _answered),
}


def wanted(admits: Callable[[str, Level], bool]) -> frozenset[type[CoreEvent]]:
    """Return the types of events that a filter admits. The core creates only these events."""
    return frozenset(kind for kind in CORE_EVENTS if admits(LOGGED_AS[kind].target, LOGGED_AS[kind].level))


def log_event(event: CoreEvent, monotonic: Callable[[], float]) -> None:
    """Log an event.

    Args:
        event: the event.
        monotonic: returns the core's monotonic seconds.
    """
    target, level, name, fields_of = LOGGED_AS[type(event)]

    def fields() -> Fields:
        age = {"age": round(monotonic() - event.made_at)} if isinstance(event, AllocationFreed) else {}
        return {**fields_of(event), **age}

    # Suppressed events need no fields: with many allocating clients, this saves a tenth of the cost of an allocation.
    emit(target, level, name, fields)
