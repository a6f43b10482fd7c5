"""How many answers may go to each address that has proven nothing: what docs/limits.md says, without the relay's table."""

from tests.simulation.wire import Address

_NANOSECONDS = 1_000_000_000


class Budgets:
    """A token bucket for each network.

    In the relay's table a source may share both of its two buckets, of many thousands; too seldom to be looked for here.
    """

    def __init__(self, rate: int, burst: int) -> None:
        self._token = round(_NANOSECONDS / rate) if rate else 0
        """Nanoseconds in which a bucket gets one."""
        # Half a token is taken for a whole one, so that rounding never decides.
        self._most_missing = burst * self._token - (self._token - self._token // 2)
        self._full_at: dict[str, int] = {}

    def take(self, client: Address, now: float) -> bool:
        """Take a token for one answer; False if there is none."""
        if not self._token:
            return True
        network, at = network_of(client), int(now * _NANOSECONDS)
        missing = max(0, self._full_at.get(network, 0) - at)
        if missing > self._most_missing:
            return False
        self._full_at[network] = at + missing + self._token
        return True


def network_of(address: Address) -> str:
    """Give what belongs to one customer: an IPv4 address, or the first half of an IPv6 one."""
    return address[0] if "." in address[0] else address[0].partition("::")[0]
