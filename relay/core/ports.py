"""The ports that allocations can have."""

from collections.abc import Iterable

from relay.core.addresses import RelayedPort
from relay.core.randomness import RandomSource


class PortPool:
    """The ports that no allocation has; drawing one and giving it back cost the same however many there are.

    Draws are random, as RFC 8656 §7.2 asks, so that the next relayed address can't be guessed from the last.
    """

    def __init__(self, ports: Iterable[int]) -> None:
        # Even ports and odd ports apart, for EVEN-PORT.
        self._free: tuple[list[RelayedPort], list[RelayedPort]] = ([], [])
        for port in ports:
            self.give_back(RelayedPort(port))

    def __len__(self) -> int:
        even, odd = self._free
        return len(even) + len(odd)

    def count(self, *, even: bool) -> int:
        """Tell how many ports `draw` can choose from."""
        return len(self._free[0]) if even else len(self)

    def draw(self, random: RandomSource, *, even: bool) -> RelayedPort | None:
        """Take a port out of the pool; None if there is none (or no even one, if ``even`` is asked for)."""
        evens, odds = self._free
        count = self.count(even=even)
        if count == 0:
            return None
        at = random.randrange(count)
        ports, at = (evens, at) if at < len(evens) else (odds, at - len(evens))
        # The last one takes its place: removing from the middle of a list would cost as much as the list is long.
        ports[at], ports[-1] = ports[-1], ports[at]
        return ports.pop()

    def give_back(self, port: RelayedPort) -> None:
        """Put a port back that `draw` gave."""
        self._free[port % 2].append(port)
