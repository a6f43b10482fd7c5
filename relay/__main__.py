"""Where the process begins, by ``firezone-relay`` or ``python -m relay``."""

from typing import NoReturn

from relay.ops import signals


def main() -> NoReturn:
    """Run the command line."""
    # First of all: the imports take a third of a second, and a signal that comes meanwhile shall not be lost.
    signals.hold()
    from relay import cli  # noqa: PLC0415 - see above
    from relay.ops.privilege import conceal_memory, keep_streams  # noqa: PLC0415

    keep_streams()
    # Before anything is read that nobody else may see.
    conceal_memory()
    cli.main()


if __name__ == "__main__":
    main()
