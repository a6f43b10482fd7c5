"""Impossible offload: the relay prints the reason in one line, and does not start."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeAlias

import pytest

import relay
from relay.cli import main
from relay.offload import bpf
from tests.support.offload.fixtures import needs_bpf
from tests.support.offload.relays import MODES, running
from tests.support.offload.topology import Host, configure, connect, hosts
from tests.support.privileges import CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN, give_up, in_a_thread
from tests.support.program import Program

pytestmark = [needs_bpf, pytest.mark.usefixtures("object_file")]

SECONDS: Final = 60
ADDRESS: Final = "10.77.1.1"
PASS: Final = bytes.fromhex("b7000000020000009500000000000000")
"""A program: r0 = XDP_PASS; exit."""

COMMAND: Final = (
    *("firezone-relay", "--standalone", "--public-ip4-addr", ADDRESS),
    *("--health-check-addr", "127.0.0.1:0", "--control-endpoint", "127.0.0.1:0"),
)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A machine with a link r0, and a bridge b0: its driver takes no programs."""
    with hosts("relay", "client") as (made, other):
        connect(made, "r0", other, "c0")
        configure(made, "r0", ADDRESS)
        made.ip("link add b0 type bridge", "link set b0 up")
        yield made


def refusal(host: Host, *options: str, before: tuple[str, ...] = (), **environment: str) -> str:
    """Start a relay that ends immediately, and return its error line."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "ALLOW_ROOT") if name in os.environ}
    with host.entered():
        done = subprocess.run(
            (*before, sys.executable, "-m", "relay", *COMMAND[1:], *options),
            env=kept | environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


Refuser: TypeAlias = Callable[..., str]


@pytest.fixture
def refused(host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuser:
    """Return the same error within this process, which takes a hundredth of the time."""

    def give_line(*options: str, without: tuple[int, ...] = (), **environment: str) -> str:
        monkeypatch.setattr(sys, "argv", [*COMMAND, *options])
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

        def start() -> int:
            give_up(without)
            with pytest.raises(SystemExit) as caught:
                main()
            return int(caught.value.code or 0)

        with host.entered():
            assert in_a_thread(start) == 2
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = said.err.splitlines()
        return line

    return give_line


@pytest.mark.parametrize(
    ("links", "said"),
    [
        ("r0,eth77", "--ebpf-offloading eth77: there is no such interface, only b0, lo, r0: name one of them"),
        ("lo", "--ebpf-offloading lo: that is no Ethernet interface: name one that packets from outside come by"),
        ("r0,r0", "--ebpf-offloading has r0 twice: use each interface once"),
        (",".join(f"eth{number}" for number in range(17)), "--ebpf-offloading names 17 interfaces: 16 are the most"),
    ],
    ids=["unknown", "lo", "twice", "seventeen"],
)
def test_invalid_interfaces_are_rejected(refused: Refuser, links: str, said: str) -> None:
    assert said in refused("--ebpf-offloading", links)


def test_interfaces_from_the_environment_are_checked(refused: Refuser) -> None:
    line = refused(EBPF_OFFLOADING="b0", EBPF_ATTACH_MODE="driver")
    assert "b0 can't have an XDP program" in line


def test_a_driver_without_xdp_is_rejected(host: Host, refused: Refuser) -> None:
    line = refused("--ebpf-offloading", "r0,b0", "--ebpf-attach-mode", "driver")
    assert "b0 can't have an XDP program, its driver (bridge) does not support it: give --ebpf-attach-mode generic" in line
    assert "xdp" not in host.links()


def test_an_unknown_mode_is_rejected(refused: Refuser) -> None:
    assert "'native'" in refused("--ebpf-offloading", "r0", "--ebpf-attach-mode", "native")


@pytest.mark.parametrize("mode", MODES)
def test_an_interface_with_another_program_is_rejected(host: Host, refused: Refuser, mode: str) -> None:
    with (
        bpf.Program(PASS, license="GPL") as other,
        host.entered(),
        bpf.XdpLink.create(other, host.ifindex("r0"), bpf.XdpMode.DRIVER),
    ):
        line = refused("--ebpf-offloading", "r0", "--ebpf-attach-mode", mode)
    assert "r0 has another XDP program: take that away first (ip link set dev r0 xdp off)" in line


def test_an_interface_of_another_relay_is_rejected(host: Host, refused: Refuser, tmp_path: Path) -> None:
    with running(host, tmp_path, "generic", links="r0", public=[ADDRESS]):
        assert "r0 has another XDP program" in refused("--ebpf-offloading", "r0")
        assert "xdp" in host.links(), "the one that was there first keeps it"


def test_a_process_without_capabilities_is_rejected(host: Host) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("NOBODY IS WITHOUT CAPABILITIES: setpriv is not installed (apt-get install util-linux)")
    line = refusal(host, "--ebpf-offloading", "r0", before=("setpriv", "--bounding-set=-all", "--inh-caps=-all"))
    assert "--ebpf-offloading needs CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF: run as root, or with AmbientCapabilities=" in line


@pytest.mark.parametrize(
    ("kept_back", "said"),
    [
        ((CAP_NET_ADMIN,), "--ebpf-offloading needs CAP_NET_ADMIN: run as root"),
        ((CAP_SYS_ADMIN, CAP_BPF), "--ebpf-offloading needs CAP_BPF: run as root"),
    ],
    ids=["no-NET_ADMIN", "no-BPF"],
)
def test_a_process_without_some_capabilities_is_rejected(refused: Refuser, kept_back: tuple[int, ...], said: str) -> None:
    assert said in refused("--ebpf-offloading", "r0", without=kept_back)


def test_a_package_without_the_program_is_rejected(host: Host, tmp_path: Path) -> None:
    # Includes compiled extension modules.
    package = Path(relay.__file__).parent
    shutil.copytree(package, tmp_path / "relay", ignore=shutil.ignore_patterns("*.o"), copy_function=os.symlink)
    with contextlib.chdir(tmp_path):
        line = refusal(host, "--ebpf-offloading", "r0", PYTHONPATH=str(tmp_path))
    assert "this package was built without clang: install clang and build it again" in line


def test_an_empty_interface_setting_disables_offload(host: Host) -> None:
    """An empty list of interfaces."""
    with host.entered():
        program = Program("--ebpf-offloading", ",", hosts=(ADDRESS,))
    with contextlib.closing(program):
        program.wait_until_ready()
        assert "xdp" not in host.links()
