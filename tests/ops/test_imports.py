"""Imports cost CPU at each start, while no packet is relayed: a relay imports only modules that it uses."""

import subprocess
import sys

import pytest

OF_COMMANDS = ("relay.tools", "rich")
OF_OPTIONS = ("relay.offload.datapath", "relay.discovery", "relay.ops.metrics.otlp", "opentelemetry", "grpc")
OF_TESTS = ("psutil", "prometheus_client", "structlog")
OF_LIBRARIES = ("asyncio", "http.server", "xml")
"""Parts of the standard library that a library may import for features of its own."""

OF_PORTAL = ("relay.system.portal", "relay.net.websocket", "websocket", "ssl")


@pytest.mark.parametrize(
    ("imports", "unused"),
    [("relay.system.process", OF_PORTAL), ("relay.system.process, relay.system.portal, relay.actors.portal", ())],
)
def test_a_starting_relay_imports_no_unused_module(imports: str, unused: tuple[str, ...]) -> None:
    forbidden = (*OF_COMMANDS, *OF_OPTIONS, *OF_TESTS, *OF_LIBRARIES, *unused)
    script = f"import sys, {imports}; print(*(name for name in {forbidden!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []
