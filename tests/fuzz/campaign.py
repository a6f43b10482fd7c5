"""Runs one target under atheris, in a process of its own: its modules are instrumented as they are imported."""

import importlib
import sys

from tests.fuzz.registry import module_of


def main() -> None:
    """Run ``TARGET`` with libFuzzer's options, which follow it."""
    # By name: it has no types, and tests that are not fuzzed do without it.
    atheris = importlib.import_module("atheris")
    name = sys.argv[1]
    with atheris.instrument_imports(
        include=["relay.core", "relay.ops.http.messages", "relay.ops.http.guard", "relay.ops.logs.filter"]
    ):
        target = importlib.import_module(module_of(name))
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
