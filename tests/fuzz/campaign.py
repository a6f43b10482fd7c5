"""Run a target under atheris in a separate process, where the target's modules are instrumented during import."""

import importlib
import sys

from tests.fuzz.registry import module_of


def main() -> None:
    """Run ``TARGET`` with the following libFuzzer options."""
    # Imported by name, because atheris has no types and is optional.
    atheris = importlib.import_module("atheris")
    name = sys.argv[1]
    with atheris.instrument_imports(
        include=["relay.core", "relay.ops.http.messages", "relay.ops.http.host_check", "relay.ops.logs.filter"]
    ):
        target = importlib.import_module(module_of(name))
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
