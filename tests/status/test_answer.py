"""What the status shows, and of whom."""

import json
from collections.abc import Callable
from dataclasses import fields
from ipaddress import IPv4Address, ip_network
from random import Random
from typing import Any

import pytest

from relay.config import AttachMode, Config, Endpoint, OffloadConfig, OtlpConfig, PortalAccess
from relay.core.addresses import AllocationId, ChannelNumber, ClientAddress, PeerAddress
from relay.core.attributes import ADDITIONAL_ADDRESS_FAMILY
from relay.core.portal.channel import PortalChannel
from relay.core.portal.endpoint import PortalToken, PortalUrl
from relay.net.proxy import Proxy, ProxyCredentials
from relay.offload.datapath import ChannelUsage
from relay.offload.program import Usage
from relay.status import model
from relay.status.kernel import Tally
from relay.status.model import Allocation, Flow
from tests.core.driver import CHANNEL, CLIENT6, OTHER_CHANNEL, OTHER_PEER, PEER, SECRET, Allocated, Client
from tests.core.portal.driver import CONFIG as PORTAL_CONFIG
from tests.status.conftest import Kernel, Watched

NOTHING: Flow = {"packets": 0, "bytes": 0, "xdp_packets": 0, "xdp_bytes": 0}


def busy(watched: Watched, packets: int, *, size: int = 100) -> tuple[Client, Allocated]:
    """Have a client that has sent some packets."""
    client = watched.client()
    allocated = client.allocate()
    client.bind_channel()
    send(client, packets, size)
    return client, allocated


def send(client: Client, packets: int, size: int = 100) -> None:
    for _ in range(packets):
        client.send_on_channel(bytes(size))


def ports(rows: list[Allocation]) -> list[str]:
    return [row["relayed"][0].rpartition(":")[2] for row in rows]


def test_a_relay_that_nobody_uses_shows_what_it_is(watched: Watched) -> None:
    watched.relay.pass_time(90)
    status = watched.status()
    assert (status["version"], status["uptime"], status["ready"]) == ("0.1.0", 90.0, True)
    assert status["time"] == watched.relay.now.unix
    assert status["portal"] is None
    assert status["data_paths"] == {"userspace": {"clients": ["0.0.0.0:3478", "[::]:3478"]}, "xdp": None}
    assert status["totals"]["to_peer"] == status["totals"]["to_client"] == NOTHING
    assert status["allocations"] == []
    watched.ready = False
    assert not watched.status()["ready"]


def test_an_allocation_is_shown_with_whose_it_is_and_how_long_it_lasts(watched: Watched) -> None:
    client = watched.client()
    allocated = client.allocate((ADDITIONAL_ADDRESS_FAMILY, 2))
    watched.relay.pass_time(20)
    client.bind_channel()
    send(client, 3)
    watched.relay.receive_from_peer(allocated.id, bytes(50), PEER)
    watched.relay.pass_time(10)
    (row,) = watched.status()["allocations"]
    assert row == {
        "id": allocated.id,
        "client": "203.0.113.5:40001",
        "state": "established",
        "relayed": [f"192.0.2.1:{allocated.port}", f"[2001:db8::1]:{allocated.port}"],
        "credential_expires_at": 1_701_000_000,
        "age": 30.0,
        "time_left": 570.0,
        "to_peer": NOTHING | {"packets": 3, "bytes": 300},
        "to_client": NOTHING | {"packets": 1, "bytes": 50},
        "to_peer_rate": None,
        "to_client_rate": None,
        "channel_count": 1,
        "channels": [
            {
                "number": CHANNEL,
                "peer": "198.51.100.9:5000",
                "state": "live",
                "time_left": 590.0,
                "to_peer": NOTHING | {"packets": 3, "bytes": 300},
                "to_client": NOTHING | {"packets": 1, "bytes": 50},
            }
        ],
    }


def test_an_allocation_that_waits_for_its_sockets_is_shown_as_that(watched: Watched) -> None:
    watched.client().begin_allocate()
    (row,) = watched.status()["allocations"]
    assert (row["state"], row["time_left"], row["channel_count"]) == ("binding", 5.0, 0)


def test_an_ipv6_client_is_written_as_people_do(watched: Watched) -> None:
    Client(watched.relay, CLIENT6).allocate()
    assert watched.status()["allocations"][0]["client"] == "[2001:db8:5::5]:40000"


def test_a_channel_that_has_expired_is_cooling_and_then_only_in_the_sum(watched: Watched) -> None:
    client, _ = busy(watched, 2)
    client.refresh(3600)
    watched.relay.pass_time(601)
    watched.relay.wake()
    (row,) = watched.status()["allocations"]
    (channel,) = row["channels"]
    assert (channel["state"], channel["time_left"], channel["to_peer"]["packets"]) == ("cooling", 299.0, 2)
    watched.relay.pass_time(300)
    watched.relay.wake()
    (row,) = watched.status()["allocations"]
    assert (row["channel_count"], row["channels"], row["to_peer"]["packets"]) == (0, [], 2)


def test_channels_are_listed_up_to_as_many_as_asked_for(watched: Watched) -> None:
    client, _ = busy(watched, 1)
    client.bind_channel(OTHER_CHANNEL, OTHER_PEER)
    for most, numbers in ((0, []), (1, [CHANNEL]), (2, [CHANNEL, OTHER_CHANNEL]), (2000, [CHANNEL, OTHER_CHANNEL])):
        (row,) = watched.status(channels=most)["allocations"]
        assert [channel["number"] for channel in row["channels"]] == numbers
        assert row["channel_count"] == 2
        assert row["to_peer"]["packets"] == 1


def test_a_page_has_no_more_channels_than_its_limit(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.status.rows.MOST_CHANNELS", 3)
    for _ in range(3):
        client, _ = busy(watched, 1)
        client.bind_channel(OTHER_CHANNEL, OTHER_PEER)
    rows = watched.status(sort="client")["allocations"]
    assert [len(row["channels"]) for row in rows] == [2, 1, 0]
    assert [row["channel_count"] for row in rows] == [2, 2, 2]


def test_totals_are_of_all_allocations_whether_listed_or_gone(watched: Watched) -> None:
    client, _ = busy(watched, 2)
    busy(watched, 3, size=10)
    client.refresh(0)
    client.ask(3)
    watched.udp.send_errors["EPERM"] += 4
    totals = watched.status(limit=0)["totals"]
    assert totals["to_peer"] == NOTHING | {"packets": 5, "bytes": 230}
    assert (totals["allocations"], totals["channels"], totals["allocations_made"]) == (1, 1, 2)
    assert totals["allocations_freed"]["deleted"] == 1
    assert totals["responses"]["successes"] == {"allocate": 2, "channel_bind": 2, "refresh": 1}
    assert totals["responses"]["errors"] == {"allocate": {"401": 2, "400": 1}}
    assert (totals["drops"]["kernel"], totals["drops"]["unbound_channel"]) == (7, 0)
    assert totals["send_errors"] == {"EPERM": 4}


SORTED_BY: dict[str, Callable[[Any], float]] = {
    "traffic": lambda row: row["to_peer"]["bytes"] + row["to_client"]["bytes"],
    "rate": lambda row: row["to_peer_rate"] + row["to_client_rate"],
    "age": lambda row: row["age"],
    "expiry": lambda row: row["time_left"],
    "client": lambda row: int(row["client"].rpartition(":")[2]),
    "port": lambda row: int(row["relayed"][0].rpartition(":")[2]),
    "channels": lambda row: row["channel_count"],
}


@pytest.fixture
def crowd(watched: Watched) -> Watched:
    """A relay with 40 clients, no two of whom are alike."""
    random = Random(1)
    clients = []
    for _ in range(40):
        client, _ = busy(watched, random.randrange(9))
        if random.randrange(2):
            client.bind_channel(OTHER_CHANNEL, OTHER_PEER)
        watched.relay.pass_time(1)
        clients.append(client)
    watched.status()
    watched.relay.pass_time(1)
    for client in clients:
        send(client, random.randrange(9))
        client.refresh(random.randrange(600, 3600))
    return watched


@pytest.mark.parametrize("sort", SORTED_BY)
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_of_any_order_together_have_every_allocation_once(crowd: Watched, sort: str, order: str) -> None:
    rows: list[Any] = []
    for offset in range(0, 49, 7):
        status = crowd.status(sort=sort, order=order, offset=offset, limit=7)
        assert status["page"] == {"sort": sort, "order": order, "offset": offset, "limit": 7, "channels": 16}
        rows += status["allocations"]
    keys = [SORTED_BY[sort](row) for row in rows]
    assert keys == sorted(keys, reverse=order == "desc")
    assert len({row["id"] for row in rows}) == len(rows) == 40
    assert len(set(keys)) > 1


def test_runs_that_are_sorted_by_themselves_come_out_as_one_order(crowd: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.status.ranking._AT_ONCE", 3)
    rows: list[Any] = [*crowd.status(sort="port")["allocations"]]
    assert [int(port) for port in ports(rows)] == sorted(int(port) for port in ports(rows))
    assert len(rows) == 40


def test_rates_are_the_average_since_the_look_before(watched: Watched) -> None:
    client, allocated = busy(watched, 100)
    other, _ = busy(watched, 1)
    assert watched.status()["totals"]["rates_over"] is None
    watched.relay.pass_time(4)
    send(client, 8)
    send(other, 40)
    watched.relay.receive_from_peer(allocated.id, bytes(60), PEER)
    newcomer, _ = busy(watched, 4)
    status = watched.status(sort="rate")
    assert status["totals"]["rates_over"] == 4.0
    assert status["totals"]["to_peer_rate"] == {"packets": 13.0, "bytes": 1300.0}
    assert status["totals"]["to_client_rate"] == {"packets": 0.2, "bytes": 15.0}
    rates = {row["client"]: (row["to_peer_rate"], row["to_client_rate"]) for row in status["allocations"]}
    # Busiest now, not since they were made.
    assert list(rates) == [f"203.0.113.5:{each.address[1]}" for each in (other, client, newcomer)]
    assert list(rates.values()) == [(1000.0, 0.0), (200.0, 15.0), (100.0, 0.0)]


def test_within_a_second_nobody_looks_at_all_allocations_again(crowd: Watched) -> None:
    crowd.status(limit=5)
    before = crowd.rests
    crowd.relay.pass_time(0.9)
    first = crowd.status(limit=5, offset=0)
    looking = 2 * 40 // 16
    assert crowd.rests - before < 5 * (1 + 2) + looking
    crowd.relay.pass_time(0.1)
    second = crowd.status(limit=5)
    assert crowd.rests - before > 2 * 5 + looking
    assert (first["totals"]["rates_over"], second["totals"]["rates_over"]) == (1.0, 1.0)


def test_a_look_of_more_than_a_minute_ago_says_nothing_of_now(crowd: Watched) -> None:
    crowd.status()
    crowd.relay.pass_time(61)
    status = crowd.status(sort="rate")
    assert status["totals"]["to_peer_rate"] is None
    keys = [row["to_peer"]["bytes"] for row in status["allocations"]]
    assert keys == sorted(keys, reverse=True)
    assert all(row["to_peer_rate"] is None for row in status["allocations"])


def test_what_ends_while_it_is_looked_at_is_left_out(crowd: Watched) -> None:
    server = crowd.relay.server
    # One at each rest: some before they are looked at, some between being ranked and being listed, some after.
    left = iter(list(server.allocations.by_id)[::2])

    def end_one() -> None:
        id_ = next(left, None)
        if id_ is not None:
            crowd.relay.report_failed(AllocationId(id_))
            crowd.client().allocate()

    crowd.meanwhile = end_one
    for sort in SORTED_BY:
        crowd.relay.pass_time(2)
        rows = crowd.status(sort=sort)["allocations"]
        assert len({row["id"] for row in rows}) == len(rows) >= 20
    assert next(left, None) is None


def test_work_is_done_in_portions_however_much_it_is(watched: Watched) -> None:
    clients = [watched.client() for _ in range(45)]
    for client in clients:
        client.allocate()
    watched.status(limit=0)
    # Looking and ranking, 16 allocations at a time; and both again, with forgetting what was found before.
    assert watched.rests >= 2 * 45 // 16
    watched.relay.pass_time(2)
    before = watched.rests
    watched.status(limit=0)
    assert watched.rests - before >= 2 * 45 // 16 + 1
    before = watched.rests
    watched.status(limit=45, channels=0)
    assert watched.rests - before >= 45
    for number in range(CHANNEL, CHANNEL + 100):
        clients[0].bind_channel(number, PeerAddress(("198.51.100.9", number)))
    before = watched.rests
    watched.status(limit=45, channels=0)
    assert watched.rests - before >= 45 + 100 // 16
    before = watched.rests
    watched.status(limit=45, channels=100)
    assert watched.rests - before >= 45 + 100


def test_what_the_kernel_relays_is_added_and_shown_by_itself() -> None:
    kernel = Kernel()
    watched = Watched(kernel=kernel)
    client, _ = busy(watched, 2)
    client.bind_channel(OTHER_CHANNEL, OTHER_PEER)
    at, number = ClientAddress(client.address), ChannelNumber(CHANNEL)
    kernel.used = [
        ChannelUsage(at, number, Usage(10, 1000, 1.0), Usage(20, 4000, 1.0)),
        ChannelUsage(ClientAddress(("198.51.100.99", 1)), number, Usage(5, 5, None), Usage(5, 5, None)),
    ]
    kernel.total = Tally(15, 1005, 25, 4005)
    status = watched.status()
    (row,) = status["allocations"]
    assert row["to_peer"] == {"packets": 12, "bytes": 1200, "xdp_packets": 10, "xdp_bytes": 1000}
    assert row["to_client"] == {"packets": 20, "bytes": 4000, "xdp_packets": 20, "xdp_bytes": 4000}
    assert [channel["to_peer"] for channel in row["channels"]] == [row["to_peer"], NOTHING]
    assert status["totals"]["to_peer"] == {"packets": 17, "bytes": 1205, "xdp_packets": 15, "xdp_bytes": 1005}
    assert status["data_paths"]["xdp"] == kernel.shown()


def test_the_kernels_traffic_counts_for_order_and_rates() -> None:
    kernel = Kernel()
    watched = Watched(kernel=kernel)
    busy(watched, 9)
    quiet, _ = busy(watched, 1)
    watched.status()
    watched.relay.pass_time(2)
    used = Usage(10, 10_000, 1.0)
    kernel.used = [ChannelUsage(ClientAddress(quiet.address), ChannelNumber(CHANNEL), used, used)]
    kernel.total = Tally(10, 10_000, 10, 10_000)
    status = watched.status()
    assert [row["to_peer_rate"] for row in status["allocations"]] == [5000.0, 0.0]
    assert status["totals"]["to_client_rate"] == {"packets": 5.0, "bytes": 5000.0}


def test_the_portal_is_shown_with_its_state_and_what_failed_last(watched: Watched) -> None:
    watched.portal = PortalChannel(PORTAL_CONFIG, Random(1))
    idle = watched.status()["portal"]
    assert idle == {"state": "idle", "has_begun": False, "state_age": None, "joins": 0, "last_failure": None}
    watched.portal.start(watched.relay.now)
    watched.portal.handle_lost(watched.portal._conversation.connection, "no \x1b[31mroute", watched.relay.now)
    watched.relay.pass_time(0.5)
    waiting = watched.status()["portal"]
    assert waiting == {
        "state": "waiting",
        "has_begun": False,
        "state_age": 0.5,
        "joins": 0,
        "last_failure": "no ?[31mroute",
    }


TOKEN = "a-token-that-nobody-may-see"
WHOLE = Config(
    public_ip4=IPv4Address("203.0.113.7"),
    health=Endpoint("0.0.0.0", 8080),
    control=Endpoint("::1", 9999),
    secret=SECRET,
    rng_seed=424242,
    allow_peers=(ip_network("10.0.0.0/8"),),
    deny_peers=(ip_network("10.1.0.0/16"), ip_network("fd00::/8")),
    max_allocations=1000,
    max_allocations_per_address=20,
    max_channels=30,
    unauthenticated_rate=40,
    unauthenticated_burst=50,
    control_hostnames=("relay.internal",),
    otlp=OtlpConfig("http://user:a-password-of-a-collector@collector:4317", 60),
    portal=PortalAccess(
        PortalUrl.parse("wss://api.firezone.dev"),
        PortalToken.parse(TOKEN),
        "frankfurt-1",
        Proxy("proxy.example", 3128, ProxyCredentials("Basic c2VjcmV0OnBhc3N3b3Jk")),
    ),
    drain_timeout=300,
    cpu=None,
    offload=OffloadConfig(("eth0",), AttachMode.DRIVER),
)


def test_settings_are_shown_but_not_the_secrets_among_them() -> None:
    status = Watched(config=WHOLE).status()
    assert status["config"] == {
        "public_addresses": ["203.0.113.7"],
        "bind_addresses": ["0.0.0.0", "::"],
        "service_port": 3478,
        "lowest_port": 49152,
        "highest_port": 65535,
        "max_allocations": 1000,
        "max_allocations_per_address": 20,
        "max_channels": 30,
        "unauthenticated_rate": 40,
        "unauthenticated_burst": 50,
        "health_address": "0.0.0.0:8080",
        "control_address": "[::1]:9999",
        "control_hostnames": ["relay.internal"],
        "portal_url": "wss://api.firezone.dev/relay/websocket",
        "name": "frankfurt-1",
        "proxy": "proxy.example:3128",
        "drain_timeout": 300,
        "cpu_affinity": "off",
        "switch_interval": 0.5,
        "allow_peers": ["10.0.0.0/8"],
        "deny_peers": ["10.1.0.0/16", "fd00::/8"],
        "ebpf_offloading": ["eth0"],
        "ebpf_attach_mode": "driver",
        "otlp": True,
    }


def test_of_every_setting_it_was_decided_whether_it_is_shown() -> None:
    """Under its own name, under another, or not at all: whoever adds one has to say."""
    others = {"public_ip4", "public_ip6", "bind_ip4", "bind_ip6", "health", "control", "cpu", "portal", "offload"}
    never = {"secret", "rng_seed"}
    shown = set(model.Config.__annotations__)
    assert {field.name for field in fields(Config)} - shown == others | never


def test_no_secret_username_nonce_or_key_is_in_any_answer() -> None:
    watched = Watched(config=WHOLE)
    watched.portal = PortalChannel(PORTAL_CONFIG, Random(1))
    clients = [busy(watched, 3)[0] for _ in range(5)]
    body = "".join(str(watched.ask(channels=2000, sort=sort).body) for sort in SORTED_BY)
    assert "203.0.113.5:40001" in body
    hidden = [
        SECRET.reveal(),
        TOKEN,
        "424242",
        "c2VjcmV0",
        "a-password-of",
        PORTAL_CONFIG.token.reveal(),
        PORTAL_CONFIG.secret.reveal(),
    ]
    for client in clients:
        salt = client.credential.username.partition(":")[2]
        hidden += [client.credential.username, salt, client.credential.password, client.key.hex(), client.nonce.decode()]
    assert [secret for secret in hidden if secret in body] == []


def test_a_wrong_parameter_is_a_bad_request_that_says_what_is_wrong(watched: Watched) -> None:
    page = watched.ask(limit="many")
    assert page.status == 400
    assert json.dumps(page.body) == '{"error": "limit is a number from 0 to 500, not \'many\'"}'


def test_an_offset_beyond_the_end_is_an_empty_page(crowd: Watched) -> None:
    status = crowd.status(offset=40)
    assert (status["allocations"], status["totals"]["allocations"]) == ([], 40)
