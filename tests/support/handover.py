"""One relay in several processes, each of which takes the former over."""

import time
from collections.abc import Callable
from typing import Final, TypeAlias

from relay.core.credentials import Credential, RelaySecret, mint
from tests.support.program import Program
from tests.support.turn_client import TurnClient

HOST: Final = "127.0.0.77"
SECRET: Final = "the secret of relays that are handed over"

Starter: TypeAlias = Callable[..., Program]
Allocator: TypeAlias = Callable[[], TurnClient]


def credential_of(user: str) -> Credential:
    return mint(RelaySecret(SECRET), int(time.time()) + 10_000, user)
