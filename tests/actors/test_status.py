"""The status page of a running relay, over HTTP."""

import json
from typing import Any

from relay.core.addresses import ClientAddress, show
from relay.status.model import Status
from relay.tools.control import read
from tests.support.system import SECRET, Relay, RelayMaker, ask
from tests.support.turn_client import udp_socket

CHANNEL = 0x4000


def status_of(relay: Relay, query: str = "") -> Status:
    code, text = ask(relay.system.http["control"], f"/status{query}")
    assert code == 200
    answer: Any = json.loads(text)
    return read(Status, answer)


def test_the_control_address_serves_the_status_of_allocations(relay: Relay) -> None:
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


def test_the_status_contains_no_secret_or_username(relay: Relay) -> None:
    credential = relay.credential()
    relay.client(credential=credential).allocate()
    _, text = ask(relay.system.http["control"], "/status")
    salt = credential.username.partition(":")[2]
    hidden = (SECRET.expose(), credential.username, f":{salt}", credential.password)
    assert '"state": "established"' in text
    assert [each for each in hidden if each in text] == []


def test_an_ended_allocation_counts_only_in_totals(relay: Relay) -> None:
    client = relay.client()
    client.allocate()
    assert client.refresh(0) is None
    status = status_of(relay)
    assert status["allocations"] == []
    assert status["totals"]["allocations_freed"]["deleted"] == 1


def test_the_remaining_lifetime_decreases(relay: Relay) -> None:
    relay.client().allocate()
    relay.clock.jump(500)
    (row,) = status_of(relay)["allocations"]
    assert row["time_left"] <= 100
    assert row["age"] >= 500


def test_the_health_address_does_not_serve_the_status(relay: Relay) -> None:
    code, _ = ask(relay.system.http["health"], "/status")
    assert code == 404


def test_an_invalid_parameter_gets_the_valid_values(make_relay: RelayMaker) -> None:
    relay = make_relay()
    code, text = ask(relay.system.http["control"], "/status?sort=bytes")
    assert code == 400
    assert json.loads(text) == {"error": "sort is one of traffic, rate, age, expiry, client, port, channels, not 'bytes'"}
