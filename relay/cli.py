"""The command line: options of the relay, and the commands beside it.

Each command imports its modules when it runs, because a health check must not wait for the imports of a whole relay.
"""

import errno
import functools
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import click
from click import BOOL, INT, STRING, Choice, IntRange
from click_option_group import OptionGroup

from relay import __version__, options
from relay.config import HIGHEST_PORT, LOWEST_PORT, SERVICE_PORT, AttachMode, DiscoveryMethod, LogFormat, UsageError
from relay.core.config import (
    ASSURED_CHANNELS,
    MAX_CHANNELS,
    MAX_CHANNELS_IN_ALL,
    UNAUTHENTICATED_BURST,
    UNAUTHENTICATED_RATE,
)
from relay.ops import signals

T = TypeVar("T", bound=Callable[..., Any])

_TOKEN_ADVICE = "set a token as FIREZONE_TOKEN, because every user of this machine can read command lines"  # noqa: S105 - advice

EXIT_USAGE = 2
"""The exit code of usage errors, which the user can fix."""

_UNWRITABLE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO))
"""Errors of a full disk and of a closed terminal."""

_COMMANDS = {
    "credentials": "relay.tools.credentials",
    "drain": "relay.tools.drain",
    "explain": "relay.tools.explain",
    "healthcheck": "relay.tools.healthcheck",
    "kick": "relay.tools.control",
    "probe": "relay.tools.probe.command",
    "top": "relay.tools.top.command",
}
"""The module of each command, which is imported only when the command runs."""

_EPILOG = """\b
Create a relay token in the Elixir console of a self-hosted Firezone portal (bin/portal remote):
  {:ok, token} = Portal.Authentication.create_relay_token()
  IO.puts(Portal.Authentication.encode_fragment!(token))

\b
With a Firezone portal, save the token to a file, and run:
  export FIREZONE_TOKEN=/etc/firezone-relay/token FIREZONE_API_URL=wss://api.example.com
  firezone-relay --public-ip4-addr 203.0.113.7

\b
Without a portal:
  firezone-relay --standalone --public-ip4-addr 203.0.113.7
  firezone-relay credentials --relay-secret-file secret.txt --ttl 12h
  firezone-relay probe 203.0.113.7 --relay-secret-file secret.txt

\b
Complete options in bash (in another shell: zsh_source or fish_source):
  eval "$(_FIREZONE_RELAY_COMPLETE=bash_source firezone-relay)"

FIREZONE_TOKEN is the token or its file. No argument takes the token: every user of a machine can read command lines.
HTTPS_PROXY, NO_PROXY and SSL_CERT_FILE apply to the connection to the portal.

Signals: SIGTERM leaves the portal, drains for --drain-timeout and exits. SIGINT or a second SIGTERM exits at once. SIGUSR1
writes state and thread stacks to the log; SIGQUIT only stacks, even if the relay hangs. SIGABRT writes stacks and aborts.
SIGHUP and SIGUSR2 change nothing: to change settings, restart the relay or take it over.

Exit codes: 0 stopped on request, 1 fatal error, 2 usage error.
"""


def _setting(
    section: OptionGroup,
    names: str | tuple[str, str],
    type_: click.ParamType[Any],
    text: str,
    *,
    variable: str | tuple[str, ...] | None = None,
    **more: Any,  # noqa: ANN401
) -> Callable[[T], T]:
    """Declare an option, its setting if that has another name, and its environment variables.

    By default, ``--lowest-port`` has the variable LOWEST_PORT.
    """
    declared = (names,) if isinstance(names, str) else names
    if variable is None:
        variable = declared[0].removeprefix("--").replace("-", "_").upper()
    return section.option(*declared, envvar=variable, show_envvar=bool(variable), type=type_, help=text, **more)


_portal, _address, _limit, _kernel, _log, _advanced = (
    functools.partial(_setting, OptionGroup(title))
    for title in ("Portal", "Addresses", "Limits", "Kernel", "Logs and metrics", "Advanced")
)
"""Declare an option in a section of ``--help``. Options of a section must be adjacent."""


class _Commands(click.Group):
    def list_commands(self, _: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, _: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(importlib.import_module(_COMMANDS[cmd_name]), cmd_name)
        assert isinstance(command, click.Command)  # noqa: S101 - guaranteed by the table
        return command


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110},
)
@click.version_option(__version__, message="%(version)s")
@click.option("--check", is_flag=True, help="Print all settings, their sources and likely mistakes, and exit.")
@_portal(
    "--token-file",
    options.FILE,
    "File with the portal's token, read for each attempt to join. Replaces FIREZONE_TOKEN.",
    variable=(),
)
@_portal(
    "--api-url",
    options.PORTAL_URL,
    "URL of your portal's API, such as wss://api.example.com. Required with a token.",
    variable="FIREZONE_API_URL",
)
@_portal("--name", STRING, "Name of this relay in top and metrics. Current portals ignore it.", variable="FIREZONE_NAME")
@_portal("--standalone", BOOL, "Run without a portal. See --relay-secret-file.", variable=(), is_flag=True)
@_portal(
    "--relay-secret-file",
    options.FILE,
    "Standalone: file with the secret for credentials. Unset: the relay creates a secret and prints a credential.",
)
@_address(
    ("--public-ip4-addr", "public_ip4"), options.IPV4, "Public IPv4 address, at which clients and peers reach this relay."
)
@_address(
    ("--public-ip6-addr", "public_ip6"),
    options.IPV6,
    "Public IPv6 address. At least one public address is required.",
)
@_address(
    ("--listen-address-discovery-method", "discovery"),
    Choice([*map(str, DiscoveryMethod)]),
    "Read unset public addresses from this cloud's metadata service.",
)
@_address(
    ("--bind-ip4-addr", "bind_ip4"),
    options.IPV4,
    "IPv4 address to bind (1:1 NAT). Unset: the public address if this machine has it, else all addresses.",
)
@_address(
    ("--bind-ip6-addr", "bind_ip6"),
    options.IPV6,
    "IPv6 address to bind. Unset: as for IPv4.",
)
@_address(
    "--listen-port",
    options.CLIENT_PORT,
    "UDP port for clients. Only 3478, because clients drop packets from any other port.",
    default=str(SERVICE_PORT),
    expose_value=False,
)
@_address("--lowest-port", IntRange(1, 65535), "First port for allocations.", default=LOWEST_PORT)
@_address("--highest-port", IntRange(1, 65535), "Last port for allocations.", default=HIGHEST_PORT)
@_address(
    ("--health-check-addr", "health"),
    options.ENDPOINT,
    "Address for GET /livez, /readyz and /healthz.",
    default="0.0.0.0:8080",
)
@_address(
    ("--control-endpoint", "control"),
    options.ENDPOINT,
    "Address for metrics, status and the operator's commands. No authentication: keep it on loopback.",
    default="127.0.0.1:9999",
)
@_address(
    ("--metrics-addr", "metrics"),
    options.ENDPOINT,
    "Additional address with GET /metrics only.",
)
@_address(
    ("--control-hostname", "control_hostnames"),
    options.HOSTNAMES,
    "Comma-separated hostnames accepted at the control address, besides IP addresses and localhost.",
    default=(),
)
@_limit("--max-allocations", IntRange(1), "Maximum number of allocations. Unset: the number of ports.")
@_limit(
    "--max-allocations-per-address",
    IntRange(1),
    "Maximum number of allocations per client address (IPv6: /64). Unset: no limit.",
)
@_limit(
    ("--max-channels-per-allocation", "max_channels"),
    IntRange(1, 16384),
    "Maximum number of channels per allocation.",
    default=MAX_CHANNELS,
)
@_limit(
    ("--max-channels", "max_channels_in_all"),
    IntRange(1),
    f"Maximum number of channels of all allocations, {ASSURED_CHANNELS} of each allocation not counted. A channel takes "
    "0.5 KB.",
    default=MAX_CHANNELS_IN_ALL,
)
@_limit(
    "--unauthenticated-rate",
    IntRange(0, 1_000_000),
    "Maximum responses per second to one unauthenticated source address (IPv6: /64). Limits reflection attacks. 0 "
    "disables the limit.",
    default=UNAUTHENTICATED_RATE,
)
@_limit(
    "--unauthenticated-burst",
    IntRange(1, 1_000_000),
    "Maximum burst of responses to one unauthenticated source address.",
    default=UNAUTHENTICATED_BURST,
)
@_limit(
    ("--allow-peer", "allow_peers"),
    options.NETWORKS,
    "Relay to peers in these networks, even if rejected by default (loopback, link-local, ...). Repeatable.",
    multiple=True,
)
@_limit(
    ("--deny-peer", "deny_peers"),
    options.NETWORKS,
    "Never relay to peers in these networks. Overrides --allow-peer. Repeatable.",
    multiple=True,
)
@_kernel(
    ("--ebpf-offloading", "offload"),
    options.INTERFACES,
    "Relay bound channels in the kernel (XDP) on these comma-separated interfaces. Needs root, or CAP_BPF, "
    "CAP_NET_ADMIN and CAP_PERFMON.",
)
@_kernel(
    ("--ebpf-attach-mode", "attach_mode"),
    Choice([*map(str, AttachMode)]),
    "XDP mode: driver, or generic (slower, any driver). auto: driver mode for drivers known to support it.",
    default=AttachMode.AUTO.value,
)
@_kernel(
    ("--cpu-affinity", "cpu"),
    options.CPU,
    "Pin all threads to one CPU, since Python runs one thread at a time. auto: current CPU; off: no pinning.",
    default="auto",
)
@_log("--log-format", Choice([*map(str, LogFormat)]), "Format of log lines.", default=LogFormat.HUMAN.value)
@_log(
    "--log-filter",
    options.LOG_FILTER,
    "Log level: off, error, warn, info, debug or trace, with exceptions such as info,relay.core=debug,portal=off.",
    variable=("LOG_FILTER", "RUST_LOG"),
    default="info",
)
@_log(
    ("--otlp-grpc-endpoint", "otlp_endpoint"),
    options.COLLECTOR,
    "Push metrics to this OpenTelemetry collector. The standard OTEL_ variables also apply. Needs the extra otlp.",
)
@_advanced(
    "--drain-timeout",
    options.SECONDS,
    "After SIGTERM, reject new allocations and keep relaying until no packet came for 5 s, at most for this time.",
    default="0",
)
@_advanced(
    "--take-over",
    BOOL,
    "Take over all allocations of the relay at --handover-socket, which then exits. Without a relay there, start normally.",
    is_flag=True,
)
@_advanced(
    "--detach",
    BOOL,
    "With --take-over: run in the background; the command exits when the new process relays. For ExecReload= of systemd.",
    is_flag=True,
)
@_advanced(
    "--handover-socket",
    options.FILE,
    "Unix socket at which another process of this user can take this relay over. Default: RUNTIME_DIRECTORY/handover.sock.",
)
@_advanced(
    "--switch-interval",
    options.INTERVAL,
    "Maximum time that a thread holds the interpreter while other threads wait. off: Python's default, 0.005.",
    default="0.5",
)
@_advanced(
    "--allow-root", BOOL, "Run even as root. A vulnerability in the relay then compromises the whole machine.", is_flag=True
)
@_advanced("--rng-seed", INT, "Tests only: make all random numbers predictable, including the relay's secret.")
@click.pass_context
def cli(context: click.Context, /, *, take_over: bool, detach: bool, **settings: Any) -> None:  # noqa: ANN401 - the values of all options
    """Relay packets between two peers that can't reach each other: STUN and TURN for Firezone networks.

    With FIREZONE_TOKEN and FIREZONE_API_URL, the relay joins the portal and responds to clients on UDP port 3478. Each
    allocation has a UDP port of its own.
    """
    if context.invoked_subcommand is None:
        from relay.system.announcement import announce, socket_path  # noqa: PLC0415 - other commands don't need it

        settings["handover_socket"] = path = socket_path(settings["handover_socket"])
        announcement = announce(path, detach=detach) if take_over and not settings["check"] else None

        from relay.system import process  # noqa: PLC0415 - the whole relay, which other commands don't need

        context.exit(process.run(context, announcement=announcement, **settings))
    signals.unblock()


def _message_of(error: click.ClickException | UsageError) -> str:
    """Return the message of a usage error. An unknown argument may be the token, so no message contains one."""
    message = error.format_message() if isinstance(error, click.ClickException) else str(error)
    if isinstance(error, click.NoSuchOption) and "token" in error.option_name.lower():
        return f"no such option: {_TOKEN_ADVICE}"
    if isinstance(error, click.NoSuchCommand) or "unexpected extra argument" in message:
        return f"unexpected argument: see --help for the options and commands; {_TOKEN_ADVICE}"
    return message


def main() -> NoReturn:
    """Run the command line. Print a usage error in one line and exit with code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Replace characters that the terminal's encoding lacks, instead of failing.
        sys.stdout.reconfigure(errors="replace")
    try:
        code = cli.main(prog_name="firezone-relay", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except (click.ClickException, UsageError) as error:
        from relay.ops.logs.log import error_line  # noqa: PLC0415 - seldom needed

        click.echo(error_line(f"firezone-relay: {' '.join(_message_of(error).split())}"), err=True)
        sys.exit(getattr(error, "exit_code", EXIT_USAGE))
    except click.Abort:
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        click.echo(f"firezone-relay: can't write to standard output: {error.strerror}", err=True)
        # Python would flush its buffer again at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    sys.exit(code)
