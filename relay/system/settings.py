"""The settings in force, their sources, and likely mistakes: weak secrets and misspelled variables."""

import difflib
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
from click.core import ParameterSource

from relay.config import ANY_CPU, Config
from relay.core.portal.endpoint import PortalUrl
from relay.options import NEW_SECRET

_SHORTEST_SECRET = 16
"""Characters. Guessing a shorter secret from one credential is feasible."""

_OWN_PREFIXES = ("FIREZONE_", "RELAY_")
_SIMILARITY = {True: 0.8, False: 0.9}
"""Similarity (difflib) to a variable of the relay above which a variable is reported, with and without such a prefix. At
0.88, LOG_FILE of another program would be reported."""

_TOKEN = "FIREZONE_TOKEN"  # noqa: S105 - a name
_OF_LIBRARIES = ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "SSL_CERT_FILE", "OTEL_")


def settings(context: click.Context, config: Config, environ: Mapping[str, str]) -> Iterator[str]:
    """Return a line for each setting in force: option, value and source. No line has a token or a secret."""
    for option in context.command.params:
        name = option.name
        if name not in context.params or name == "check":
            continue
        value, source = context.params[name], _source(context, option, environ)
        if name == "token_file" and value is None and config.portal is not None:
            value, source = config.portal.token_file or "(hidden)", _TOKEN
        elif name in ("public_ip4", "public_ip6") and value is None:
            value = getattr(config, name)
            source = source if value is None else context.params["discovery"]
        elif name == "max_allocations":
            value = config.capacity
        elif name == "cpu":
            value = {ANY_CPU: "auto", None: "off"}.get(value, value)
        yield f"{option.opts[0]:<34} {_shown(value):<30} {source}"
    yield from (f"{name:<34} {'(set)':<30} {name}" for name in environ if name.upper().startswith(_OF_LIBRARIES))


def _source(context: click.Context, option: click.Parameter, environ: Mapping[str, str]) -> str:
    source = context.get_parameter_source(option.name)
    if source is ParameterSource.ENVIRONMENT:
        return next(name for name in _variables(option) if environ.get(name))
    return "option" if source is ParameterSource.COMMANDLINE else "default"


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_shown, value)) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value.text if isinstance(value, PortalUrl) else "-" if value is None else str(value)


def typos(command: click.Command, environ: Mapping[str, str]) -> Iterator[str]:
    """Return a sentence for each variable that looks like a misspelled variable of the relay."""
    own = {_TOKEN, *(name for option in command.params for name in _variables(option))}
    for name in environ.keys() - own:
        similar = difflib.get_close_matches(name.upper(), own, 1, _SIMILARITY[name.startswith(_OWN_PREFIXES)])
        if similar:
            yield f"the relay does not read {name}: rename it if {similar[0]} is meant"


def weaknesses(config: Config, secret_file: Path | None) -> Iterator[str]:
    """Return a sentence with the fix for a short secret, and for files that every user can read."""
    if config.secret is not None and len(config.secret.expose()) < _SHORTEST_SECRET:
        yield f"the relay secret has under {_SHORTEST_SECRET} characters: {NEW_SECRET}"
    for path in (secret_file, None if config.portal is None else config.portal.token_file):
        if path is not None and path.stat().st_mode & stat.S_IROTH:
            yield f"every user can read {path}: run chmod o-r {path}"


def _variables(option: click.Parameter) -> tuple[str, ...]:
    return (option.envvar,) if isinstance(option.envvar, str) else tuple(option.envvar or ())
