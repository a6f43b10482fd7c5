"""Look-ups of host addresses within a bounded time."""

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
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
    found: Future[list[HostAddress]] = Future()

    def ask() -> None:
        try:
            answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            # Without duplicates.
            found.set_result(list(dict.fromkeys(HostAddress(family, address) for family, _, _, _, address in answers)))
        except UnicodeError:
            # A label is empty or too long.
            found.set_exception(OSError(f"{host} can't be a name"))
        except OSError as error:
            found.set_exception(error)
        finally:
            _pending.release()

    try:
        threading.Thread(target=ask, name="name-lookup", daemon=True).start()
    except RuntimeError as error:
        _pending.release()
        raise OSError(str(error)) from error
    try:
        return found.result(timeout)
    except TimeoutError:
        raise TimeoutError(f"looking up {host} took longer than {timeout:.0f} s") from None
