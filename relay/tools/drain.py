"""The command that drains a relay, or cancels a drain, at the control address."""

import time
from typing import TypedDict

import click

from relay.net.endpoint import Endpoint
from relay.options import DURATION
from relay.status.model import DrainStatus
from relay.tools.control import NoAnswerError, RejectedError, ask, control_option
from relay.tools.figures import drain_words

_POLL_INTERVAL = 1.0
"""Seconds between two requests of a command that waits."""


class _State(TypedDict):
    """The response of ``/drain``."""

    drain: DrainStatus | None
    uptime: float


@click.command(name="drain", short_help="Drain a running relay before an upgrade, or cancel a drain.")
@control_option
@click.option(
    "--timeout",
    type=DURATION,
    help="Maximum time of the drain from now on: 90s, 15m, 12h. Unset: the relay's --drain-timeout.",
)
@click.option("--cancel", is_flag=True, help="Stop draining: accept new allocations, and join the portal again.")
@click.option("--wait", is_flag=True, help="Return when the relay has ended.")
@click.pass_context
def drain(ctx: click.Context, at: Endpoint, timeout: int | None, *, cancel: bool, wait: bool) -> None:
    """Drain a running relay: it leaves its portal and rejects new allocations.

    The relay exits with code 0 when the last allocation ends, when nothing was relayed for 5 s, or after the timeout. During
    a drain, the command changes the timeout.

    Exit codes: 0 success, 1 the relay is unreachable, refuses, or has stopped draining, 2 usage error.

    \b
    Examples:
      firezone-relay drain --timeout 5m --wait
      firezone-relay drain --cancel
    """  # noqa: D301 - click takes this backspace for "keep the lines as they are"
    if cancel and (wait or timeout is not None):
        raise click.UsageError("--cancel excludes --timeout and --wait: use --cancel alone")
    path = "/drain/cancel" if cancel else "/drain" if timeout is None else f"/drain?timeout={timeout}"
    state = _ask(at, ask(_State, at, "/drain")["uptime"], path, "POST")
    click.echo(_words(state))
    while wait and state is not None and state["drain"] is not None:
        time.sleep(_POLL_INTERVAL)
        before, state = state["drain"]["allocations"], _ask(at, state["uptime"])
        if state is None or state["drain"] is None or state["drain"]["allocations"] != before:
            click.echo(_words(state))
    ctx.exit(int(wait and state is not None))


def _ask(at: Endpoint, uptime: float, path: str = "/drain", method: str = "GET") -> _State | None:
    """Send a request to a relay. Return None if the process has ended, even if a new process responds.

    Raises:
        NoAnswerError: the relay refuses, or does not respond in time.
    """
    try:
        state = ask(_State, at, path, method)
    except NoAnswerError as error:
        if isinstance(error, RejectedError) or isinstance(error.__cause__, TimeoutError):
            raise
        return None
    return state if state["uptime"] >= uptime else None


def _words(state: _State | None) -> str:
    if state is None:
        return "the relay has ended"
    drain = state["drain"]
    return "the relay is not draining" if drain is None else drain_words(drain)
