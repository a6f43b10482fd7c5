"""Makes docs/cli.md of what the command line declares: ``python -m docs.command_line``, or ``make docs``."""

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click

from relay.cli import cli

PAGE = Path(__file__).with_name("cli.md")
COMMAND = "make docs"
"""What makes the page anew."""

BESIDE_OPTIONS = {
    "FIREZONE_TOKEN": "The token that the portal made for this relay, or the path of a file with it (`--token-file`). The "
    "token itself is no option, since every user of a machine can read its command lines.",
    "HTTPS_PROXY": "The proxy on the way to the portal, `http://host:port`; for a `ws://` portal it is `HTTP_PROXY`. Both "
    "may be in lower case.",
    "NO_PROXY": "Hosts to reach without it, with commas between them.",
    "SSL_CERT_FILE": "A file of PEM certificates: who may vouch for the portal, in place of the system's authorities.",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "Where metrics are pushed to, with all the other variables of OpenTelemetry for that: "
    "[metrics.md](metrics.md#opentelemetry).",
    "NOTIFY_SOCKET": "Set by systemd, which is told there that the relay is ready, stops, or lives (`WATCHDOG_USEC`).",
}
"""Variables of the environment that no option has."""

_HEAD = f"""\
<!-- Made by `{COMMAND}` of what relay/cli.py and the commands say of themselves: change it there. -->

# Command line

All that `firezone-relay` takes, and what it gives back. Each command says the same with `--help`. An option wins over its
variable, and what is set to nothing counts as not set. Bad use, whatever the command, is one line that says what is wrong
and what to do, and exit code 2; whoever interrupts one of the small commands gets 130.
"""

_CODE = re.compile(r"(?<![\w`/-])(--[a-z][a-z0-9-]*|[A-Z][A-Z0-9]*_[A-Z0-9_]*[A-Z0-9]|/[a-z]+z?\b)(?![\w`])")
"""Options, variables and pages in a sentence."""


def page() -> str:
    """Give the page as it should be."""
    parts = [_HEAD]
    context = click.Context(cli, info_name="firezone-relay", **cli.context_settings)
    parts += _command(context)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None  # noqa: S101 - it is in the list
        parts += _command(click.Context(command, parent=context, info_name=name))
    return "\n".join(parts)


def _command(context: click.Context) -> Iterator[str]:
    command = context.command
    yield f"## `{context.command_path}`\n"
    yield f"```\n{' '.join(command.get_usage(context).split()).removeprefix('Usage: ')}\n```\n"
    yield from _prose(command.help or "")
    yield from _options(context)
    if isinstance(command, click.Group):
        yield from _variables()
        yield from _commands(context, command)
    yield from _prose(command.epilog or "")


def _prose(text: str) -> Iterator[str]:
    r"""Give the paragraphs of a help text; those marked with a ``\b`` are lines to type, below what they are for."""
    # The backspaces of docstrings are spelled out, those of other texts are not.
    for paragraph in filter(None, re.split(r"\n\s*\n", text.replace("\\b", "\b").strip("\n "))):
        lines = [line.rstrip() for line in paragraph.splitlines()]
        if lines[0].strip() == "\b":
            title, *commands = lines[1:]
            indent = min(len(line) - len(line.lstrip()) for line in commands)
            yield f"{title.strip()}\n"
            yield "\n".join(["```", *(line[indent:] for line in commands), "```\n"])
        else:
            text = _marked(" ".join(" ".join(lines).split()))
            yield textwrap.fill(text, 125, break_long_words=False, break_on_hyphens=False) + "\n"


def _options(context: click.Context) -> Iterator[str]:
    options = [each for each in context.command.get_params(context) if isinstance(each, click.Option) and not each.hidden]
    yield "| option | variable | default | |"
    yield "|---|---|---|---|"
    for option in options:
        extra = option.get_help_extra(context)
        # A command keeps the names of its help from when it was first called, which may have been without the others.
        name = ", ".join(f"`{each}`" for each in (context.help_option_names if "--help" in option.opts else option.opts))
        if not option.is_flag:
            name += f" `{option.make_metavar(context)}`"
        text = _marked(option.help or "") + (" Required." if option.required else "")
        if "range" in extra:
            text += f" Range: `{extra['range']}`."
        variables = ", ".join(f"`{each}`" for each in extra.get("envvars", ()))
        default = f"`{extra['default']}`" if "default" in extra else ""
        cells = (name, variables, default, text)
        yield "| " + " | ".join(each.replace("|", "\\|") for each in cells) + " |"
    yield ""


def _variables() -> Iterator[str]:
    yield "Variables that no option has:\n"
    yield "| variable | |"
    yield "|---|---|"
    yield from (f"| `{name}` | {text} |" for name, text in BESIDE_OPTIONS.items())
    yield ""


def _commands(context: click.Context, group: click.Group) -> Iterator[str]:
    yield "| command | |"
    yield "|---|---|"
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is not None:
            path = f"{context.command_path} {name}"
            yield f"| [`{path}`](#{path.replace(' ', '-')}) | {_marked(command.get_short_help_str(200))} |"
    yield ""


def _marked(text: str) -> str:
    """Show what is typed as such; ``<`` would begin a tag."""
    return _CODE.sub(r"`\1`", text).replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.stdout.write(f"{PAGE}\n")
