"""A relay of a portal is taken over, and no client of the portal is told."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.handover import HOST, Starter
from tests.support.program import Program
from tests.support.scripted_portal import Authority, ScriptedPortal
from tests.support.waiting import wait_until

TOKEN = "the token of a relay that is handed over"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def portal(authority: Authority) -> Iterator[ScriptedPortal]:
    with ScriptedPortal(authority) as portal:
        yield portal


@pytest.fixture
def start_member(portal: ScriptedPortal, authority: Authority, path: Path) -> Iterator[Starter]:
    """Start processes of one relay of the portal."""
    with ExitStack() as stack:

        def started(*options: str, token: str = TOKEN) -> Program:
            network = {"FIREZONE_API_URL": portal.url, "SSL_CERT_FILE": str(authority.ca_file), "FIREZONE_TOKEN": token}
            if "--take-over" in options:
                wait_until(path.exists)
            program = Program("--handover-socket", str(path), *options, hosts=(HOST,), network=network)
            stack.callback(program.close)
            return program

        yield started


@pytest.mark.parametrize("token", [TOKEN, "", "/nonexistent/token"])
def test_the_successor_joins_with_the_same_secret_and_token_before_the_relay_goes(
    portal: ScriptedPortal, start_member: Starter, token: str
) -> None:
    relay = start_member()
    relay.wait_until_ready()
    first = portal.wait_for_connection(1)
    successor = start_member("--take-over", token=token)
    second = portal.wait_for_connection(2)
    second.wait_until_joined()
    assert not first.closed
    assert relay.wait() == 0
    successor.wait_for_log("joined the portal")
    first.wait_until_closed()
    assert second.stamp_secret == first.stamp_secret
    assert second.headers["x-authorization"] == first.headers["x-authorization"]
    assert not first.left
    assert portal.presence.drops == 0
    assert len(portal.connections) == 2
    # The successor is a member like any other.
    assert successor.stop() == 0
    second.wait_until_left()


def test_a_relay_that_the_portal_closes_for_its_successor_does_not_join_again(
    portal: ScriptedPortal, start_member: Starter
) -> None:
    relay = start_member()
    relay.wait_until_ready()
    first = portal.wait_for_connection(1)
    portal.script.sends_init = False
    start_member("--take-over")
    second = portal.wait_for_connection(2)
    second.wait_for("phx_join")
    first.send("phx_close")
    first.wait_until_closed()
    second.send_init()
    assert relay.wait() == 0
    assert len(portal.connections) == 2
