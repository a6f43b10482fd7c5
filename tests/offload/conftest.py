"""What tests of the relaying inside the kernel use.

Those that load something into the kernel take root. Where that or the compiler is missing they are skipped, and say so.
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
from tests.machine import Machine
from tests.offload.relays import MODES, Lab, running
from tests.offload.runners import HostRunner, KernelRunner, Runner, build_host
from tests.offload.topology import row

ROOT = Path(hatch_build.__file__).parent
CLANG = shutil.which(os.environ.get("CLANG", "clang"))


def _why_not() -> str:
    """What keeps this process from loading programs; empty if nothing does."""
    lacking = capabilities.missing()
    if lacking:
        return f"nothing can be loaded into the kernel without {' and '.join(lacking)} (run as root)"
    try:
        Map(MapDefinition("probe", MapType.ARRAY, 4, 4, 1, 0)).close()
    except OSError as error:
        return f"nothing can be loaded into the kernel here ({error.strerror})"
    return ""


needs_bpf = pytest.mark.skipif(bool(_why_not()), reason=_why_not())
"""For tests that load something into the kernel."""

needs_clang = pytest.mark.skipif(CLANG is None, reason="nothing is compiled: clang is NOT INSTALLED (apt-get install clang)")
"""For tests that compile for the kernel."""


@pytest.fixture(scope="session")
def object_file() -> bytes:
    """The object of the program that relays, compiled if it isn't or if it has changed since."""
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
    """The same, read."""
    return elf.parse(object_file)


@pytest.fixture(scope="session", params=MODES)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, object_file: bytes) -> Iterator[Lab]:
    """A relay that many tests use, each of which leaves it and its network as they were."""
    del object_file
    with row() as network:
        network.know_all()
        network.shorten_routes()
        with running(network.relay, tmp_path_factory.mktemp("relay"), request.param) as relay:
            yield Lab(network, relay, request.param)


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A network of its own."""
    if shutil.which("ip") is None:
        pytest.skip("no network to attach programs in: ip is NOT INSTALLED (apt-get install iproute2)")
    with contextlib.closing(Machine()) as made:
        yield made


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostRunner]:
    """The program that relays as one of this machine's, under sanitizers."""
    try:
        built = build_host(tmp_path_factory.mktemp("xdp"))
    except FileNotFoundError:
        pytest.skip("nothing watches the program's use of memory: gcc is NOT INSTALLED (apt-get install gcc)")
    with HostRunner(built) as started:
        yield started


@pytest.fixture(scope="session")
def kernel(object_file: bytes) -> Iterator[KernelRunner]:
    """The program that relays in the kernel."""
    lacking = _why_not()
    if lacking:
        pytest.skip(lacking)
    with KernelRunner(object_file) as loaded:
        yield loaded


@pytest.fixture(params=["host", "kernel"])
def runner(request: pytest.FixtureRequest) -> Runner:
    """Either."""
    found: Runner = request.getfixturevalue(request.param)
    return found
