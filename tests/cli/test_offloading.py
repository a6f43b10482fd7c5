"""The options and variables of the offload."""

import sys

import click
import pytest

from relay.cli import main
from relay.config import AttachMode, OffloadConfig, UsageError
from tests.support.command_line import setting


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EBPF_OFFLOADING", "EBPF_ATTACH_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("text", "interfaces"),
    [
        ("eth0", ("eth0",)),
        ("eth0,eth1", ("eth0", "eth1")),
        (" eth0 , ens5f0np0.100 ,", ("eth0", "ens5f0np0.100")),
        ("fifteen-letters", ("fifteen-letters",)),
    ],
)
def test_interfaces_are_comma_separated(monkeypatch: pytest.MonkeyPatch, text: str, interfaces: tuple[str, ...]) -> None:
    assert setting("offload", "--ebpf-offloading", text) == interfaces
    monkeypatch.setenv("EBPF_OFFLOADING", text)
    assert setting("offload") == interfaces


@pytest.mark.parametrize("text", ["", " ", ",", " , "])
def test_an_empty_value_disables_the_offload(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    assert not setting("offload")
    monkeypatch.setenv("EBPF_OFFLOADING", text)
    assert not setting("offload")


@pytest.mark.parametrize("text", ["sixteen-letters-", "a/b", "eth0,../x", "eth\n0", "eth\0"])
def test_an_invalid_interface_name_is_a_usage_error(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a valid interface name: use eth0 or eth0,eth1"):
        setting("offload", "--ebpf-offloading", text)


def test_the_mode_is_one_of_three_and_auto_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert setting("attach_mode") == "auto"
    for mode in AttachMode:
        assert setting("attach_mode", "--ebpf-attach-mode", mode.value) == mode
        monkeypatch.setenv("EBPF_ATTACH_MODE", mode.value)
        assert setting("attach_mode") == mode
    with pytest.raises(click.BadParameter, match="'driver', 'generic', 'auto'"):
        setting("attach_mode", "--ebpf-attach-mode", "hardware")


def test_a_repeated_interface_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="has eth1 twice: use each interface once"):
        OffloadConfig(("eth0", "eth1", "eth1"))
    with pytest.raises(UsageError, match="has no interface"):
        OffloadConfig(())


def test_an_unknown_interface_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("EBPF_OFFLOADING", "nowhere0")
    monkeypatch.setattr(sys, "argv", ["firezone-relay", "--standalone", "--public-ip4-addr", "127.81.0.3"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("firezone-relay: --ebpf-offloading nowhere0: there is no such interface, only ")
