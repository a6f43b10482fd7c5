"""The first step of a takeover, before the imports of a whole relay: they take CPU, for which the running relay prepares."""

import os
from pathlib import Path
from typing import Final, NamedTuple

from relay.config import UsageError
from relay.net.handover import HandoverError, HandoverLink, connect

EXIT_FAILED: Final = 2


class Announcement(NamedTuple):
    """A successor, as it is known to the running relay."""

    link: HandoverLink | None
    """The connection; None if no relay runs."""
    relays: int | None
    """A descriptor to write to when this process relays."""


def socket_path(given: Path | None) -> Path | None:
    """Return the Unix socket of a relay: the given path, or the default path of a service of systemd."""
    directory = os.environ.get("RUNTIME_DIRECTORY")
    return given if given is not None or not directory else Path(directory) / "handover.sock"


def announce(path: Path | None, *, detach: bool) -> Announcement:
    """Connect to the running relay, from a child process if ``detach``.

    Raises:
        UsageError: there is no path, or the socket can't be used.
    """
    if path is None:
        raise UsageError("--take-over needs --handover-socket, or RUNTIME_DIRECTORY in the environment")
    # The running relay tells systemd the id of the process that connects.
    relays = _in_background() if detach else None
    try:
        link = connect(path)
    except HandoverError as error:
        raise UsageError(f"can't take over the running relay: {error}") from error
    if link is None and detach:
        raise UsageError(f"no relay listens at {path}: start one without --detach")
    return Announcement(link, relays)


def _in_background() -> int:
    """Continue in a child process. The parent exits with 0 when the child relays, and with 2 if the child fails.

    Returns:
        A descriptor. The child relays once it writes there.
    """
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        os._exit(0 if os.read(reading, 1) else EXIT_FAILED)
    os.close(reading)
    return writing
