"""Content of the status page."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields
from ipaddress import IPv4Address, ip_network
from random import Random
from typing import Any

import pytest

from relay.config import HTTP_OPTIONS, AttachMode, Config, OffloadConfig, OtlpConfig, PortalAccess
from relay.core.addresses import AllocationId, ChannelNumber, ClientAddress, PeerAddress
from relay.core.attributes import ADDITIONAL_ADDRESS_FAMILY
from relay.core.portal.channel import PortalChannel
from relay.core.portal.commands import Connect
from relay.core.portal.endpoint import PortalToken, PortalUrl
from relay.core.portal.events import ConnectionLost
from relay.net.endpoint import Endpoint
from relay.net.proxy import Proxy, ProxyCredentials
from relay.offload.datapath import ChannelUsage
from relay.offload.program import Usage
from relay.ops.totals import TrafficCounts
from relay.status.model import AllocationStatus, FlowCounts
from relay.status.parameters import MAX_CHANNELS
from tests.support.core import CHANNEL, CLIENT6, OTHER_CHANNEL, OTHER_PEER, PEER, SECRET, Allocated, Client
from tests.support.portal_channel import CONFIG as PORTAL_CONFIG
from tests.support.status import Kernel, Watched

NOTHING: FlowCounts = {"packets": 0, "bytes": 0, "xdp_packets": 0, "xdp_bytes": 0}


NO_FILTER = dict.fromkeys(("client", "peer", "port"))


def busy(watched: Watched, packets: int, *, size: int = 100) -> tuple[Client, Allocated]:
    """Return a client that has sent some packets."""
    client = watched.client()
    allocated = client.allocate()
    client.bind_channel()
    send(client, packets, size)
    return client, allocated


def send(client: Client, packets: int, size: int = 100) -> None:
    for _ in range(packets):
        client.send_on_channel(bytes(size))


def ports(rows: list[AllocationStatus]) -> list[str]:
    return [row["relayed"][0].rpartition(":")[2] for row in rows]


def test_an_idle_relay_shows_its_state(watched: Watched) -> None:
    watched.relay.pass_time(90)
    status = watched.status()
    assert (status["version"], status["uptime"], status["ready"]) == ("0.1.0", 90.0, True)
    assert status["time"] == watched.relay.now.unix
    assert status["portal"] is None
    assert status["data_paths"] == {"userspace": {"clients": ["0.0.0.0:3478", "[::]:3478"]}, "xdp": None}
    assert status["totals"]["to_peer"] == status["totals"]["to_client"] == NOTHING
    assert status["allocations"] == []
    watched.ready = False
    status = watched.status()
    assert (status["ready"], status["not_ready"]) == (False, ["portal"])


def test_an_allocation_is_shown_with_its_client_and_time_left(watched: Watched) -> None:
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
        # printf %s USERNAME | sha256sum | cut -c1-12
        "username_sha256": hashlib.sha256(client.credential.username.encode()).hexdigest()[:12],
        "age": 30.0,
        "time_left": 570.0,
        "drops": {},
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


def test_dropped_datagrams_are_counted_for_their_allocation(watched: Watched) -> None:
    client, other = watched.client(), watched.client()
    allocated = client.allocate()
    other.allocate()
    watched.relay.receive_from_peer(allocated.id, bytes(50), PEER)
    client.send_on_channel(bytes(100), OTHER_CHANNEL)
    watched.relay.pass_time(2)
    watched.relay.wake()
    rows = watched.status(sort="age")["allocations"]
    assert [row["drops"] for row in rows] == [{"unbound_peer": 1, "unbound_channel": 1}, {}]


@pytest.mark.parametrize(
    ("query", "listed"),
    [
        ({}, ["203.0.113.5:40001", "203.0.113.5:40002", "[2001:db8:5::5]:40000"]),
        ({"client": "203.0.113.5"}, ["203.0.113.5:40001", "203.0.113.5:40002"]),
        ({"client": "203.0.112.0/23", "limit": 1, "offset": 1}, ["203.0.113.5:40002"]),
        ({"client": "203.0.113.4"}, []),
        ({"client": "::/0"}, ["[2001:db8:5::5]:40000"]),
        ({"peer": "198.51.100.9"}, ["203.0.113.5:40002"]),
        ({"peer": "198.51.100.0/24", "client": "::/0"}, []),
        ({"peer": "::/0"}, []),
    ],
)
def test_allocations_are_selected_by_client_and_peer(watched: Watched, query: dict[str, Any], listed: list[str]) -> None:
    watched.client().allocate()
    second = watched.client()
    second.allocate()
    second.bind_channel()
    Client(watched.relay, CLIENT6).allocate()
    status = watched.status(sort="client", **query)
    assert [row["client"] for row in status["allocations"]] == listed
    assert status["matching"] == len(listed) + query.get("offset", 0)
    assert status["totals"]["allocations"] == 3


def test_the_last_requests_of_a_selected_client_are_shown(watched: Watched) -> None:
    client = watched.client()
    client.allocate()
    watched.relay.pass_time(10)
    assert watched.status()["requests"] == watched.status(client="::/0")["requests"] == []
    status = watched.status(client="203.0.113.5")
    same = {"request": "allocate", "about": "", "count": 1, "first_ago": 10.0, "last_ago": 10.0}
    assert status["requests"] == [
        {
            "client": "203.0.113.5:40001",
            "requests": [same | {"code": 401, "cause": "no_credentials"}, same | {"code": None, "cause": ""}],
        }
    ]
    assert status["requests_complete_for"] == 10.0


def test_an_allocation_is_selected_by_its_port(watched: Watched) -> None:
    first, second = (watched.client().allocate() for _ in range(2))
    for allocated in (first, second):
        (row,) = watched.status(port=allocated.port)["allocations"]
        assert row["id"] == allocated.id
    unused = next(port for port in range(50000, 60000) if port not in {first.port, second.port})
    assert watched.status(port=unused)["matching"] == 0


def test_an_allocation_waiting_for_its_sockets_is_binding(watched: Watched) -> None:
    watched.client().begin_allocate()
    (row,) = watched.status()["allocations"]
    assert (row["state"], row["time_left"], row["channel_count"]) == ("binding", 5.0, 0)


def test_an_ipv6_client_is_in_brackets(watched: Watched) -> None:
    Client(watched.relay, CLIENT6).allocate()
    assert watched.status()["allocations"][0]["client"] == "[2001:db8:5::5]:40000"


def test_an_expired_channel_is_cooling_and_then_only_in_the_sum(watched: Watched) -> None:
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


def test_channels_are_listed_up_to_the_parameter(watched: Watched) -> None:
    client, _ = busy(watched, 1)
    client.bind_channel(OTHER_CHANNEL, OTHER_PEER)
    for most, numbers in ((0, []), (1, [CHANNEL]), (2, [CHANNEL, OTHER_CHANNEL]), (2000, [CHANNEL, OTHER_CHANNEL])):
        (row,) = watched.status(channels=most)["allocations"]
        assert [channel["number"] for channel in row["channels"]] == numbers
        assert row["channel_count"] == 2
        assert row["to_peer"]["packets"] == 1


def test_a_page_has_no_more_channels_than_its_limit(watched: Watched) -> None:
    for _ in range(3):
        client, _ = busy(watched, 1)
        for number in range(CHANNEL + 1, CHANNEL + MAX_CHANNELS // 2 + 1):
            client.bind_channel(number, PeerAddress(("198.51.100.9", number)))
    rows = watched.status(sort="age", channels=MAX_CHANNELS)["allocations"]
    assert [len(row["channels"]) for row in rows] == [1001, 999, 0]
    assert [row["channel_count"] for row in rows] == [1001] * 3


def test_totals_include_unlisted_and_ended_allocations(watched: Watched) -> None:
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
    """A relay with 40 different clients."""
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
def test_pages_in_any_order_contain_every_allocation_once(crowd: Watched, sort: str, order: str) -> None:
    rows: list[Any] = []
    for offset in range(0, 49, 7):
        status = crowd.status(sort=sort, order=order, offset=offset, limit=7)
        assert status["page"] == {"sort": sort, "order": order, "offset": offset, "limit": 7, "channels": 16} | NO_FILTER
        rows += status["allocations"]
    keys = [SORTED_BY[sort](row) for row in rows]
    assert keys == sorted(keys, reverse=order == "desc")
    assert len({row["id"] for row in rows}) == len(rows) == 40
    assert len(set(keys)) > 1


def test_sorted_runs_are_merged_into_one_order(crowd: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.status.scan.RUN_LENGTH", 3)
    order = crowd.scan().order("port", 100, descending=False)
    found = [crowd.tables.by_id[id_].port for id_ in order]
    assert found == sorted(found)
    assert len(found) == 40


def test_rates_are_the_average_since_the_previous_scan(watched: Watched) -> None:
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
    # The busiest now, not since creation.
    assert list(rates) == [f"203.0.113.5:{each.address[1]}" for each in (other, client, newcomer)]
    assert list(rates.values()) == [(1000.0, 0.0), (200.0, 15.0), (100.0, 0.0)]


def test_allocations_are_scanned_at_most_once_per_second(crowd: Watched) -> None:
    crowd.status(limit=5)
    before = crowd.pauses
    crowd.relay.pass_time(0.9)
    first = crowd.status(limit=5, offset=0)
    looking = 2 * 40 // 16
    assert crowd.pauses - before < 5 * (1 + 2) + looking
    crowd.relay.pass_time(0.1)
    second = crowd.status(limit=5)
    assert crowd.pauses - before > 2 * 5 + looking
    assert (first["totals"]["rates_over"], second["totals"]["rates_over"]) == (1.0, 1.0)


def test_a_scan_older_than_a_minute_is_not_used_for_rates(crowd: Watched) -> None:
    crowd.status()
    crowd.relay.pass_time(61)
    status = crowd.status(sort="rate")
    assert status["totals"]["to_peer_rate"] is None
    keys = [row["to_peer"]["bytes"] for row in status["allocations"]]
    assert keys == sorted(keys, reverse=True)
    assert all(row["to_peer_rate"] is None for row in status["allocations"])


def test_allocations_ending_during_a_scan_are_omitted(crowd: Watched) -> None:
    server = crowd.relay.server
    # An allocation ends at each pause: before its scan, between the sort and the list, or later.
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


def test_work_is_done_in_short_steps(watched: Watched) -> None:
    clients = [watched.client() for _ in range(45)]
    for client in clients:
        client.allocate()
    watched.status(limit=1)
    # Scan and order, 16 allocations per step; then both again.
    assert watched.pauses >= 2 * 45 // 16
    watched.relay.pass_time(2)
    before = watched.pauses
    watched.status(limit=1)
    assert watched.pauses - before >= 2 * 45 // 16 + 1
    before = watched.pauses
    watched.status(limit=45, channels=0)
    assert watched.pauses - before >= 45
    for number in range(CHANNEL, CHANNEL + 100):
        clients[0].bind_channel(number, PeerAddress(("198.51.100.9", number)))
    before = watched.pauses
    watched.status(limit=45, channels=0)
    assert watched.pauses - before >= 45 + 100 // 16
    before = watched.pauses
    watched.status(limit=45, channels=100)
    assert watched.pauses - before >= 45 + 100


def test_traffic_relayed_by_the_kernel_is_added_and_shown_separately() -> None:
    kernel = Kernel()
    watched = Watched(kernel=kernel)
    client, _ = busy(watched, 2)
    client.bind_channel(OTHER_CHANNEL, OTHER_PEER)
    at, number = ClientAddress(client.address), ChannelNumber(CHANNEL)
    kernel.used = [
        ChannelUsage(at, number, Usage(10, 1000, 1.0), Usage(20, 4000, 1.0)),
        ChannelUsage(ClientAddress(("198.51.100.99", 1)), number, Usage(5, 5, None), Usage(5, 5, None)),
    ]
    kernel.total = TrafficCounts(15, 1005, 25, 4005)
    status = watched.status()
    (row,) = status["allocations"]
    assert row["to_peer"] == {"packets": 12, "bytes": 1200, "xdp_packets": 10, "xdp_bytes": 1000}
    assert row["to_client"] == {"packets": 20, "bytes": 4000, "xdp_packets": 20, "xdp_bytes": 4000}
    assert [channel["to_peer"] for channel in row["channels"]] == [row["to_peer"], NOTHING]
    assert status["totals"]["to_peer"] == {"packets": 17, "bytes": 1205, "xdp_packets": 15, "xdp_bytes": 1005}
    assert status["data_paths"]["xdp"] == {
        "interfaces": {"eth0": "driver", "eth1": None},
        "failures": {},
        "channels": 1,
        "channels_refused": 0,
    }


def test_the_kernels_traffic_counts_for_order_and_rates() -> None:
    kernel = Kernel()
    watched = Watched(kernel=kernel)
    busy(watched, 9)
    quiet, _ = busy(watched, 1)
    watched.status()
    watched.relay.pass_time(2)
    used = Usage(10, 10_000, 1.0)
    kernel.used = [ChannelUsage(ClientAddress(quiet.address), ChannelNumber(CHANNEL), used, used)]
    kernel.total = TrafficCounts(10, 10_000, 10, 10_000)
    status = watched.status()
    assert [row["to_peer_rate"] for row in status["allocations"]] == [5000.0, 0.0]
    assert status["totals"]["to_client_rate"] == {"packets": 5.0, "bytes": 5000.0}


def test_the_portal_is_shown_with_its_state_and_last_failure(watched: Watched) -> None:
    watched.portal = PortalChannel(PORTAL_CONFIG, Random(1))
    idle = watched.status()["portal"]
    assert idle == {"state": "idle", "has_begun": False, "state_age": None, "joins": 0, "last_failure": None}
    watched.portal.start(watched.relay.now)
    (connect,) = watched.portal.drain()
    assert isinstance(connect, Connect)
    watched.portal.handle_event(ConnectionLost("no \x1b[31mroute"), watched.relay.now)
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
    max_channels_in_all=300,
    unauthenticated_rate=40,
    unauthenticated_burst=50,
    control_hostnames=("relay.internal",),
    otlp=OtlpConfig("http://user:a-password-of-a-collector@collector:4317", 60),
    portal=PortalAccess(
        PortalUrl.parse("wss://api.firezone.dev"),
        PortalToken.parse(TOKEN),
        Proxy("proxy.example", 3128, ProxyCredentials("Basic c2VjcmV0OnBhc3N3b3Jk")),
    ),
    name="frankfurt-1",
    drain_timeout=300,
    cpu=None,
    offload=OffloadConfig(("eth0",), AttachMode.DRIVER),
)


def test_settings_are_shown_without_secrets() -> None:
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
        "max_channels_in_all": 300,
        "unauthenticated_rate": 40,
        "unauthenticated_burst": 50,
        "health_address": "0.0.0.0:8080",
        "metrics_address": None,
        "control_address": "[::1]:9999",
        "control_hostnames": ["relay.internal"],
        "handover_socket": None,
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


def test_every_setting_is_shown_or_listed_as_hidden() -> None:
    """Each setting is shown under its name, under another name, or is secret."""
    others = {"public_ip4", "public_ip6", "bind_ip4", "bind_ip6", *HTTP_OPTIONS, "cpu", "portal", "offload"}
    never = {"secret", "rng_seed", "timeouts"}
    shown = set(Watched(config=WHOLE).status()["config"])
    assert {field.name for field in fields(Config)} - shown == others | never


def test_no_response_contains_a_secret_username_nonce_or_key() -> None:
    watched = Watched(config=WHOLE)
    watched.portal = PortalChannel(PORTAL_CONFIG, Random(1))
    clients = [busy(watched, 3)[0] for _ in range(5)]
    body = "".join(str(watched.ask(channels=2000, sort=sort).body) for sort in SORTED_BY)
    assert "203.0.113.5:40001" in body
    hidden = [
        SECRET.expose(),
        TOKEN,
        "424242",
        "c2VjcmV0",
        "a-password-of",
        PORTAL_CONFIG.token.expose(),
        PORTAL_CONFIG.secret.expose(),
    ]
    for client in clients:
        salt = client.credential.username.partition(":")[2]
        hidden += [client.credential.username, salt, client.credential.password, client.key.hex(), client.nonce.decode()]
    assert [secret for secret in hidden if secret in body] == []


def test_an_invalid_parameter_is_a_bad_request_with_a_reason(watched: Watched) -> None:
    page = watched.ask(limit="many")
    assert page.status == 400
    assert json.dumps(page.body) == '{"error": "limit is a number from 0 to 500, not \'many\'"}'


def test_an_offset_beyond_the_end_is_an_empty_page(crowd: Watched) -> None:
    status = crowd.status(offset=40)
    assert (status["allocations"], status["totals"]["allocations"]) == ([], 40)
