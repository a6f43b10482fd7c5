"""Where the process begins, by ``firezone-relay`` or ``python -m relay``."""

import gc
from typing import NoReturn

from relay.ops import signals

SELDOM = 100
"""Collections of the middle generation after which Python looks at all objects for cycles that nobody refers to; its own
choice is 10. That holds up all packets, for 25 µs an allocation that there is, and finds next to nothing: what allocations
leave, and packets, has no cycles. It comes after 700,000 objects at the earliest, which are 16,000 allocations."""


def main() -> NoReturn:
    """Run the command line."""
    # First of all: the imports take a third of a second, and a signal that comes meanwhile shall not be lost.
    signals.hold()
    # Already for the imports: else a tenth of their time goes into it.
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, SELDOM)
    from relay import cli  # noqa: PLC0415 - see above
    from relay.ops.privilege import conceal_memory, keep_streams  # noqa: PLC0415

    keep_streams()
    # Before anything is read that nobody else may see.
    conceal_memory()
    cli.main()


if __name__ == "__main__":
    main()
