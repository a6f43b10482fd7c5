"""The command line: what can be asked for.

What it takes to do it is imported once it is asked for: a command that only looks at a relay need not wait for all of one.
"""

import errno
import importlib
import io
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from relay import __version__
from relay.config import HIGHEST_PORT, LOWEST_PORT, AttachMode, BadUseError, DiscoveryMethod, LogFormat
from relay.core.config import MAX_CHANNELS, UNAUTHENTICATED_BURST, UNAUTHENTICATED_RATE
from relay.core.credentials import SALT_BYTES, mint
from relay.ops import signals
from relay.options import (
    CollectorType,
    CpuType,
    DurationType,
    EndpointType,
    HostnamesType,
    InterfacesType,
    IntervalType,
    IpAddressType,
    LogFilterType,
    NetworksType,
    PortalUrlType,
    read_secret,
)

T = TypeVar("T", bound=Callable[..., Any])

BAD_USE = 2
"""Exit code for what the user can mend."""

_UNWRITABLE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO))
"""What a disk that is full says, or a terminal that is gone."""

_ELSEWHERE = {"healthcheck": "relay.healthcheck", "probe": "relay.probe.command", "top": "relay.top.command"}
"""Commands that are imported once they are asked for, by name, with the module that has each."""

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
writes the state of the relay and what all threads do, SIGQUIT the latter alone, also if the relay hangs; SIGABRT ends it
with such last words, also if Python hangs. Exit codes: 0 asked to end, 1 the relay can't go on, 2 it can't be run as asked.
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


class _Commands(click.Group):
    """The commands, those that are elsewhere among them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_ELSEWHERE})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        command = getattr(importlib.import_module(_ELSEWHERE[cmd_name]), cmd_name)
        assert isinstance(command, click.Command)  # noqa: S101 - the table says so
        return command


@click.group(
    cls=_Commands,
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
    "--listen-address-discovery-method",
    "discovery",
    "LISTEN_ADDRESS_DISCOVERY_METHOD",
    click.Choice([each.value for each in DiscoveryMethod]),
    "Ask the cloud that this machine runs in for the public addresses that are not given.",
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
    "--max-allocations-per-address",
    "max_allocations_per_address",
    "MAX_ALLOCATIONS_PER_ADDRESS",
    click.IntRange(1),
    "Allocations at once of clients with one address (IPv6: /64). Unset: no limit, since an office may be behind it.",
)
@_setting(
    "--max-channels-per-allocation",
    "max_channels",
    "MAX_CHANNELS_PER_ALLOCATION",
    click.IntRange(1, 16384),
    "Channels that an allocation may have bound.",
    default=MAX_CHANNELS,
)
@_setting(
    "--unauthenticated-rate",
    "unauthenticated_rate",
    "UNAUTHENTICATED_RATE",
    click.IntRange(0, 1_000_000),
    "Answers a second to one address (IPv6: /64) that has not proven who it is, whose owner may be the victim of a forger. "
    "0 is without limit.",
    default=UNAUTHENTICATED_RATE,
)
@_setting(
    "--unauthenticated-burst",
    "unauthenticated_burst",
    "UNAUTHENTICATED_BURST",
    click.IntRange(1, 1_000_000),
    "Such answers at once, to an address that had few of late: all clients of an office at 9 o'clock.",
    default=UNAUTHENTICATED_BURST,
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
    text="Where GET /livez, /readyz and /healthz are answered.",
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
    "--control-hostname",
    "control_hostnames",
    "CONTROL_HOSTNAME",
    HostnamesType(),
    default=(),
    show_default=False,
    text="Names by which the control address may be asked, with commas between them; addresses and localhost always work.",
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
    "--log-filter",
    "log_filter",
    "LOG_FILTER",
    LogFilterType(),
    default="info",
    text="What is logged: off, error, warn, info, debug or trace, and exceptions such as info,relay.core=debug,portal=off.",
)
@_setting(
    "--otlp-grpc-endpoint",
    "otlp_endpoint",
    "OTLP_GRPC_ENDPOINT",
    CollectorType(),
    "Push metrics to this OpenTelemetry collector. OpenTelemetry's own OTEL_ variables are honoured, too; needs the extra "
    "otlp.",
)
@_setting(
    "--allow-root",
    "allow_root",
    "ALLOW_ROOT",
    click.BOOL,
    "Run even as root, which makes a flaw in the relay one of the whole machine.",
    is_flag=True,
    show_default=False,
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
        from relay import process  # noqa: PLC0415 - all of the relay, which commands beside it don't need

        context.exit(process.run(**options))
    signals.let_go()


@cli.command(short_help="Make a username and a password for a client.")
@click.option(
    "--relay-secret-file", type=click.Path(path_type=Path), required=True, help="The file with the relay's secret."
)
@click.option("--ttl", type=DurationType(), default="1d", show_default=True, help="How long it is valid: 90s, 15m, 12h, 1d.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def credentials(relay_secret_file: Path, ttl: int, *, as_json: bool) -> None:
    """Make a username and a password that a relay with the same secret takes until they expire.

    Exit code: 0, or 2 for bad use.
    """
    expiry = int(time.time()) + ttl
    credential = mint(read_secret(relay_secret_file), expiry, secrets.token_urlsafe(SALT_BYTES))
    if as_json:
        click.echo(json.dumps({**credential._asdict(), "expires_at": expiry}))
    else:
        click.echo(f"username: {credential.username}\npassword: {credential.password}")


def main() -> NoReturn:
    """Run the command line; what the user can mend is said in one line, with exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that can't be shown there is no reason to show nothing.
        sys.stdout.reconfigure(errors="replace")
    try:
        code = cli.main(prog_name="firezone-relay", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except (click.ClickException, BadUseError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"firezone-relay: {' '.join(message.split())}", err=True)
        sys.exit(BAD_USE)
    except click.Abort:
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        click.echo(f"firezone-relay: the output can't be written: {error.strerror}", err=True)
        # What could not be written would be tried again at the end, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    sys.exit(code)
