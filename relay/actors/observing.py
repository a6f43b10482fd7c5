"""What is written to the log about a running relay, beside what each module writes: events of the core, and what flows."""

import contextlib
from collections.abc import Callable, Iterator

from relay.core.server import Server
from relay.ops.logs.core import wanted
from relay.ops.logs.log import Log
from relay.ops.logs.stats import Flow, StatsLine


@contextlib.contextmanager
def observing(core: Server, flow: Callable[[], Flow], log: Log) -> Iterator[None]:
    """Have the core tell of what the log's filter admits, and what flows written now and then, while the context lasts.

    Args:
        core: what is told of.
        flow: reads what flowed, from another thread.
        log: where to.
    """
    stats = StatsLine(flow, log.tell_left_out)
    with log.followed_by(lambda: core.watch(wanted(log.admits))):
        stats.start()
        try:
            yield
        finally:
            stats.stop()
