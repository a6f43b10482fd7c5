"""The relay as a process: settings become a `Config`, a `Config` becomes a `System`, which runs until it is told to end."""

import itertools
import os
import queue
import secrets
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click
import structlog

from relay.actors.news import News, Request
from relay.actors.system import System
from relay.config import AttachMode, BadUseError, Config, DiscoveryMethod, LogFormat, OffloadConfig, PortalAccess
from relay.core.credentials import SALT_BYTES, mint
from relay.core.peers import Network
from relay.core.portal.endpoint import PortalUrl
from relay.discovery.discover import discover
from relay.net.proxy import Proxy
from relay.offload.datapath import Datapath, open_datapath
from relay.ops import signals
from relay.ops.dump import dump, dump_stacks, leave_last_words
from relay.ops.logs import log as logs
from relay.ops.metrics.push import read_settings
from relay.ops.privilege import refuse_root
from relay.ops.systemd import Systemd
from relay.options import read_secret, read_token, read_token_file

_DAY = 86400

_log = structlog.get_logger("relay.process")


def run(
    *,
    standalone: bool,
    allow_root: bool,
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
    log_filter = settings.pop("log_filter")
    discovery = settings.pop("discovery")
    if discovery is not None:
        settings |= discover(DiscoveryMethod(discovery), settings["public_ip4"], settings["public_ip6"])._asdict()
    interfaces, mode = settings.pop("offload"), AttachMode(settings.pop("attach_mode"))
    otlp = read_settings(settings.pop("otlp_endpoint"), os.environ)
    config = Config(
        portal=access,
        secret=None if relay_secret_file is None else read_secret(relay_secret_file),
        allow_peers=tuple(itertools.chain(*allow_peers)),
        deny_peers=tuple(itertools.chain(*deny_peers)),
        offload=OffloadConfig(interfaces, mode) if interfaces else None,
        otlp=otlp,
        **settings,
    )
    if not allow_root:
        refuse_root()
    # Before any thread, each of which would keep the capabilities that this gives up.
    datapath = None if config.offload is None else open_datapath(config, config.offload)
    news: News = queue.SimpleQueue()
    leave_last_words()
    with logs.writing(LogFormat(log_format), log_filter, sys.stderr) as log:
        signals.listen(
            {
                signal.SIGTERM: lambda: news.put(Request.LEAVE),
                signal.SIGINT: lambda: news.put(Request.STOP),
                signal.SIGUSR1: lambda: news.put(Request.DUMP),
                # By the thread that waits for signals: so also if the one hangs that hears the news.
                signal.SIGQUIT: lambda: dump_stacks(log.stream),
            }
        )
        return _serve(config, news, datapath, log)


def _serve(config: Config, news: News, datapath: Datapath | None, log: logs.Log) -> int:
    """Relay until it is over, and give the exit code. Whatever ends it is said in the log."""
    try:
        with System(config, news=news, systemd=Systemd(os.environ), datapath=datapath, log=log) as system:
            if config.secret is None and config.portal is None:
                _introduce(system)
            return system.run(lambda: dump(system.summary(), log.stream))
    except BadUseError:
        raise
    except Exception as error:  # noqa: BLE001 - a bug; the interpreter would write it beside the log, in lines of its own
        _log.critical("the relay failed: please report this", exc_info=error)
        return 1


def _portal_access(
    *, standalone: bool, token_file: Path | None, api_url: PortalUrl, name: str | None
) -> PortalAccess | None:
    """Give how to join a network; None for a relay that stands alone."""
    if standalone:
        if token_file is not None:
            raise BadUseError("--standalone is without a portal, --token-file is for one: give one of the two")
        return None
    # Taken out, so that no program which this one might run is given it.
    variable = os.environ.pop("FIREZONE_TOKEN", "").strip()
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


def _program() -> str:
    """Give the words by which this program was called."""
    return f"{sys.executable} -m relay" if sys.argv[0].endswith("__main__.py") else sys.argv[0]


def _introduce(system: System) -> None:
    """Print what a first client needs: once, and to standard output only, since a log is kept and read by others."""
    credential = mint(system.secret, int(time.time()) + _DAY, secrets.token_urlsafe(SALT_BYTES))
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
    if sys.stdout is None:
        raise BadUseError("can't print the credential (standard output is closed): give --relay-secret-file, or open it")
    try:
        click.echo("\n".join(lines))
    except OSError as error:
        # What could not be written would be tried again at the end, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise BadUseError(
            f"can't print the credential ({error.strerror}): give --relay-secret-file, or mend the output"
        ) from error
