"""The page about the command line says what the program takes; what other pages say of variables is so."""

import re
from pathlib import Path

import click
import pytest

from docs.command_line import BESIDE_OPTIONS, COMMAND, PAGE, page
from relay.cli import cli

TOP = Path(__file__).parents[2]

WRITTEN = [
    *TOP.glob("*.md"),
    *TOP.glob("docs/*.md"),
    *TOP.glob("benchmarks/*.md"),
    *(each for each in TOP.glob("deploy/**/*") if each.is_file()),
    TOP / "Dockerfile",
]

NAME = re.compile(r"(?<![\w$])[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+(?!\w)")

OF_OTHERS = re.compile(r"(AF|BPF|CAP|IP|IPV6|IRQ|NET|NO|OTEL|PIP|PR|RLIMIT|SCHED|SHUT|SO|SYS|UDP|XDP)_")
"""Constants and capabilities of the kernel, which are spelt the same, what pip and OpenTelemetry read, and NO_COLOR."""


def commands() -> dict[str, click.Command]:
    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    return {"": cli} | {name: each for name, each in found.items() if each is not None}


def variables() -> set[str]:
    """Give what can be set in the environment."""
    names = {
        each.envvar
        for command in commands().values()
        for each in command.params
        if isinstance(each, click.Option) and isinstance(each.envvar, str)
    }
    return names | set(BESIDE_OPTIONS) | {"HTTP_PROXY", "WATCHDOG_USEC"}


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), f"{PAGE.relative_to(TOP)} is not what the command line says of itself: {COMMAND}"


def test_every_command_option_and_variable_is_on_the_page() -> None:
    """Whatever the page is made by."""
    text = PAGE.read_text()
    for name, command in commands().items():
        assert f"## `{f'firezone-relay {name}'.strip()}`\n" in text
        for option in command.params:
            assert not isinstance(option, click.Option) or f"`{option.opts[0]}`" in text
    assert {each for each in variables() if f"`{each}`" not in text} == set()


def test_every_command_says_what_its_exit_codes_mean() -> None:
    for name, command in commands().items():
        assert re.search(r"Exit codes?: 0", f"{command.help} {command.epilog}"), f"{name or 'the relay'} does not"


def test_variables_beside_options_are_read_by_the_program() -> None:
    sources = "".join(path.read_text().lower() for path in (TOP / "relay").rglob("*.py"))
    for name in BESIDE_OPTIONS:
        # Proxies' variables are put together of their parts.
        assert name.lower().removeprefix("https") in sources


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(TOP)))
def test_variables_that_pages_name_exist(path: Path) -> None:
    named = {each for each in NAME.findall(path.read_text()) if not OF_OTHERS.match(each)}
    assert named <= variables(), "what can be set in the environment is in docs/cli.md"


def test_names_that_operators_bring_along_work_here_and_are_explained() -> None:
    """Those of the Rust relay, whose environment files are to stay as they are."""
    known = {
        *("FIREZONE_TOKEN", "FIREZONE_API_URL", "FIREZONE_NAME", "PUBLIC_IP4_ADDR", "PUBLIC_IP6_ADDR", "BIND_IP4_ADDR"),
        *("BIND_IP6_ADDR", "LOWEST_PORT", "HIGHEST_PORT", "LOG_FORMAT", "RNG_SEED", "HEALTH_CHECK_ADDR", "CONTROL_ENDPOINT"),
        *("OTLP_GRPC_ENDPOINT", "EBPF_OFFLOADING", "EBPF_ATTACH_MODE"),
    }
    assert known <= variables()
    text = PAGE.with_name("migration.md").read_text()
    assert {each for each in known if f"`{each}`" not in text} == set()
