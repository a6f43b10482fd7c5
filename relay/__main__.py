"""``python -m relay`` is ``firezone-relay``."""

from relay.cli import main

main()
