"""Pushes metrics to an OpenTelemetry collector, now and then, from a thread of its own.

A collector, and what is on the way to it, is somebody else's: it may be dead, slow, or worse. So nobody ever waits for it
but this thread, and nobody for the end of this thread for more than two seconds; and the log hears of it when it begins to
fail and when it works again, not each time.
"""

import contextlib
import importlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, Protocol, cast

import structlog

from relay.config import BadUseError, OtlpConfig
from relay.ops.metrics.sources import Sources

DEFAULT_INTERVAL: Final = 60_000
"""Milliseconds from one push to the next, as OpenTelemetry has it."""

SHORTEST_INTERVAL: Final = 100
LONGEST_INTERVAL: Final = 86_400_000

LAST_PUSH_TIMEOUT: Final = 1.0
"""Seconds for the last push, at the end, to a collector that took the one before."""

STOP_TIMEOUT: Final = 0.5
"""Seconds for the thread to end once what it was at is called off."""

QUIET_FOR: Final = 600.0
"""Seconds after a line about failing pushes in which there is no other one."""

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_FILES: Final = tuple(
    f"OTEL_EXPORTER_OTLP_{signal}{file}"
    for signal in ("METRICS_", "")
    for file in ("CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY")
)
_INTERVAL: Final = "OTEL_METRIC_EXPORT_INTERVAL"

_log = structlog.get_logger("relay.ops.metrics")


class Collector(Protocol):
    """Where metrics go. One thread pushes."""

    def push(self) -> str | None:
        """Send all metrics as they are now; None if they arrived, else why not, in a word."""

    def close(self) -> None:
        """Call off what is under way, and take no more."""


def read_settings(endpoint: str | None, environment: Mapping[str, str]) -> OtlpConfig | None:
    """Tell whether metrics are to be pushed, as the option and OpenTelemetry's own variables say.

    Args:
        endpoint: what the option says, as a URL.
        environment: where the variables are. The rest of them is read by the library.

    Raises:
        BadUseError: they make no sense.
    """
    given = endpoint or next((environment[name] for name in _ENDPOINTS if environment.get(name, "").strip()), None)
    exporters = environment.get("OTEL_METRICS_EXPORTER", "").strip()
    is_off = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if given is None or is_off or (exporters and "otlp" not in exporters.split(",")):
        return None
    protocol = next((environment[name] for name in _PROTOCOLS if environment.get(name, "").strip()), "grpc").strip()
    if protocol != "grpc":
        raise BadUseError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}: this relay speaks grpc only; name a port for that")
    for name in _FILES:
        if environment.get(name) and not Path(environment[name]).is_file():
            raise BadUseError(f"{name} names {environment[name]!r}, which is no file: name one, or unset it")
    return OtlpConfig(endpoint, _read_interval(environment.get(_INTERVAL, "").strip()) / 1000)


def open_collector(config: OtlpConfig, sources: Sources) -> Collector:
    """Get ready to push; nothing is sent yet, and nobody is asked for anything.

    Raises:
        BadUseError: what it takes is not installed, or the library does not take its variables.
    """
    # What gRPC writes to standard error by itself is no part of the log, and may be a line for whatever a collector sends.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        library = importlib.import_module("relay.ops.metrics.otlp")
    except ImportError as error:
        raise BadUseError(
            "pushing metrics takes what is not installed: pip install 'firezone-relay[otlp]', or unset OTLP_GRPC_ENDPOINT "
            "and OTEL_EXPORTER_OTLP_ENDPOINT"
        ) from error
    try:
        return cast(Collector, library.OtlpCollector(config.endpoint, sources))
    except Exception as error:
        raise BadUseError(f"can't push metrics: {error}: mend the OTEL_ variables, or unset them") from error


@contextlib.contextmanager
def pushing(config: OtlpConfig | None, sources: Sources) -> Iterator[None]:
    """Push for as long as the context lasts, if that is wanted.

    Raises:
        BadUseError: it can't be done.
    """
    if config is None:
        yield
        return
    pusher = Pusher(open_collector(config, sources), config.interval)
    pusher.start()
    _log.info("pushing metrics", to=config.endpoint or "as the environment says", seconds=config.interval)
    try:
        yield
    finally:
        pusher.stop()


class Pusher:
    """Pushes, from `start` to `stop`.

    Args:
        collector: where to; closed at the end.
        interval: seconds from one push to the next.
        clock: gives monotonic seconds.
    """

    def __init__(self, collector: Collector, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._collector = collector
        self._interval = interval
        self._clock = clock
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)
        self._works = False
        self._failed = 0
        """Pushes since one arrived."""
        self._told_of_failure = False
        self._told_at: float | None = None

    def start(self) -> None:
        """Begin; the first push is one interval from now."""
        self._thread.start()

    def stop(self) -> None:
        """Push once more if that is likely to arrive, and end; within `LAST_PUSH_TIMEOUT` and twice `STOP_TIMEOUT`."""
        self._stopping.set()
        if self._works:
            self._thread.join(LAST_PUSH_TIMEOUT)
        # In a thread, since it is the library's to say how long this takes.
        closing = threading.Thread(target=self._collector.close, name="otlp-close", daemon=True)
        closing.start()
        closing.join(STOP_TIMEOUT)
        self._thread.join(STOP_TIMEOUT)

    def _run(self) -> None:
        while not self._stopping.wait(self._interval):
            self._push()
        if self._works:
            self._push()

    def _push(self) -> None:
        try:
            failure = self._collector.push()
        except Exception as error:  # noqa: BLE001 - whatever the library makes of what a collector says, the relay goes on
            failure = type(error).__name__
        self._works = failure is None
        if failure is None:
            self._note_success()
        elif not self._stopping.is_set():
            self._note_failure(failure)

    def _note_success(self) -> None:
        if self._told_of_failure:
            _log.info("metrics are pushed again", failed=self._failed)
        self._told_of_failure = False
        self._failed = 0

    def _note_failure(self, failure: str) -> None:
        self._failed += 1
        now = self._clock()
        if not self._told_of_failure and (self._told_at is None or now >= self._told_at + QUIET_FOR):
            self._told_of_failure, self._told_at = True, now
            _log.warning("metrics could not be pushed; the next line about it is when they can be again", error=failure)


def _read_interval(text: str) -> int:
    if not text:
        return DEFAULT_INTERVAL
    # More digits than that are no interval, and Python would refuse to read very many.
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(LONGEST_INTERVAL))) or not (
        SHORTEST_INTERVAL <= int(text) <= LONGEST_INTERVAL
    ):
        raise BadUseError(f"{_INTERVAL} is no such interval: give milliseconds, {SHORTEST_INTERVAL} to {LONGEST_INTERVAL}")
    return int(text)
