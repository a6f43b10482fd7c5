"""The relay as a process: make a `Config` from the options, then start and supervise a `System`."""

import itertools
import os
import queue
import secrets
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from relay.actors.mailbox import depths
from relay.config import AttachMode, Config, DiscoveryMethod, LogFormat, OffloadConfig, PortalAccess, UsageError
from relay.core.credentials import SALT_BYTES, mint
from relay.core.peers import Network
from relay.core.portal.endpoint import PortalUrl
from relay.logger import Logger
from relay.net.handover import WAKE_SIGNAL
from relay.net.proxy import Proxy
from relay.ops import signals
from relay.ops.dump import abort, dump, dump_stacks, leave_last_words, write_stacks_after
from relay.ops.logs import log as logs
from relay.ops.logs.filter import LogFilter
from relay.ops.metrics.push import read_settings
from relay.ops.privilege import refuse_root
from relay.ops.systemd import Systemd
from relay.options import parse_token, read_secret, read_token_file, token_path
from relay.system import settings
from relay.system.events import EventQueue, SystemRequest
from relay.system.handover import HandoverListener
from relay.system.supervisor import supervise
from relay.system.system import System

if TYPE_CHECKING:
    # Imported only if the kernel relays channels: see run.
    from relay.offload.datapath import Datapath
    from relay.system.announcement import Announcement
    from relay.system.succession import Inheritance

_DAY = 86400

WITHOUT_EFFECT = (
    *("EBPF_INT4_ADDR", "EBPF_INT6_ADDR", "NUM_WORKER_THREADS", "OTEL_METADATA_DISCOVERY_METHOD", "RUST_BACKTRACE"),
    "TELEMETRY",
)
"""Variables of the Rust relay and its image that this relay doesn't read."""

_log = Logger("relay.process")


def run(  # noqa: PLR0913 - the options that are not settings
    context: click.Context,
    *,
    check: bool,
    allow_root: bool,
    log_format: str,
    log_filter: LogFilter,
    relay_secret_file: Path | None,
    announcement: "Announcement | None",
    **options: Any,  # noqa: ANN401
) -> int:
    """Run the relay until it stops, or print its settings. Return the exit code. Arguments are the values of all options."""
    if sys.platform != "linux":
        raise UsageError(f"the relay runs only on Linux, not on {sys.platform}: use a Linux container")
    typos = tuple(settings.typos(context.command, os.environ))
    inheritance = None if announcement is None else _take_over(announcement)
    try:
        config = make_config(relay_secret_file=relay_secret_file, inheritance=inheritance, **options)
    except UsageError as error:
        raise UsageError("; ".join((str(error), *typos))) from error
    problems = (*typos, *settings.weaknesses(config, relay_secret_file))
    if check:
        lines = settings.settings(context, config, os.environ)
        click.echo("\n".join((*lines, *(f"Warning: {each}" for each in problems))))
        return 0
    if not allow_root:
        refuse_root()
    # Before any thread starts, because each thread would keep the capabilities that open_datapath drops.
    datapath = None
    if config.offload is not None:
        from relay.offload.datapath import open_datapath  # noqa: PLC0415 - for few relays only

        datapath = open_datapath(config, config.offload, is_successor=inheritance is not None)
    events: EventQueue = queue.SimpleQueue()
    leave_last_words()
    with logs.writing(LogFormat(log_format), log_filter, sys.stderr) as log:
        signals.handle(
            {
                signal.SIGTERM: lambda: events.put(SystemRequest.LEAVE),
                signal.SIGINT: lambda: events.put(SystemRequest.STOP),
                signal.SIGUSR1: lambda: events.put(SystemRequest.DUMP),
                # In the signal thread, in case the main thread hangs.
                signal.SIGQUIT: lambda: dump_stacks(log),
                signal.SIGABRT: lambda: abort(log),
                # Other servers reload on these signals, so operators and log rotation send them.
                signal.SIGHUP: lambda: _explain("SIGHUP"),
                signal.SIGUSR2: lambda: _explain("SIGUSR2"),
            }
        )
        for each in problems:
            _log.warning("a setting looks like a mistake", problem=each)
        return serve(config, events, datapath, log, inheritance)


def _explain(received: str) -> None:
    _log.warning(
        "signal ignored: this relay reloads nothing",
        signal=received,
        settings="restart, which drains for --drain-timeout, or start a successor with --take-over",
        log="POST /log_filter changes the filter; there is no file to reopen",
        token="the file is read again at each attempt to join",  # noqa: S106 - advice
    )


def _take_over(announcement: "Announcement") -> "Inheritance | None":
    from relay.system.succession import take_over  # noqa: PLC0415 - for few starts only

    return take_over(announcement)


def serve(
    config: Config,
    events: EventQueue,
    datapath: "Datapath | None",
    log: logs.Log,
    inheritance: "Inheritance | None" = None,
) -> int:
    """Start a relay, run it until it stops, and return the exit code. Log every fatal error."""
    environ = os.environ if inheritance is None else {**os.environ, **inheritance.systemd}
    systemd = Systemd(environ, report_after=write_stacks_after)
    # For the end of reads in a handover. A handler of Python has to be set in the main thread.
    signal.signal(WAKE_SIGNAL, lambda *_: None)
    try:
        with System(config, events=events, systemd=systemd, datapath=datapath, log=log, inheritance=inheritance) as system:
            if config.secret is None and config.portal is None and inheritance is None:
                _introduce(system)
            unread = [name for name in WITHOUT_EFFECT if os.environ.get(name)]
            if unread:
                _log.info("variables of the Rust relay have no effect", variables=unread)
            with nullcontext() if config.handover_socket is None else HandoverListener(system, config.handover_socket):
                code = supervise(system, lambda: dump(system.measured, depths(), log))
        if system.has_successor and os.getpid() == 1:
            _wait_for_end(events)
    except UsageError:
        raise
    except Exception as error:  # noqa: BLE001 - bugs belong in the log
        _log.critical("the relay failed: please report this", exc_info=error)
        return 1
    return code


def _wait_for_end(events: EventQueue) -> None:
    """Wait for SIGTERM or SIGINT. A container engine would restart the process, and it would take the relay back."""
    _log.info("handed over: this container can be stopped")
    while events.get() not in {SystemRequest.LEAVE, SystemRequest.STOP}:
        pass


def make_config(  # noqa: PLR0913 - the options that differ from the fields of Config
    *,
    standalone: bool,
    token_file: Path | None,
    api_url: PortalUrl | None,
    relay_secret_file: Path | None,
    discovery: str | None,
    allow_peers: tuple[tuple[Network, ...], ...],
    deny_peers: tuple[tuple[Network, ...], ...],
    offload: tuple[str, ...],
    attach_mode: str,
    otlp_endpoint: str | None,
    inheritance: "Inheritance | None" = None,
    **settings: Any,  # noqa: ANN401 - fields of Config
) -> Config:
    """Make a `Config` from the options, files and environment variables.

    Raises:
        UsageError: the options contradict each other, or discovery fails.
        click.UsageError: a file has no valid token or secret.
    """
    access = _portal_access(standalone=standalone, token_file=token_file, api_url=api_url, inheritance=inheritance)
    if access is not None and relay_secret_file is not None:
        raise UsageError(
            "--relay-secret-file requires --standalone: with a portal, the relay creates its own secret; remove one option"
        )
    if discovery is not None:
        from relay.discovery import discover  # noqa: PLC0415 - for few relays only

        settings |= discover(DiscoveryMethod(discovery), settings["public_ip4"], settings["public_ip6"])._asdict()
    return Config(
        portal=access,
        secret=None if relay_secret_file is None else read_secret(relay_secret_file),
        allow_peers=tuple(itertools.chain(*allow_peers)),
        deny_peers=tuple(itertools.chain(*deny_peers)),
        offload=OffloadConfig(offload, AttachMode(attach_mode)) if offload else None,
        otlp=read_settings(otlp_endpoint, os.environ),
        **settings,
    )


def _portal_access(
    *,
    standalone: bool,
    token_file: Path | None,
    api_url: PortalUrl | None,
    inheritance: "Inheritance | None",
) -> PortalAccess | None:
    """Return the access to the portal. Return None for a standalone relay."""
    if standalone:
        if token_file is not None:
            raise UsageError("--standalone and --token-file exclude each other: use one of them")
        return None
    # Removed from the environment, so that no child process inherits the token.
    variable = os.environ.pop("FIREZONE_TOKEN", "").strip()
    inherited = "" if inheritance is None else inheritance.portal_token or ""
    if inherited and token_file is None and not _can_read(variable):
        # systemd shows the credential file to the main process only.
        variable = inherited
    if token_file is None and not variable:
        raise UsageError(
            "no token: create one in the console of a self-hosted Firezone portal "
            "(Portal.Authentication.create_relay_token) and set FIREZONE_TOKEN, or use --standalone"
        )
    if api_url is None:
        # No default: the token would go to somebody else's portal.
        raise UsageError("no portal URL: set FIREZONE_API_URL to your own portal, such as wss://api.example.com")
    path = token_path(variable) if token_file is None else token_file
    token = parse_token(variable) if path is None else read_token_file(path)
    try:
        proxy = Proxy.from_environment(api_url.host, is_tls=api_url.is_tls)
    except ValueError as error:
        raise UsageError(f"can't use the proxy: {error}") from error
    return PortalAccess(api_url, token, proxy, path)


def _can_read(variable: str) -> bool:
    """Check whether FIREZONE_TOKEN is a token, or the path of a file that this process can read."""
    path = token_path(variable)
    return bool(variable) and (path is None or os.access(path, os.R_OK))


def _program() -> str:
    """Return the command by which this program was called."""
    return f"{sys.executable} -m relay" if sys.argv[0].endswith("__main__.py") else sys.argv[0]


def _introduce(system: System) -> None:
    """Print a credential for a first client. Standard output only, because other people may read the log."""
    credential = mint(system.secret, int(time.time()) + _DAY, secrets.token_urlsafe(SALT_BYTES))
    hosts = [f"[{host}]" if ":" in host else host for host in system.config.public_hosts.values()]
    lines = [
        "The relay created a random secret. This credential is valid for one day:",
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
    if sys.stdout is None:
        raise UsageError("can't print the credential: standard output is closed; use --relay-secret-file or open it")
    try:
        click.echo("\n".join(lines))
    except OSError as error:
        # Python would flush its buffer again at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UsageError(
            f"can't print the credential: {error.strerror}; use --relay-secret-file or fix standard output"
        ) from error
