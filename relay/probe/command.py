"""The command line of the probe."""

import math
import secrets
import time
from pathlib import Path

import click
from click.core import ParameterSource

from relay.core.attributes import USERNAME_LIMIT
from relay.core.credentials import Credential, mint
from relay.options import read_secret
from relay.probe.report import TerminalWatcher, as_json, standard_output, write_table
from relay.probe.steps import Probe, Settings
from relay.probe.target import TargetError, parse_target, resolve
from relay.probe.traffic import Pace
from relay.probe.transaction import Patience

CREDENTIAL_LIFETIME = 600
"""Seconds for which a credential that is minted from the relay secret is valid."""

_SALT_LENGTH = 16


def _finite(_: click.Context, __: click.Parameter, value: float) -> float:
    """Refuse NaN, which no range keeps out."""
    if not math.isfinite(value):
        raise click.BadParameter("give a number")
    return value


@click.command(name="probe", short_help="Try out a TURN relay, as a client would use it.")
@click.argument("host")
@click.option("--username", metavar="U", help="The username of a long-term credential.")
@click.option(
    "--password",
    metavar="P",
    envvar="FIREZONE_RELAY_PASSWORD",
    show_envvar=True,
    help="Its password. Better in the variable: a command line can be read by other users.",
)
@click.option(
    "--relay-secret-file",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A Firezone relay's secret, to make a credential from that is valid for 10 minutes.",
)
@click.option(
    "--count", type=click.IntRange(1, 100_000), default=50, show_default=True, help="Packets each way, for each address."
)
@click.option("--rate", type=click.IntRange(1, 1000), default=50, show_default=True, help="Packets a second each way.")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 60),
    default=8.0,
    show_default=True,
    callback=_finite,
    metavar="SECONDS",
    help="How long a step waits for an answer.",
)
@click.option("--json", "json_", is_flag=True, help="Write one JSON object instead of a table.")
@click.pass_context
def probe(  # noqa: PLR0913, PLR0917 - one for each option
    ctx: click.Context,
    host: str,
    username: str | None,
    password: str | None,
    relay_secret_file: Path | None,
    count: int,
    rate: int,
    timeout: float,
    *,
    json_: bool,
) -> None:
    """Try out the TURN relay HOST, as a client and its peer would use it.

    HOST is a name or an address, with :PORT if that is not 3478; an IPv6 address with a port is written [IPv6]:PORT.

    It asks for this machine's address as the relay sees it (Binding), makes an allocation (Allocate), binds channels to a
    peer that it plays itself (ChannelBind), sends packets both ways, and deletes the allocation (Refresh). Without
    credentials it tries no more than Binding, and that Allocate is refused. Any TURN server will do, not only this one.

    Exit code: 0 nothing failed, 1 a step failed (the last line says which, and what to do), 2 bad use.

    \b
    Examples:
      firezone-relay probe relay.example.com
      firezone-relay probe relay.example.com --relay-secret-file /run/relay-secret
      FIREZONE_RELAY_PASSWORD=... firezone-relay probe 203.0.113.5 --username alice --json
    """  # noqa: D301 - click takes this backspace for "keep the lines as they are"
    if password is not None and ctx.get_parameter_source("password") is ParameterSource.ENVIRONMENT and username is None:
        # The variable may be there for another run.
        password = None
    settings = Settings(_credential(username, password, relay_secret_file), Pace(count, rate), Patience(total=timeout))
    try:
        target = parse_target(host)
        addresses = resolve(target)
    except TargetError as error:
        raise click.UsageError(str(error)) from error
    with TerminalWatcher() as watcher:
        report = Probe(settings, watcher).run(target, addresses)
    if json_:
        click.echo(as_json(report))
    else:
        write_table(report, standard_output())
    if report.failures:
        ctx.exit(1)


def _credential(username: str | None, password: str | None, secret_file: Path | None) -> Credential | None:
    """Make a credential of what was given; None if nothing was.

    Raises:
        click.UsageError: it does not make one.
    """
    if secret_file is not None:
        if username is not None or password is not None:
            raise click.UsageError("give either --username and --password, or --relay-secret-file, not both")
        expiry = int(time.time()) + CREDENTIAL_LIFETIME
        return mint(read_secret(secret_file), expiry, secrets.token_hex(_SALT_LENGTH))
    if username is None and password is None:
        return None
    if username is None:
        raise click.UsageError("--password needs --username")
    if password is None:
        raise click.UsageError("--username needs --password, or the variable FIREZONE_RELAY_PASSWORD")
    try:
        encoded = username.encode()
        password.encode()
    except UnicodeEncodeError:
        raise click.UsageError("username and password must be UTF-8") from None
    if not 0 < len(encoded) <= USERNAME_LIMIT:
        raise click.UsageError(f"a username has 1 to {USERNAME_LIMIT} bytes")
    return Credential(username, password)
