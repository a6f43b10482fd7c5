"""Definitions: what clients ask and are told, the portal, and the process."""

import platform
from collections.abc import Iterator
from typing import Final

from relay import __version__
from relay.core.authentication import ErrorCode
from relay.core.counters import FreeReason, NonceOutcome
from relay.core.portal.channel import State
from relay.core.stun import Method
from relay.ops.metrics.metric import Kind, Metric, Point
from relay.ops.metrics.sources import Look

MESSAGE_TYPES: Final = {
    Method.BINDING: "binding",
    Method.ALLOCATE: "allocate",
    Method.REFRESH: "refresh",
    Method.CREATE_PERMISSION: "createpermission",
    Method.CHANNEL_BIND: "channelbind",
}
"""As dashboards have them."""

NO_ERROR: Final = ""
CODES: Final = tuple(int(code) for code in ErrorCode)

UNPROVEN_CODES: Final = (None, 400, 401, 420, 438)
"""Of answers to who has proven nothing; None is a success."""

STANDALONE: Final = "standalone"
STATES: Final = (STANDALONE, *(state.value for state in State))


def _responses(look: Look) -> Iterator[Point]:
    successes, errors = look.sources.counters.successes.copy(), look.sources.counters.errors.copy()
    for method, message_type in MESSAGE_TYPES.items():
        yield ("success", message_type, NO_ERROR), successes.get(method, 0)
        for code in CODES:
            yield ("error", message_type, code), errors.get((method, code), 0)


def _withheld(look: Look) -> Iterator[Point]:
    counts = look.sources.counters.withheld.copy()
    for method, message_type in MESSAGE_TYPES.items():
        for code in UNPROVEN_CODES:
            yield (message_type, NO_ERROR if code is None else code), counts.get((method, code), 0)


def _keep_alives(look: Look) -> Iterator[Point]:
    yield (), look.sources.counters.binding_indications


def _nonces(look: Look) -> Iterator[Point]:
    for outcome, count in look.sources.counters.nonces.items():
        yield (outcome.value,), count


def _made(look: Look) -> Iterator[Point]:
    yield (), look.sources.counters.allocations_made


def _refused(look: Look) -> Iterator[Point]:
    errors = look.sources.counters.errors.copy()
    for code in CODES:
        yield (code,), errors.get((Method.ALLOCATE, code), 0)


def _freed(look: Look) -> Iterator[Point]:
    for reason, count in look.sources.counters.allocations_freed.items():
        yield (reason.value,), count


def _depth(look: Look) -> Iterator[Point]:
    inbox = look.sources.inbox()
    yield (), 0 if inbox is None else len(inbox)


def _age(look: Look) -> Iterator[Point]:
    inbox = look.sources.inbox()
    yield (), 0.0 if inbox is None else inbox.age(look.now)


def _faults(look: Look) -> Iterator[Point]:
    portal = look.sources.portal()
    yield ("datagram",), look.sources.carried_out.faults
    yield ("portal",), 0 if portal is None else portal.faults


def _ready(look: Look) -> Iterator[Point]:
    yield (), int(look.sources.is_ready())


def _portal_state(look: Look) -> Iterator[Point]:
    portal = look.sources.portal()
    now = STANDALONE if portal is None else portal.state.value
    for state in STATES:
        yield (state,), int(state == now)


def _joins(look: Look) -> Iterator[Point]:
    portal = look.sources.portal()
    yield (), 0 if portal is None else portal.joins


def _oddities(look: Look) -> Iterator[Point]:
    portal = look.sources.portal()
    yield (), 0 if portal is None else portal.oddities


def _lines_lost(look: Look) -> Iterator[Point]:
    yield (), look.sources.lines_lost()


def _cpu(look: Look) -> Iterator[Point]:
    yield ("user",), look.process.user_seconds
    yield ("system",), look.process.system_seconds


def _info(_: Look) -> Iterator[Point]:
    yield (__version__, platform.python_version()), 1


REQUESTS: Final = (
    Metric(
        "relay.responses",
        "{response}",
        Kind.COUNTER,
        "Answers to requests of clients.",
        _responses,
        {
            "response_class": ("success", "error"),
            "message_type": tuple(MESSAGE_TYPES.values()),
            "error_code": (NO_ERROR, *CODES),
        },
    ),
    Metric(
        "relay.responses.withheld",
        "{response}",
        Kind.COUNTER,
        "Answers that were not given, since an address that has proven nothing had had enough of them.",
        _withheld,
        {"message_type": tuple(MESSAGE_TYPES.values()), "error_code": (NO_ERROR, *UNPROVEN_CODES[1:])},
    ),
    Metric("relay.binding_indications", "{indication}", Kind.COUNTER, "Keep-alives, which get no answer.", _keep_alives),
    Metric(
        "relay.nonces",
        "{nonce}",
        Kind.COUNTER,
        "Nonces of requests, by what came of them.",
        _nonces,
        {"outcome": tuple(outcome.value for outcome in NonceOutcome)},
    ),
    Metric("relay.allocations.made", "{allocation}", Kind.COUNTER, "Allocations that were established.", _made),
    Metric(
        "relay.allocations.refused",
        "{allocation}",
        Kind.COUNTER,
        "Allocate requests that were answered with an error; 401 and 438 are part of how every client begins.",
        _refused,
        {"error_code": CODES},
    ),
    Metric(
        "relay.allocations.freed",
        "{allocation}",
        Kind.COUNTER,
        "Allocations that came to their end, by why.",
        _freed,
        {"reason": tuple(reason.value for reason in FreeReason)},
    ),
)

HEALTH: Final = (
    Metric(
        "relay.ready", "{relay}", Kind.GAUGE, "1 while new clients should be sent here, as /readyz has it; else 0.", _ready
    ),
    Metric("relay.inbox.depth", "{message}", Kind.GAUGE, "Messages, not packets, that wait for the server actor.", _depth),
    Metric(
        "relay.inbox.age",
        "s",
        Kind.GAUGE,
        "For how long the oldest of them, or the one in hand, has not been done with.",
        _age,
    ),
    Metric(
        "relay.faults",
        "{fault}",
        Kind.COUNTER,
        "Inputs that the relay failed on and survived; each is a bug, to be reported.",
        _faults,
        {"input": ("datagram", "portal")},
    ),
    Metric(
        "relay.portal.state",
        "{portal}",
        Kind.GAUGE,
        "1 for how far the relay is with its portal, 0 for all other states.",
        _portal_state,
        {"state": STATES},
    ),
    Metric(
        "relay.portal.joins",
        "{join}",
        Kind.COUNTER,
        "Joins that the portal answered; each after the first is a reconnect.",
        _joins,
    ),
    Metric(
        "relay.portal.oddities", "{frame}", Kind.COUNTER, "Frames of the portal that could not be made sense of.", _oddities
    ),
)

PROCESS: Final = (
    Metric(
        "relay.log.lost",
        "{line}",
        Kind.COUNTER,
        "Lines, or dumps, that nobody read in time, or that could not be written.",
        _lines_lost,
    ),
    Metric(
        "relay.wall_clock.moved",
        "s",
        Kind.GAUGE,
        "By how much the wall clock was set since the start: credentials expire by it.",
        lambda look: [((), look.wall_clock_moved)],
    ),
    Metric(
        "process.cpu.time",
        "s",
        Kind.COUNTER,
        "CPU time of the process.",
        _cpu,
        {"cpu.mode": ("user", "system")},
    ),
    Metric("process.memory.usage", "By", Kind.GAUGE, "Memory in use (RSS).", lambda look: [((), look.process.resident)]),
    Metric("process.memory.virtual", "By", Kind.GAUGE, "Address space.", lambda look: [((), look.process.virtual)]),
    Metric("process.thread.count", "{thread}", Kind.GAUGE, "Threads.", lambda look: [((), look.process.threads)]),
    Metric(
        "process.unix.file_descriptor.count",
        "{file_descriptor}",
        Kind.GAUGE,
        "Open descriptors.",
        lambda look: [((), look.process.descriptors)],
    ),
    Metric(
        "process.unix.file_descriptor.limit",
        "{file_descriptor}",
        Kind.GAUGE,
        "Descriptors that it may open.",
        lambda look: [((), look.process.most_descriptors)],
    ),
    Metric(
        "process.start_time",
        "s",
        Kind.GAUGE,
        "When the process was started, in unix seconds.",
        lambda look: [((), look.process.started_at)],
    ),
    Metric(
        "relay.info",
        "{relay}",
        Kind.GAUGE,
        "Always 1; its labels say what runs.",
        _info,
        {"version": (__version__,), "python": (platform.python_version(),)},
    ),
)
