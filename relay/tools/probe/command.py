"""The command line of the probe."""

import re
import secrets
import time
from pathlib import Path

import click
from click.core import ParameterSource

from relay.config import HIGHEST_PORT, SERVICE_PORT
from relay.core.addresses import SocketAddress
from relay.core.attributes import USERNAME_LIMIT
from relay.core.credentials import SALT_BYTES, Credential, mint
from relay.net.endpoint import Endpoint
from relay.net.names import look_up
from relay.options import FILE, Parsed, read_secret
from relay.tools.probe import steps
from relay.tools.probe.client import TIMEOUT
from relay.tools.probe.report import Watcher, as_json, write_conclusion, write_step
from relay.tools.probe.traffic import SHORTEST, PacketPlan

CREDENTIAL_LIFETIME = 600
"""Seconds for which a credential made from the relay secret is valid."""

LOOKUP_TIMEOUT = 10.0
"""Seconds for a DNS lookup. The limit of the system may be minutes."""

_TARGET = re.compile(
    r"(?:(?P<scheme>turn|stun):(?![0-9]+$))?"
    r"(?:\[(?P<bracketed>[^]]*:[^]]*)\]|(?P<ip6>[^:[]*:[^:[]*:[^?]*)|(?P<name>[^:[?]+))(?::(?P<port>[0-9]{1,5}))?"
    r"(?:\?transport=udp)?",
    re.IGNORECASE,
)
"""HOST with an optional port, or a URI (RFC 7064, 7065)."""


def parse_target(text: str) -> tuple[Endpoint, bool]:
    """Parse a host with an optional port, or a URI. Return the server, and whether it relays: not with ``stun:``."""
    found = _TARGET.fullmatch(text)
    port = int(found["port"] or SERVICE_PORT) if found else 0
    if found is None or not 0 < port <= HIGHEST_PORT:
        raise ValueError(
            f"{text!r} is not a server with UDP: write HOST, HOST:PORT, [IPv6]:PORT, turn:HOST:PORT or stun:HOST:PORT, "
            f"with a port from 1 to {HIGHEST_PORT}"
        )
    is_turn = (found["scheme"] or "turn").lower() == "turn"
    return Endpoint(found["bracketed"] or found["ip6"] or found["name"], port), is_turn


@click.command(name="probe", short_help="Test a TURN relay like a client.")
@click.argument("target", metavar="HOST", type=Parsed("HOST", parse_target))
@click.option("--username", metavar="U", help="Username of a long-term credential.")
@click.option(
    "--password",
    metavar="P",
    envvar="FIREZONE_RELAY_PASSWORD",
    show_envvar=True,
    help="Password of the credential. Prefer the variable: other users can read the command line.",
)
@click.option(
    "--relay-secret-file",
    type=FILE,
    envvar="RELAY_SECRET_FILE",
    show_envvar=True,
    metavar="PATH",
    help="File with a Firezone relay's secret, for a credential of 10 minutes.",
)
@click.option("--count", type=click.IntRange(1, 100_000), default=50, help="Packets per direction and address.")
@click.option("--rate", type=click.IntRange(1, 1000), default=50, help="Packets per second and direction.")
@click.option("--size", type=click.IntRange(SHORTEST, 9000), default=160, help="Bytes of payload in each packet.")
@click.option(
    "--max-loss",
    type=click.FloatRange(0, 100),
    default=2,
    metavar="PERCENT",
    help="Maximum loss of packets in each direction.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 60),
    default=TIMEOUT,
    metavar="SECONDS",
    help="Maximum time for the response in each step.",
)
@click.option("--json", "json_", is_flag=True, help="Print one JSON object instead of a table.")
@click.pass_context
def probe(  # noqa: PLR0913, PLR0917 - one for each option
    ctx: click.Context,
    target: tuple[Endpoint, bool],
    username: str | None,
    password: str | None,
    relay_secret_file: Path | None,
    count: int,
    rate: int,
    size: int,
    max_loss: float,
    timeout: float,
    *,
    json_: bool,
) -> None:
    """Test the TURN relay HOST like a client and its peer.

    HOST is a name or an address, optionally with :PORT (default 3478; IPv6: [ADDRESS]:PORT), or a URI such as
    turn:HOST:PORT?transport=udp.

    The probe requests this machine's public address (Binding), creates an allocation (Allocate), binds channels to a peer of
    its own (ChannelBind), sends packets in both directions, measures the path MTU, and deletes the allocation (Refresh).
    Without credentials it tests only Binding and the rejection of Allocate, with a stun: URI only Binding. It works with any
    TURN server.

    Exit codes: 0 success, 1 a step failed (the last line names the step and the fix), 2 usage error.

    \b
    Examples:
      firezone-relay probe relay.example.com
      firezone-relay probe relay.example.com --relay-secret-file /run/relay-secret
      FIREZONE_RELAY_PASSWORD=... firezone-relay probe turn:203.0.113.5 --username alice --json
    """  # noqa: D301 - click takes this backspace for "keep the lines as they are"
    # The variables may be set for another run.
    if username is None and ctx.get_parameter_source("password") is ParameterSource.ENVIRONMENT:
        password = None
    if username is not None and ctx.get_parameter_source("relay_secret_file") is ParameterSource.ENVIRONMENT:
        relay_secret_file = None
    credential = _credential(username, password, relay_secret_file)
    server, is_turn = target
    plan = PacketPlan(count, rate, (size,), max_loss / 100) if is_turn else None
    watcher: Watcher = (lambda *_: None) if json_ else write_step
    report = steps.probe(server, resolve(server), credential, plan, timeout, watcher)
    if json_:
        click.echo(as_json(report))
    else:
        write_conclusion(report)
    if report.failures:
        ctx.exit(1)


def resolve(target: Endpoint, timeout: float = LOOKUP_TIMEOUT) -> tuple[SocketAddress, ...]:
    """Resolve the addresses of a server, in the order of the system. A failure is a usage error."""
    try:
        return tuple(each.address for each in look_up(target.host, target.port, timeout))
    except TimeoutError as error:
        text = f"the lookup of {target.host!r} took over {timeout:g} s: check DNS, or use an IP address"
        raise click.UsageError(text) from error
    except OSError as error:
        why = error.strerror or "not a name"
        raise click.UsageError(f"{target.host!r} is unknown ({why}): check the spelling, or use an IP address") from error


def _credential(username: str | None, password: str | None, secret_file: Path | None) -> Credential | None:
    """Return the credential of the options; None without these options. Contradictory options are a usage error."""
    if secret_file is not None:
        if username is not None or password is not None:
            raise click.UsageError("--relay-secret-file excludes --username and --password: use one kind of credential")
        expiry = int(time.time()) + CREDENTIAL_LIFETIME
        return mint(read_secret(secret_file), expiry, secrets.token_hex(SALT_BYTES))
    if username is None and password is None:
        return None
    if username is None:
        raise click.UsageError("--password requires --username: use both")
    if password is None:
        raise click.UsageError("--username requires --password: set FIREZONE_RELAY_PASSWORD or use --password")
    try:
        encoded = username.encode()
        password.encode()
    except UnicodeEncodeError:
        raise click.UsageError("username and password must be UTF-8") from None
    if not 0 < len(encoded) <= USERNAME_LIMIT:
        raise click.UsageError(f"a username has 1 to {USERNAME_LIMIT} bytes")
    return Credential(username, password)
