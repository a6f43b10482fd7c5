"""A relay whose kernel relays nothing has nothing to show of that, and nothing to switch."""

import http.client

import pytest

from relay.ops import threads
from tests.actors.conftest import Relay


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/offload"), ("GET", "/offload/channels"), ("POST", "/offload/attach"), ("POST", "/offload/detach")],
)
def test_there_are_no_pages_for_it(relay: Relay, method: str, path: str) -> None:
    at = relay.system._http["control"]
    connection = http.client.HTTPConnection(at.host, at.port, timeout=30)
    try:
        connection.request(method, path)
        assert connection.getresponse().status == 404
    finally:
        connection.close()


def test_its_summary_and_its_threads_know_nothing_of_it(relay: Relay) -> None:
    assert not [name for name in relay.system.summary() if name.startswith("xdp")]
    assert not {"offload", "monitor"} & set(threads.names().values())
    assert not relay.system.core._config.offloads
