"""The status of a relay that runs, as who asks at its addresses gets it."""

import http.client
import json
from typing import Any

from relay.config import Endpoint
from relay.core.addresses import ClientAddress, show
from relay.status.model import Status
from relay.top.reading import read
from tests.actors.conftest import SECRET, Relay, RelayMaker
from tests.turn_client import udp_socket

CHANNEL = 0x4000


def ask(at: Endpoint, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(at.host, at.port, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def status_of(relay: Relay, query: str = "") -> Status:
    code, text = ask(relay.system._http["control"], f"/status{query}")
    assert code == 200
    answer: Any = json.loads(text)
    return read(Status, answer)


def test_an_operator_sees_who_relays_what_at_the_control_address(relay: Relay) -> None:
    credential = relay.credential()
    client = relay.client(credential=credential)
    relayed = client.allocate()[0]
    with udp_socket("127.0.0.1") as peer:
        assert client.bind_channel(CHANNEL, peer.getsockname()) is None
        client.send(CHANNEL, b"x" * 700)
        assert peer.recv(2000) == b"x" * 700
        peer.sendto(b"y" * 30, ("127.0.0.1", relayed[1]))
        assert client.receive() == (CHANNEL, b"y" * 30)
        status = status_of(relay)
        peer_address = show(peer.getsockname())
    (row,) = status["allocations"]
    assert row["client"] == show(ClientAddress(client.address))
    assert row["relayed"] == [f"127.0.0.1:{relayed[1]}"]
    assert row["credential_expires_at"] == int(credential.username.partition(":")[0])
    assert [channel["peer"] for channel in row["channels"]] == [peer_address]
    assert (row["to_peer"]["bytes"], row["to_client"]["bytes"]) == (700, 30)
    assert (status["totals"]["to_peer"]["packets"], status["totals"]["to_client"]["packets"]) == (1, 1)
    assert status["data_paths"]["userspace"]["clients"][0] == str(
        relay.system.address_of(next(iter(relay.system.listening)))
    )
    assert status["ready"]
    assert status["totals"]["drops"]["kernel"] == 0


def test_it_shows_no_secret_and_no_username(relay: Relay) -> None:
    credential = relay.credential()
    relay.client(credential=credential).allocate()
    _, text = ask(relay.system._http["control"], "/status")
    salt = credential.username.partition(":")[2]
    hidden = (SECRET.reveal(), credential.username, f":{salt}", credential.password)
    assert '"state": "established"' in text
    assert [each for each in hidden if each in text] == []


def test_an_allocation_that_has_ended_is_in_the_totals_only(relay: Relay) -> None:
    client = relay.client()
    client.allocate()
    assert client.refresh(0) is None
    status = status_of(relay)
    assert status["allocations"] == []
    assert status["totals"]["allocations_freed"]["deleted"] == 1


def test_time_that_is_left_gets_less(relay: Relay) -> None:
    relay.client().allocate()
    relay.clock.jump(500)
    (row,) = status_of(relay)["allocations"]
    assert row["time_left"] <= 100
    assert row["age"] >= 500


def test_the_health_address_which_may_be_public_does_not_show_it(relay: Relay) -> None:
    code, _ = ask(relay.system._http["health"], "/status")
    assert code == 404


def test_a_wrong_question_is_answered_with_what_can_be_asked(make_relay: RelayMaker) -> None:
    relay = make_relay()
    code, text = ask(relay.system._http["control"], "/status?sort=bytes")
    assert code == 400
    assert json.loads(text) == {"error": "sort is one of traffic, rate, age, expiry, client, port, channels, not 'bytes'"}
