"""The command line: options become a `Config`, a `Config` becomes a `System`."""

import itertools
import json
import os
import queue
import secrets
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from relay import __version__
from relay.actors.system import News, Request, System
from relay.config import HIGHEST_PORT, LOWEST_PORT, BadUseError, Config, LogFormat
from relay.core.credentials import Credential, RelaySecret, mint
from relay.core.peers import Network
from relay.ops import logs, signals
from relay.ops.dump import dump
from relay.options import DurationType, EndpointType, IpAddressType, NetworksType, read_secret
from relay.probe.command import probe

T = TypeVar("T", bound=Callable[..., Any])

DAY = 86400
BAD_USE = 2
"""Exit code for what the user can mend."""

SALT_BYTES = 12

_EPILOG = """\b
Examples:
  firezone-relay --standalone --public-ip4-addr 203.0.113.7
  firezone-relay credentials --relay-secret-file secret.txt --ttl 12h
  firezone-relay probe 203.0.113.7 --relay-secret-file secret.txt

A relay that belongs to a Firezone network takes its token from the environment, as FIREZONE_TOKEN; a token is no option,
since every user of a machine can read its command lines. This version can't join a network yet: it runs --standalone.
"""


def _setting(
    flag: str,
    name: str,
    variable: str,
    type_: click.ParamType[Any],
    text: str,
    **more: Any,  # noqa: ANN401
) -> Callable[[T], T]:
    """Declare an option that can also be given in the environment."""
    return click.option(flag, name, envvar=variable, show_envvar=True, type=type_, help=text, **more)


@click.group(
    invoke_without_command=True,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110},
)
@click.version_option(__version__, message="%(version)s")
@click.option("--standalone", is_flag=True, show_default=False, help="Run without a portal, with a secret of one's own.")
@_setting(
    "--public-ip4-addr",
    "public_ip4",
    "PUBLIC_IP4_ADDR",
    IpAddressType(4),
    "The IPv4 address at which clients and peers reach this relay.",
)
@_setting(
    "--public-ip6-addr",
    "public_ip6",
    "PUBLIC_IP6_ADDR",
    IpAddressType(6),
    "The IPv6 address, likewise; at least one of the two is needed.",
)
@_setting(
    "--bind-ip4-addr",
    "bind_ip4",
    "BIND_IP4_ADDR",
    IpAddressType(4),
    "The IPv4 address to bind, where it differs from the public one (1:1 NAT). Unset: the public one if this machine "
    "has it, else all.",
)
@_setting("--bind-ip6-addr", "bind_ip6", "BIND_IP6_ADDR", IpAddressType(6), "The IPv6 address, likewise.")
@_setting(
    "--lowest-port",
    "lowest_port",
    "LOWEST_PORT",
    click.IntRange(1, 65535),
    "First port of allocations.",
    default=LOWEST_PORT,
)
@_setting(
    "--highest-port",
    "highest_port",
    "HIGHEST_PORT",
    click.IntRange(1, 65535),
    "Last port of allocations.",
    default=HIGHEST_PORT,
)
@_setting(
    "--max-allocations",
    "max_allocations",
    "MAX_ALLOCATIONS",
    click.IntRange(1),
    "Allocations at once. Unset: as many as there are ports.",
)
@_setting(
    "--relay-secret-file",
    "relay_secret_file",
    "RELAY_SECRET_FILE",
    click.Path(path_type=Path),
    "Standalone: the file with the secret that credentials are made with. Unset: a random one, and a credential is printed.",
)
@_setting(
    "--allow-peer",
    "allow_peers",
    "ALLOW_PEER",
    NetworksType(),
    multiple=True,
    text="Relay to peers in these networks, though they are refused by default (loopback, link-local, ...). Repeatable.",
)
@_setting(
    "--deny-peer",
    "deny_peers",
    "DENY_PEER",
    NetworksType(),
    multiple=True,
    text="Never relay to peers in these networks; stronger than --allow-peer. Repeatable.",
)
@_setting(
    "--health-address",
    "health",
    "HEALTH_CHECK_ADDR",
    EndpointType(),
    default="0.0.0.0:8080",
    text="Where GET /healthz and /readyz are answered.",
)
@_setting(
    "--control-address",
    "control",
    "CONTROL_ENDPOINT",
    EndpointType(),
    default="127.0.0.1:9999",
    text="Where operators will look inside; for now it answers what the health address does.",
)
@_setting(
    "--log-format",
    "log_format",
    "LOG_FORMAT",
    click.Choice([each.value for each in LogFormat]),
    "How log lines look.",
    default=LogFormat.HUMAN.value,
)
@_setting(
    "--rng-seed",
    "rng_seed",
    "RNG_SEED",
    click.INT,
    "For tests: makes all random numbers predictable, the relay's secret among them.",
)
@click.pass_context
def cli(context: click.Context, /, **options: Any) -> None:  # noqa: ANN401 - one for each option above
    """Relay packets between two peers that can't reach each other: STUN and TURN for Firezone networks.

    Clients are answered on UDP port 3478; each allocation has a UDP port of its own.
    """
    if context.invoked_subcommand is None:
        context.exit(_run(**options))


cli.add_command(probe)


@cli.command(short_help="Make a username and a password for a client.")
@click.option(
    "--relay-secret-file", type=click.Path(path_type=Path), required=True, help="The file with the relay's secret."
)
@click.option("--ttl", type=DurationType(), default="1d", show_default=True, help="How long it is valid: 90s, 15m, 12h, 1d.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def credentials(relay_secret_file: Path, ttl: int, *, as_json: bool) -> None:
    """Make a username and a password that a relay with the same secret takes until they expire."""
    expiry = int(time.time()) + ttl
    credential = _mint(read_secret(relay_secret_file), expiry)
    if as_json:
        click.echo(json.dumps({**credential._asdict(), "expires_at": expiry}))
    else:
        click.echo(f"username: {credential.username}\npassword: {credential.password}")


def main() -> NoReturn:
    """Run the command line; what the user can mend is said in one line, with exit code 2."""
    try:
        code = cli.main(prog_name="firezone-relay", standalone_mode=False)
    except (click.ClickException, BadUseError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"firezone-relay: {' '.join(message.split())}", err=True)
        sys.exit(BAD_USE)
    except click.Abort:
        sys.exit(128 + signal.SIGINT)
    sys.exit(code)


def _run(
    *,
    standalone: bool,
    log_format: str,
    relay_secret_file: Path | None,
    allow_peers: tuple[tuple[Network, ...], ...],
    deny_peers: tuple[tuple[Network, ...], ...],
    **settings: Any,  # noqa: ANN401 - click gives what the types of the options make
) -> int:
    """Run the relay until it is stopped, and give the exit code."""
    if sys.platform != "linux":
        raise BadUseError(f"the relay runs on Linux only, not on {sys.platform}: try it in a Linux container")
    if not standalone:
        raise BadUseError(
            "this version can't join a Firezone network yet: give --standalone"
            if os.environ.get("FIREZONE_TOKEN", "").strip()
            else "neither FIREZONE_TOKEN nor --standalone: set the token of a Firezone network, or give --standalone"
        )
    config = Config(
        secret=None if relay_secret_file is None else read_secret(relay_secret_file),
        allow_peers=tuple(itertools.chain(*allow_peers)),
        deny_peers=tuple(itertools.chain(*deny_peers)),
        **settings,
    )
    news: News = queue.SimpleQueue()
    signals.listen(lambda: news.put(Request.STOP), lambda: news.put(Request.DUMP))
    log = logs.LogWriter(sys.stderr)
    logs.configure(LogFormat(log_format), log)
    try:
        with System(config, news=news) as system:
            if config.secret is None:
                _introduce(system)
            return system.run(lambda: dump(system.summary(), log))
    finally:
        log.close()


def _mint(secret: RelaySecret, expiry: int) -> Credential:
    return mint(secret, expiry, secrets.token_urlsafe(SALT_BYTES))


def _program() -> str:
    """Give the words by which this program was called."""
    return f"{sys.executable} -m relay" if sys.argv[0].endswith("__main__.py") else sys.argv[0]


def _introduce(system: System) -> None:
    """Print what a first client needs: once, and to standard output only, since a log is kept and read by others."""
    credential = _mint(system.secret, int(time.time()) + DAY)
    hosts = [f"[{host}]" if ":" in host else host for host in system.config.public_hosts.values()]
    lines = [
        "The relay has made itself a secret. This credential is valid for a day:",
        "",
        *(f"  uri:      turn:{host}:{system.config.service_port}?transport=udp" for host in hosts),
        f"  username: {credential.username}",
        f"  password: {credential.password}",
        "",
        "Try it from another terminal:",
        "",
        f"  {_program()} probe {hosts[0]} --username {credential.username} --password {credential.password}",
        "",
    ]
    try:
        click.echo("\n".join(lines))
    except OSError as error:
        # What could not be written would be tried again at the end, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise BadUseError(
            f"can't print the credential ({error.strerror}): give --relay-secret-file, or mend the output"
        ) from error
