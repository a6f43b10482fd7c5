"""The pool of ports for allocations."""

import itertools
from collections.abc import Collection, Iterable, Iterator

from relay.core.addresses import RelayedPort
from relay.core.randomness import RandomSource


class PortPool:
    """The free ports. The cost of `draw` and `give_back` is independent of the number of ports.

    `draw` is random (RFC 8656 §7.2), so that nobody can predict the next relayed address.
    """

    def __init__(self, ports: Iterable[int]) -> None:
        # Even and odd ports, for EVEN-PORT.
        self._free: tuple[list[RelayedPort], list[RelayedPort]] = ([], [])
        self.give_back(*map(RelayedPort, ports))

    def __iter__(self) -> Iterator[RelayedPort]:
        """Yield the free ports, in any order."""
        return itertools.chain.from_iterable(self._free)

    def __len__(self) -> int:
        even, odd = self._free
        return len(even) + len(odd)

    def count(self, *, even: bool) -> int:
        """Return the number of ports that `draw` can choose from."""
        return len(self._free[0]) if even else len(self)

    def draw(self, random: RandomSource, *, even: bool) -> RelayedPort | None:
        """Remove and return a random port, an even port if ``even``. Return None without such a port."""
        evens, odds = self._free
        count = self.count(even=even)
        if count == 0:
            return None
        at = random.randrange(count)
        ports, at = (evens, at) if at < len(evens) else (odds, at - len(evens))
        # The last port replaces the drawn port: a removal from the middle of a list takes linear time.
        ports[at], ports[-1] = ports[-1], ports[at]
        return ports.pop()

    def export(self) -> list[list[RelayedPort]]:
        """Return the free even and odd ports, in the order of the pool."""
        return [ports.copy() for ports in self._free]

    def restore(self, free: Iterable[Iterable[int]], used: Collection[RelayedPort], ports: range) -> None:
        """Continue with the free ports of another pool, as far as they are among ``ports``, and all new ports."""
        known = {*used, *itertools.chain.from_iterable(free)}
        for mine, theirs in zip(self._free, free, strict=True):
            mine[:] = [RelayedPort(port) for port in theirs if port in ports] + [port for port in mine if port not in known]

    def give_back(self, *ports: RelayedPort) -> None:
        """Return drawn ports to the pool."""
        for port in ports:
            self._free[port % 2].append(port)
