"""docs/cli.md matches the program, and other pages name only existing variables."""

import re
from pathlib import Path

import click
import pytest

from docs.command_line import BESIDE_OPTIONS, COMMAND, PAGE, page
from relay.cli import cli
from relay.system.process import WITHOUT_EFFECT

TOP = Path(__file__).parents[2]

WRITTEN = [
    *TOP.glob("*.md"),
    *TOP.glob("docs/*.md"),
    *TOP.glob("benchmarks/*.md"),
    *(each for each in TOP.glob("deploy/**/*") if each.is_file() and each.parent.name != "deb"),
    TOP / "Dockerfile",
]

NAME = re.compile(r"(?<![\w$])[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+(?!\w)")

OF_OTHERS = re.compile(r"(AF|BPF|CAP|IP|IPV6|IRQ|LD|NET|NO|OTEL|PIP|POD|PR|RLIMIT|SCHED|SCM|SHUT|SO|SYS|UDP|XDP)_")
"""Constants and capabilities of the kernel, variables of the linker, pip, Kubernetes and OpenTelemetry, and NO_COLOR."""


def commands() -> dict[str, click.Command]:
    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    return {"": cli} | {name: each for name, each in found.items() if each is not None}


def variables() -> set[str]:
    """Return all environment variables."""
    options = [each for command in commands().values() for each in command.params if isinstance(each, click.Option)]
    names = {name for each in options for name in ([each.envvar] if isinstance(each.envvar, str) else each.envvar or ())}
    return names | set(BESIDE_OPTIONS) | {"HTTP_PROXY", "WATCHDOG_USEC"}


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), f"{PAGE.relative_to(TOP)} is outdated: run {COMMAND}"


def test_every_command_option_and_variable_is_on_the_page() -> None:
    """Independent of the generator."""
    text = PAGE.read_text()
    for name, command in commands().items():
        assert f"## `{f'firezone-relay {name}'.strip()}`\n" in text
        for option in command.params:
            assert not isinstance(option, click.Option) or option.hidden or f"`{option.opts[0]}`" in text
    assert {each for each in variables() if f"`{each}`" not in text} == set()


def test_every_command_documents_its_exit_codes() -> None:
    for name, command in commands().items():
        assert re.search(r"Exit codes?: 0", f"{command.help} {command.epilog}"), f"{name or 'the relay'} has no exit codes"


def test_documented_variables_without_an_option_are_read() -> None:
    sources = "".join(path.read_text().lower() for path in (TOP / "relay").rglob("*.py"))
    for name in BESIDE_OPTIONS:
        # urllib composes the names of proxy variables.
        assert name.lower().removeprefix("https") in sources


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(TOP)))
def test_variables_on_pages_exist(path: Path) -> None:
    named = {each for each in NAME.findall(path.read_text()) if not OF_OTHERS.match(each)}
    assert named <= variables() | set(WITHOUT_EFFECT), "docs/cli.md lists all variables"


def test_variables_of_the_rust_relay_work_or_are_ignored_and_are_documented() -> None:
    """All variables of the Rust relay, so that its environment files keep working."""
    known = {
        *("FIREZONE_TOKEN", "FIREZONE_API_URL", "FIREZONE_NAME", "PUBLIC_IP4_ADDR", "PUBLIC_IP6_ADDR", "BIND_IP4_ADDR"),
        *("BIND_IP6_ADDR", "LOWEST_PORT", "HIGHEST_PORT", "LOG_FORMAT", "RNG_SEED", "HEALTH_CHECK_ADDR", "CONTROL_ENDPOINT"),
        *("OTLP_GRPC_ENDPOINT", "EBPF_OFFLOADING", "EBPF_ATTACH_MODE", "RUST_LOG", "LISTEN_PORT"),
        *("LISTEN_ADDRESS_DISCOVERY_METHOD", "EBPF_INT4_ADDR", "EBPF_INT6_ADDR", "NUM_WORKER_THREADS", "TELEMETRY"),
        *("OTEL_METADATA_DISCOVERY_METHOD", "RUST_BACKTRACE"),
    }
    assert known <= variables() | set(WITHOUT_EFFECT)
    assert not variables() & set(WITHOUT_EFFECT)
    text = PAGE.with_name("migration.md").read_text()
    assert {each for each in known if f"`{each}`" not in text} == set()
