"""Fixtures of the tests of relaying in the kernel.

Tests that load something into the kernel need root. Without root or the compiler they are skipped with a message.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import hatch_build
from relay.offload import capabilities, elf
from relay.offload.bpf import Map, MapType
from relay.offload.elf import MapDefinition, ProgramObject
from tests.support.machine import Machine
from tests.support.offload.relays import MODES, Lab, running
from tests.support.offload.runners import HostRunner, KernelRunner, Runner, build_host
from tests.support.offload.topology import row

ROOT = Path(hatch_build.__file__).parent
CLANG = shutil.which(os.environ.get("CLANG", "clang"))


def _why_not() -> str:
    """Return the reason why this process can't load programs, or an empty string."""
    lacking = capabilities.missing()
    if lacking:
        return f"nothing can be loaded into the kernel without {' and '.join(lacking)} (run as root)"
    try:
        Map(MapDefinition("probe", MapType.ARRAY, 4, 4, 1, 0)).close()
    except OSError as error:
        return f"nothing can be loaded into the kernel here ({error.strerror})"
    return ""


needs_bpf = pytest.mark.skipif(bool(_why_not()), reason=_why_not())
"""Marks tests that load something into the kernel."""

needs_clang = pytest.mark.skipif(CLANG is None, reason="nothing is compiled: clang is NOT INSTALLED (apt-get install clang)")
"""Marks tests that compile for the kernel."""


@pytest.fixture(scope="session")
def object_file() -> bytes:
    """The object file of the program, compiled if it is missing or outdated."""
    sources = [ROOT / hatch_build.SOURCE, *(ROOT / hatch_build.SOURCE).parent.glob("*.h")]
    built = ROOT / hatch_build.OBJECT
    newest = max(each.stat().st_mtime for each in sources)
    if not built.exists() or built.stat().st_mtime < newest:
        if CLANG is None:
            pytest.skip("there is no program for the kernel: clang is NOT INSTALLED (apt-get install clang)")
        hatch_build.compile_program(ROOT)
    return elf.packaged()


@pytest.fixture(scope="session")
def program_object(object_file: bytes) -> ProgramObject:
    """The content of the object file."""
    return elf.parse(object_file)


@pytest.fixture(scope="session", params=MODES)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, object_file: bytes) -> Iterator[Lab]:
    """A relay shared by many tests, which leave the relay and its network unchanged."""
    del object_file
    with row() as network:
        network.know_all()
        network.shorten_routes()
        with running(network.relay, tmp_path_factory.mktemp("relay"), request.param) as relay:
            yield Lab(network, relay, request.param)


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A separate network."""
    if shutil.which("ip") is None:
        pytest.skip("no network to attach programs in: ip is NOT INSTALLED (apt-get install iproute2)")
    with contextlib.closing(Machine()) as made:
        yield made


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostRunner]:
    """The program compiled for this machine with sanitizers, once for all workers."""
    base = tmp_path_factory.getbasetemp()
    built = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "xdp-host"
    if not built.exists():
        try:
            # Replaced atomically, because other workers may read the file.
            build_host(tmp_path_factory.mktemp("xdp")).replace(built)
        except FileNotFoundError:
            pytest.skip("nothing watches the program's use of memory: gcc is NOT INSTALLED (apt-get install gcc)")
    with HostRunner(built) as started:
        yield started


@pytest.fixture(scope="session")
def kernel(object_file: bytes) -> Iterator[KernelRunner]:
    """The program in the kernel."""
    lacking = _why_not()
    if lacking:
        pytest.skip(lacking)
    with KernelRunner(object_file) as loaded:
        yield loaded


@pytest.fixture(params=["host", "kernel"])
def runner(request: pytest.FixtureRequest) -> Runner:
    """Each runner in turn."""
    found: Runner = request.getfixturevalue(request.param)
    return found
