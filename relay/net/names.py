"""Looking up the addresses of a host, within a bounded time."""

import queue
import socket
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

PENDING_LOOKUPS = 4
"""Look-ups that may be under way. One can't be called off, so one that hangs keeps its thread until the resolver gives up,
which a broken one never does."""

_pending = threading.BoundedSemaphore(PENDING_LOOKUPS)


class HostAddress(NamedTuple):
    """Where a TCP connection can be made to."""

    family: int
    address: tuple[Any, ...]


LookUp: TypeAlias = Callable[[str, int, float], list[HostAddress]]


def look_up(host: str, port: int, timeout: float) -> list[HostAddress]:
    """Give the addresses of a host, in the order in which the system prefers them.

    Args:
        host: a name or an address.
        port: the TCP port.
        timeout: seconds.

    Raises:
        OSError: there are none, or they did not come in time.
    """
    if not _pending.acquire(blocking=False):
        raise TimeoutError(f"{PENDING_LOOKUPS} look-ups of names hang already")
    outcome: queue.SimpleQueue[list[HostAddress] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            # A host that is listed twice is tried once.
            outcome.put(list(dict.fromkeys(HostAddress(family, address) for family, _, _, _, address in found)))
        except (OSError, UnicodeError) as error:
            # UnicodeError: a label that is empty or too long.
            outcome.put(error if isinstance(error, OSError) else OSError(f"{host} can't be a name"))
        finally:
            _pending.release()

    try:
        threading.Thread(target=ask, name="name-lookup", daemon=True).start()
    except RuntimeError as error:
        _pending.release()
        raise OSError(str(error)) from error
    try:
        answer = outcome.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError(f"looking up {host} took longer than {timeout:.0f} s") from None
    if isinstance(answer, OSError):
        raise answer
    return answer
