"""The log: events with fields, one a line, to standard error."""

import logging
import sys
from typing import TextIO

import structlog

from relay.config import LogFormat


def configure(log_format: LogFormat, stream: TextIO = sys.stderr) -> None:
    """Set how events are written, for the whole process; to be called once, before the first event."""
    common: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if log_format is LogFormat.JSON:
        renderers: list[structlog.typing.Processor] = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    else:
        # Without local variables in a traceback: they would have secrets among them.
        plain = structlog.dev.plain_traceback
        renderers = [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain, pad_event_to=0)]
    structlog.configure(
        processors=[*common, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    # Pykka logs what our supervisors hear of anyway, waitress each broken connection.
    logging.getLogger("pykka").setLevel(logging.CRITICAL + 1)
    logging.getLogger("waitress").setLevel(logging.CRITICAL + 1)
