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
from relay.actors.news import News, Request
from relay.actors.system import System
from relay.config import HIGHEST_PORT, LOWEST_PORT, AttachMode, BadUseError, Config, LogFormat, OffloadConfig, PortalAccess
from relay.core.credentials import Credential, RelaySecret, mint
from relay.core.peers import Network
from relay.core.portal.endpoint import PortalUrl
from relay.net.proxy import Proxy
from relay.offload.datapath import open_datapath
from relay.ops import logs, signals
from relay.ops.dump import dump, register_wedged_dump
from relay.ops.systemd import Systemd
from relay.options import (
    CpuType,
    DurationType,
    EndpointType,
    InterfacesType,
    IntervalType,
    IpAddressType,
    NetworksType,
    PortalUrlType,
    read_secret,
    read_token,
    read_token_file,
)
from relay.probe.command import probe

T = TypeVar("T", bound=Callable[..., Any])

DAY = 86400
BAD_USE = 2
"""Exit code for what the user can mend."""

SALT_BYTES = 12

_EPILOG = """\b
In a Firezone network:
  make a token for a relay in the portal, put it into a file, and
  FIREZONE_TOKEN=/etc/firezone-relay/token firezone-relay --public-ip4-addr 203.0.113.7

\b
Without one:
  firezone-relay --standalone --public-ip4-addr 203.0.113.7
  firezone-relay credentials --relay-secret-file secret.txt --ttl 12h
  firezone-relay probe 203.0.113.7 --relay-secret-file secret.txt

FIREZONE_TOKEN is the token, or the path of a file with it. The token itself is no option, since every user of a machine can
read its command lines. HTTPS_PROXY, NO_PROXY and SSL_CERT_FILE are honoured on the way to the portal.

Signals: SIGTERM leaves the portal, waits as --drain-timeout says, and ends; a second one, or SIGINT, ends at once. SIGUSR1
writes what all threads do. Exit codes: 0 asked to end, 1 the relay can't go on, 2 it can't be run as asked.
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
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help="The file with the token that the portal made for this relay; instead of FIREZONE_TOKEN.",
)
@_setting(
    "--name",
    "name",
    "FIREZONE_NAME",
    click.STRING,
    "What the portal calls this relay. Unset: it has no name.",
)
@_setting(
    "--api-url",
    "api_url",
    "FIREZONE_API_URL",
    PortalUrlType(),
    "Where the portal is.",
    default="wss://api.firezone.dev",
)
@_setting(
    "--drain-timeout",
    "drain_timeout",
    "DRAIN_TIMEOUT",
    DurationType("SECONDS", least=0),
    "After SIGTERM, go on relaying for so long, without new allocations, or until none is left.",
    default="0",
)
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
    text="Where operators look inside and change things. Whoever reaches it may do so: keep it on loopback.",
)
@_setting(
    "--cpu-affinity",
    "cpu",
    "CPU_AFFINITY",
    CpuType(),
    default="auto",
    text="The CPU for all threads: Python runs one at a time, and on several CPUs they fight over whose turn it is. auto "
    "is the one it starts on, off leaves threads wherever the kernel puts them.",
)
@_setting(
    "--switch-interval",
    "switch_interval",
    "SWITCH_INTERVAL",
    IntervalType(),
    default="0.5",
    text="How long a thread may keep the interpreter while others wait for it. off is Python's own, 0.005.",
)
@_setting(
    "--ebpf-offloading",
    "offload",
    "EBPF_OFFLOADING",
    InterfacesType(),
    text="Have the kernel relay bound channels, by an XDP program at these network interfaces, with commas between them. "
    "Needs root, or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON.",
)
@_setting(
    "--ebpf-attach-mode",
    "attach_mode",
    "EBPF_ATTACH_MODE",
    click.Choice([each.value for each in AttachMode]),
    "Where on a packet's way: in the driver; behind it, which is generic and slower; or auto, in drivers known for it.",
    default=AttachMode.AUTO.value,
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

    Make a token for a relay in the Firezone portal, set it as FIREZONE_TOKEN, and start. Clients are answered on UDP port
    3478 once the portal says so; each allocation has a UDP port of its own.
    """
    if context.invoked_subcommand is None:
        context.exit(_run(**options))
    signals.let_go()


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
    access = _portal_access(
        standalone=standalone, **{each: settings.pop(each) for each in ("token_file", "api_url", "name")}
    )
    if access is not None and relay_secret_file is not None:
        raise BadUseError(
            "--relay-secret-file is for --standalone: in a network, the relay makes a secret and tells the portal"
        )
    interfaces, mode = settings.pop("offload"), AttachMode(settings.pop("attach_mode"))
    config = Config(
        portal=access,
        secret=None if relay_secret_file is None else read_secret(relay_secret_file),
        allow_peers=tuple(itertools.chain(*allow_peers)),
        deny_peers=tuple(itertools.chain(*deny_peers)),
        offload=OffloadConfig(interfaces, mode) if interfaces else None,
        **settings,
    )
    # Before any thread, each of which would keep the capabilities that this gives up.
    datapath = None if config.offload is None else open_datapath(config, config.offload)
    news: News = queue.SimpleQueue()
    signals.listen(
        {
            signal.SIGTERM: lambda: news.put(Request.LEAVE),
            signal.SIGINT: lambda: news.put(Request.STOP),
            signal.SIGUSR1: lambda: news.put(Request.DUMP),
        }
    )
    register_wedged_dump()
    log = logs.LogWriter(sys.stderr)
    logs.configure(LogFormat(log_format), log)
    try:
        with System(config, news=news, systemd=Systemd(os.environ), datapath=datapath) as system:
            if config.secret is None and config.portal is None:
                _introduce(system)
            return system.run(lambda: dump(system.summary(), log))
    finally:
        log.close()


def _portal_access(
    *, standalone: bool, token_file: Path | None, api_url: PortalUrl, name: str | None
) -> PortalAccess | None:
    """Give how to join a network; None for a relay that stands alone."""
    if standalone:
        if token_file is not None:
            raise BadUseError("--standalone is without a portal, --token-file is for one: give one of the two")
        return None
    variable = os.environ.get("FIREZONE_TOKEN", "").strip()
    if token_file is None and not variable:
        raise BadUseError(
            "no token: make one for a relay in the Firezone portal and set it as FIREZONE_TOKEN, or give --standalone"
        )
    token = read_token(variable) if token_file is None else read_token_file(token_file)
    try:
        proxy = Proxy.from_environment(api_url.host, is_tls=api_url.is_tls)
    except ValueError as error:
        raise BadUseError(f"can't reach the portal through the proxy: {error}") from error
    return PortalAccess(api_url, token, name or None, proxy)


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
