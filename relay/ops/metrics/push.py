"""Periodic push of metrics to an OpenTelemetry collector, in a separate thread.

A collector may be dead, slow or hostile. Only this thread waits for the collector, and the relay waits at most two seconds
for the end of this thread. The log gets a line when pushes begin to fail and when they succeed again, not for each push.
"""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, Protocol

from relay.config import OtlpConfig, UsageError
from relay.logger import Logger
from relay.ops.totals import RelayState

DEFAULT_INTERVAL: Final = 60_000
"""Milliseconds between two pushes: OpenTelemetry's default."""

SHORTEST_INTERVAL: Final = 100
LONGEST_INTERVAL: Final = 86_400_000

LAST_PUSH_TIMEOUT: Final = 1.0
"""Seconds for the last push, to a collector that accepted the previous push."""

STOP_TIMEOUT: Final = 0.5
"""Seconds for the collector to close, and again for the thread to end after its push was cancelled."""

QUIET_FOR: Final = 600.0
"""Seconds between two log lines about failing pushes, at least."""

_PREFIXES: Final = ("OTEL_EXPORTER_OTLP_METRICS_", "OTEL_EXPORTER_OTLP_")
"""Beginnings of variables for metrics, which take precedence, and for all signals."""

_FILES: Final = ("CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY")
_INTERVAL: Final = "OTEL_METRIC_EXPORT_INTERVAL"

_log = Logger("relay.ops.metrics")


class Collector(Protocol):
    """Destination of metrics. A single thread pushes."""

    def push(self) -> str | None:
        """Send all current metrics. Return None on success, else the reason in a word."""

    def close(self) -> None:
        """Cancel a push in progress and close the connection."""


def read_settings(endpoint: str | None, environment: Mapping[str, str]) -> OtlpConfig | None:
    """Return the settings of the push, from the option and OpenTelemetry's variables; None if metrics are not pushed.

    The library reads all other variables.

    Raises:
        UsageError: a variable is invalid.
    """
    exporters = environment.get("OTEL_METRICS_EXPORTER", "").strip()
    is_off = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if not (endpoint or _find("ENDPOINT", environment)) or is_off or (exporters and "otlp" not in exporters.split(",")):
        return None
    protocol = _find("PROTOCOL", environment)
    if protocol not in {"", "grpc"}:
        raise UsageError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}: this relay speaks grpc only; name a port for that")
    for name in (prefix + file for prefix in _PREFIXES for file in _FILES):
        if environment.get(name) and not Path(environment[name]).is_file():
            raise UsageError(f"{name} names {environment[name]!r}, which is no file: name one, or unset it")
    return OtlpConfig(endpoint, _read_interval(environment.get(_INTERVAL, "").strip()) / 1000)


def _find(name: str, environment: Mapping[str, str]) -> str:
    """Return a variable of the exporter; "" if it is unset."""
    values = (environment.get(prefix + name, "").strip() for prefix in _PREFIXES)
    return next(filter(None, values), "")


def open_collector(config: OtlpConfig, sources: RelayState) -> Collector:
    """Open a collector, without sending anything yet.

    Raises:
        UsageError: the library is not installed, or rejects its environment variables.
    """
    # gRPC writes lines to standard error that are no log entries, some of them for each message of a collector.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from relay.ops.metrics.otlp import OtlpCollector  # noqa: PLC0415 - needs the extra otlp
    except ImportError as error:
        raise UsageError(
            f"can't push metrics without the package opentelemetry-exporter-otlp-proto-grpc: install it in {sys.prefix}, "
            "or unset OTLP_GRPC_ENDPOINT and OTEL_EXPORTER_OTLP_ENDPOINT"
        ) from error
    try:
        return OtlpCollector(config.endpoint, sources)
    except Exception as error:
        raise UsageError(f"can't push metrics: {error}: mend the OTEL_ variables, or unset them") from error


@contextlib.contextmanager
def pushing(config: OtlpConfig | None, sources: RelayState) -> Iterator[None]:
    """Push metrics while the context lasts, if the config asks for it.

    Raises:
        UsageError: the collector can't be opened.
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
    """Thread that pushes each interval, in seconds, from `start` to `stop`, which closes the collector."""

    def __init__(self, collector: Collector, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._collector = collector
        self._interval = interval
        self._clock = clock
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)
        self._works = False
        self._failed = 0
        """Failed pushes since the last success."""
        self._failure_logged = False
        self._logged_at = -math.inf

    def start(self) -> None:
        """Start; the first push is an interval from now."""
        self._thread.start()

    def stop(self) -> None:
        """Push once more if the previous push succeeded, and stop. Takes the three timeouts at most."""
        self._stopping.set()
        if self._works:
            self._thread.join(LAST_PUSH_TIMEOUT)
        # In a thread, since the library has no timeout for this.
        closing = threading.Thread(target=self._collector.close, name="otlp-close", daemon=True)
        closing.start()
        closing.join(STOP_TIMEOUT)
        self._thread.join(STOP_TIMEOUT)

    def _run(self) -> None:
        while not self._stopping.wait(self._interval):
            self.push()
        if self._works:
            self.push()

    def push(self) -> None:
        """Push once, and log a change between success and failure. The thread calls this each interval."""
        try:
            failure = self._collector.push()
        except Exception as error:  # noqa: BLE001 - no failure of the library or the collector may stop the relay
            failure = type(error).__name__
        self._works = failure is None
        if failure is None:
            if self._failure_logged:
                _log.info("metrics are pushed again", failed=self._failed)
            self._failed, self._failure_logged = 0, False
        elif not self._stopping.is_set():
            self._failed += 1
            if not self._failure_logged and self._clock() >= self._logged_at + QUIET_FOR:
                self._failure_logged, self._logged_at = True, self._clock()
                _log.warning("metrics could not be pushed; the next line about it is when they can be again", error=failure)


def _read_interval(text: str) -> int:
    if not text:
        return DEFAULT_INTERVAL
    # Python raises an error for a number of very many digits.
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(LONGEST_INTERVAL))) or not (
        SHORTEST_INTERVAL <= int(text) <= LONGEST_INTERVAL
    ):
        raise UsageError(f"{_INTERVAL} is no such interval: give milliseconds, {SHORTEST_INTERVAL} to {LONGEST_INTERVAL}")
    return int(text)
