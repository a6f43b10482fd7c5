"""Look-ups of host addresses within a bounded time."""

import queue
import socket
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

PENDING_LOOKUPS = 4
"""Concurrent look-ups. A look-up can't be cancelled: its thread remains until the resolver returns, which a broken resolver
never does."""


class HostAddress(NamedTuple):
    """The address of a TCP server."""

    family: int
    address: tuple[Any, ...]


LookUp: TypeAlias = Callable[[str, int, float], list[HostAddress]]


_pending = threading.BoundedSemaphore(PENDING_LOOKUPS)


def look_up(host: str, port: int, timeout: float) -> list[HostAddress]:
    """Return the addresses of a name or an address within ``timeout`` seconds, in the order of the system's preference.

    Raises:
        OSError: the look-up failed or took too long.
    """
    if not _pending.acquire(blocking=False):
        raise TimeoutError(f"{PENDING_LOOKUPS} look-ups of names hang already")
    outcome: queue.SimpleQueue[list[HostAddress] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            # Without duplicates.
            outcome.put(list(dict.fromkeys(HostAddress(family, address) for family, _, _, _, address in found)))
        except OSError as error:
            outcome.put(error)
        except UnicodeError:
            # A label is empty or too long.
            outcome.put(OSError(f"{host} can't be a name"))
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
