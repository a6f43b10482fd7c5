"""What can't be relayed in the kernel, though it was asked for: the relay says why, in one line, and doesn't start."""

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
from relay.offload.bpf import Link, Program, XdpMode
from tests.offload.conftest import needs_bpf
from tests.offload.relays import MODES, running
from tests.offload.topology import Host, configure, connect, hosts

pytestmark = [needs_bpf, pytest.mark.usefixtures("object_file")]

SECONDS: Final = 60
ADDRESS: Final = "10.77.1.1"
PASS: Final = bytes.fromhex("b7000000020000009500000000000000")
"""A program: r0 = XDP_PASS; exit."""

COMMAND: Final = (
    *(sys.executable, "-m", "relay", "--standalone", "--public-ip4-addr", ADDRESS),
    *("--health-address", "127.0.0.1:0", "--control-address", "127.0.0.1:0"),
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
    """Start the relay, which has to end at once; give the line that says why."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "ALLOW_ROOT") if name in os.environ}
    with host.entered():
        done = subprocess.run(
            (*before, *COMMAND, *options),
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
    """Do what `refusal` does, in this process: that takes a hundredth of the time."""

    def give_line(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["firezone-relay", *COMMAND[3:], *options])
        with host.entered(), pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
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
        ("r0,r0", "--ebpf-offloading names r0 twice: name it once"),
        (",".join(f"eth{number}" for number in range(9)), "--ebpf-offloading names 9 interfaces: 8 are the most"),
    ],
    ids=["unknown", "lo", "twice", "nine"],
)
def test_interfaces_that_can_not_be(refused: Refuser, links: str, said: str) -> None:
    assert said in refused("--ebpf-offloading", links)


def test_they_can_be_named_in_the_environment(host: Host) -> None:
    line = refusal(host, EBPF_OFFLOADING="b0", EBPF_ATTACH_MODE="driver")
    assert "b0 can't have an XDP program" in line


def test_a_driver_that_takes_no_programs(host: Host, refused: Refuser) -> None:
    line = refused("--ebpf-offloading", "r0,b0", "--ebpf-attach-mode", "driver")
    assert "b0 can't have an XDP program, its driver (bridge) does not support it: give --ebpf-attach-mode generic" in line
    assert "xdp" not in host.links()


def test_a_mode_that_there_is_not(refused: Refuser) -> None:
    assert "'native'" in refused("--ebpf-offloading", "r0", "--ebpf-attach-mode", "native")


@pytest.mark.parametrize("mode", MODES)
def test_an_interface_with_another_program(host: Host, refused: Refuser, mode: str) -> None:
    with Program(PASS, license="GPL") as other, host.entered(), Link(other, host.ifindex("r0"), XdpMode.DRIVER):
        line = refused("--ebpf-offloading", "r0", "--ebpf-attach-mode", mode)
    assert "r0 has another XDP program: take that away first (ip link set dev r0 xdp off)" in line


def test_an_interface_with_the_program_of_another_relay(host: Host, tmp_path: Path) -> None:
    with running(host, tmp_path, "generic", links="r0", public=[ADDRESS]):
        assert "r0 has another XDP program" in refusal(host, "--ebpf-offloading", "r0")
        assert "xdp" in host.links(), "the one that was there first keeps it"


@pytest.mark.parametrize(
    ("kept_back", "said"),
    [
        ("-all", "--ebpf-offloading needs CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF: run as root, or with AmbientCapabilities="),
        ("-net_admin", "--ebpf-offloading needs CAP_NET_ADMIN: run as root"),
        ("-sys_admin,-bpf", "--ebpf-offloading needs CAP_BPF: run as root"),
    ],
    ids=["none", "no-NET_ADMIN", "no-BPF"],
)
def test_a_process_without_capabilities(host: Host, kept_back: str, said: str) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("NOBODY IS WITHOUT CAPABILITIES: setpriv is not installed (apt-get install util-linux)")
    weakly = ("setpriv", f"--bounding-set={kept_back}", "--inh-caps=-all")
    assert said in refusal(host, "--ebpf-offloading", "r0", before=weakly)


@pytest.mark.parametrize(
    ("object_", "said"),
    [
        (None, "this package was built without clang: install clang and build it again"),
        (b"", "install this package again"),
        (b"\x7fELF" + bytes(500), "install this package again"),
    ],
    ids=["missing", "empty", "broken"],
)
def test_a_package_without_the_program(host: Host, tmp_path: Path, object_: bytes | None, said: str) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.o")
    shutil.copytree(Path(relay.__file__).parent, tmp_path / "relay", ignore=ignored)
    if object_ is not None:
        (tmp_path / "relay" / "offload" / "program.o").write_bytes(object_)
    with contextlib.chdir(tmp_path):
        assert said in refusal(host, "--ebpf-offloading", "r0", PYTHONPATH=str(tmp_path))


@pytest.mark.parametrize("nothing", ["", ","])
def test_no_interface_is_none(host: Host, nothing: str) -> None:
    """As with a setting that someone left empty."""
    with host.entered():
        started = subprocess.Popen(
            (*COMMAND, "--ebpf-offloading", nothing), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    with started:
        try:
            assert started.stdout
            assert started.stdout.readline(), "it is ready"
            assert "xdp" not in host.links()
        finally:
            started.terminate()
