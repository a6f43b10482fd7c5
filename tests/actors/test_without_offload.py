"""A relay without offload has no offload state and no offload switch."""

import pytest

from relay.core.commands import FreeAllocation
from relay.net import threads
from tests.support.system import Relay, ask


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/offload"), ("GET", "/offload/channels"), ("POST", "/offload/attach"), ("POST", "/offload/detach")],
)
def test_a_relay_without_offload_has_no_offload_pages(relay: Relay, method: str, path: str) -> None:
    assert ask(relay.system.http["control"], path, method)[0] == 404


@pytest.mark.usefixtures("relay")
def test_a_relay_without_offload_has_no_threads_for_it() -> None:
    assert not {"offload", "monitor"} & set(threads.names().values())


def test_the_core_issues_no_offload_commands(relay: Relay) -> None:
    client = relay.client()
    client.allocate()
    assert client.bind_channel(0x4000, ("127.0.0.1", 9)) is None
    core = relay.system.core
    relay.system.__exit__()
    relay.clock.jump(601)
    core.handle_timeout(relay.clock.now())
    assert {type(each) for each in core.drain()} == {FreeAllocation}
