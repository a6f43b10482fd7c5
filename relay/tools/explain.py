"""The command that explains why a client can't connect, from the relay's records of refused requests."""

import datetime as dt

import click

from relay.net.endpoint import Endpoint
from relay.options import NETWORK
from relay.status.model import AllocationStatus, RecordedRequest
from relay.tools.control import StatusQuery, control_option, fetch
from relay.tools.figures import printable, span

_FIRST = "normal first step: the response has a nonce"
_LIMIT = "a limit is reached"
EXPLANATIONS = {
    "no_credentials": _FIRST,
    "no_nonce": _FIRST,
    "credential_expired": "the credential expired at {about}: get a new one, and compare clocks (timedatectl)",
    "wrong_password": "wrong password: the credential is for another relay, or from before this relay started",
    "no_credential_of_ours": "the username lacks the portal's form EXPIRY:SALT",
    "old_nonce": "normal after an hour: the client retries with a new nonce",
    "stale_nonce": "normal after a restart, or if the client's address changed: the client retries with a new nonce",
    "allocation_mismatch": "Allocate: the client has an allocation already; other requests: it has none, or no more",
    "wrong_credentials": "the allocation at this client address belongs to another username",
    "allocations": f"{_LIMIT}: --max-allocations",
    "allocations_of_address": f"{_LIMIT}: --max-allocations-per-address",
    "channels": f"{_LIMIT}: --max-channels-per-allocation",
    "channels_in_all": f"{_LIMIT}: --max-channels",
    "ports": "no port is free: --lowest-port, --highest-port",
    "sockets": "the machine lacks a port, a descriptor or a thread: see the log",
    "draining": "the relay is draining: use another relay",
    "own_port": "{about} is a service port of the relay",
    "denied": "{about} is in a network of --deny-peer",
    "own_address": "{about} is an address of the relay's machine",
    "never_a_peer": "{about} is loopback, link-local, multicast, reserved or a metadata service: --allow-peer",
    "withheld": "no response: --unauthenticated-rate limits responses to this network",
    "channel_taken": "the channel is bound to another peer, or was within five minutes",
    "peer_taken": "the peer is bound to another channel, or was within five minutes",
    "reservation": "EVEN-PORT or RESERVATION-TOKEN with a reservation: not supported",
    "unknown_attribute": "a required attribute is unknown: not supported",
    "address_family_not_supported": "the relay has no public address of this family",
    "unsupported_transport_protocol": "only UDP is relayed",
    "peer_address_family_mismatch": "the allocation has no address of the peer's family",
}
"""The meaning of each cause, or the remedy. Any other cause is an invalid request: a bug of the client."""


@click.command(short_help="Explain why a client can't connect to a running relay.")
@click.argument("client", metavar="ADDRESS", type=NETWORK)
@control_option
def explain(at: Endpoint, client: str) -> None:
    """List the allocations and the last refused requests of the client ADDRESS, or of a network, with the reasons.

    The relay keeps the last responses to the last clients, whatever the log level.

    Exit codes: 0 success, 1 the relay is unreachable, 2 usage error.
    """
    status = fetch(at, StatusQuery("age", 100, client=client))
    for allocation in status["allocations"]:
        click.echo(_allocation(allocation))
    for each in status["requests"]:
        click.echo(f"{printable(each['client'])} requested:")
        for request in each["requests"]:
            click.echo(_request(request))
    if not status["requests"]:
        click.echo(f"no request of {client} was refused in the last {span(status['requests_complete_for'])}")
        if not status["matching"]:
            click.echo(
                "Either its requests do not arrive (check its address, its network and the firewall), or all succeeded."
            )


def _allocation(allocation: AllocationStatus) -> str:
    drops = ", ".join(f"{count} {printable(reason)}" for reason, count in allocation["drops"].items())
    return (
        f"{printable(allocation['client'])} has allocation {allocation['id']} for {span(allocation['age'])}, "
        f"with {allocation['channel_count']} channels, dropped datagrams: {drops or 'none'}"
    )


def _request(request: RecordedRequest) -> str:
    outcome = "success"
    if request["cause"]:
        about = printable(request["about"])
        if request["cause"] == "credential_expired" and about.isdigit():
            about = f"{dt.datetime.fromtimestamp(int(about), dt.UTC):%Y-%m-%d %H:%M:%S} UTC"
        meaning = EXPLANATIONS.get(request["cause"], "an invalid request: a bug of the client").format(about=about)
        outcome = f"{request['code'] or ''} {printable(request['cause'])}: {meaning}".strip()
    times = f", {request['count']} times" if request["count"] > 1 else ""
    return f"  {span(request['last_ago'])} ago{times}: {printable(request['request'])}: {outcome}"
