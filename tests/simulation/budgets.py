"""The rate limit of responses to unauthenticated addresses in docs/limits.md, without the relay's table."""

from tests.simulation.wire import Address

_NANOSECONDS = 1_000_000_000


class Budgets:
    """A token bucket for each network.

    Collisions in the relay's table of many thousands of buckets are too rare to be modelled here.
    """

    def __init__(self, rate: int, burst: int) -> None:
        self._token = round(_NANOSECONDS / rate) if rate else 0
        """Nanoseconds per token."""
        # Half a token counts as a whole token, to tolerate rounding.
        self._most_missing = burst * self._token - (self._token - self._token // 2)
        self._full_at: dict[str, int] = {}

    def take(self, client: Address, now: float) -> bool:
        """Use a token for a response; return False without a token."""
        if not self._token:
            return True
        network, at = network_of(client), int(now * _NANOSECONDS)
        missing = max(0, self._full_at.get(network, 0) - at)
        if missing > self._most_missing:
            return False
        self._full_at[network] = at + missing + self._token
        return True


def network_of(address: Address) -> str:
    """Return a customer's network: an IPv4 address, or the first half of an IPv6 address."""
    return address[0] if "." in address[0] else address[0].partition("::")[0]
