"""The entry point of ``firezone-relay`` and ``python -m relay``."""

import gc
from typing import NoReturn

from relay.ops import signals

FULL_COLLECTION_THRESHOLD = 100
"""Collections of the middle generation between two full collections. Python's default is 10. A full collection stops all
packets, for 25 µs per allocation, and frees almost nothing, because neither packets nor allocations leave reference cycles.
With this threshold it runs after 700,000 new objects at the earliest, which is 16,000 allocations."""


def main() -> NoReturn:
    """Run the command line."""
    # Before the imports: they take a third of a second, and a signal during the imports must not be lost.
    signals.block()
    # Before the imports: otherwise full collections take a tenth of their time.
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, FULL_COLLECTION_THRESHOLD)
    from relay import cli  # noqa: PLC0415 - see above
    from relay.ops.privilege import conceal_memory, keep_streams  # noqa: PLC0415

    keep_streams()
    # Before secrets are read.
    conceal_memory()
    cli.main()


if __name__ == "__main__":
    main()
