"""The Debian package, on a Debian machine with systemd: installed, started, upgraded, removed and purged.

`make test-long` builds the package and the machine's file system.
"""

import contextlib
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.debian import Debian
from tests.support.machine import Machine, new_machines
from tests.support.scripted_portal import Authority, ScriptedPortal
from tests.support.waiting import wait_until

TOP: Final = Path(__file__).parents[2]
PACKAGES: Final = sorted((TOP / "dist").glob("firezone-relay_*.deb"))
ARCHIVE: Final = TOP / ".venv" / "debian.tar"

ADDRESS: Final = "10.80.0.2"
TOKEN: Final = ".SFMyNTY.g2gDbQAAACQ5ODZjNzI3-_throw.away~token"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not PACKAGES, reason="THE PACKAGE IS NOT TRIED: none is in dist/ (make deb)"),
    pytest.mark.skipif(not ARCHIVE.exists(), reason="THE PACKAGE IS NOT TRIED: no Debian (tests/make-debian-root)"),
]


@pytest.fixture(scope="module")
def network() -> Iterator[Machine]:
    with new_machines(1, "THE PACKAGE IS NOT TRIED: networks take root") as (made,):
        made.run("ip", "link", "set", "lo", "up")
        made.run("ip", "address", "add", f"{ADDRESS}/32", "dev", "lo")
        made.run("ip", "link", "add", "near", "up", "type", "veth", "peer", "name", "far")
        yield made


@pytest.fixture(scope="module")
def debian(network: Machine) -> Iterator[Debian]:
    """A machine with the package, not booted."""
    # pytest would keep its own folders.
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    try:
        machine = Debian(root, network)
    except OSError as error:
        root.rmdir()
        pytest.skip(f"THE PACKAGE IS NOT TRIED: systemd takes a control group ({error})")
    with contextlib.closing(machine):
        subprocess.run(("tar", "--extract", "--file", ARCHIVE, "--directory", root, "--exclude", "./dev/*"), check=True)
        shutil.copy(PACKAGES[-1], root / "root" / "package.deb")
        machine.run("apt-get install --yes /root/package.deb")
        yield machine


@pytest.fixture
def portal(network: Machine, debian: Debian, tmp_path: Path) -> Iterator[ScriptedPortal]:
    """A portal that the machine trusts."""
    authority = Authority(tmp_path)
    shutil.copy(authority.ca_file, debian.root / "usr/local/share/ca-certificates/portal.crt")
    debian.run("update-ca-certificates")
    with contextlib.ExitStack() as stack:
        with network.entered():
            made = stack.enter_context(ScriptedPortal(authority))
        yield made


def build_newer(debian: Debian) -> str:
    """Build the same package as a newer version with new default settings, and return the version."""
    folder = debian.root / "root" / "newer"
    subprocess.run(("dpkg-deb", "--raw-extract", PACKAGES[-1], folder), check=True)
    control = folder / "DEBIAN" / "control"
    control.write_text(re.sub(r"(?m)^Version: .*", "Version: 9.0+test", control.read_text()))
    with (folder / "etc/firezone-relay/environment").open("a") as settings:
        settings.write("# A new setting.\n")
    subprocess.run(("dpkg-deb", "-Znone", "--build", folder, debian.root / "root" / "newer.deb"), check=True)
    return "9.0+test"


def configure(debian: Debian, portal: ScriptedPortal) -> str:
    """Write the token and the settings, and return the settings."""
    path = debian.root / "etc/firezone-relay/environment"
    settings = f"FIREZONE_API_URL=wss://127.0.0.1:{portal.port}\nPUBLIC_IP4_ADDR={ADDRESS}\n"
    assert path.read_text().startswith("# ")
    path.write_text(settings)
    debian.run(f"echo {TOKEN} | install -m 0600 /dev/stdin /etc/firezone-relay/token")
    return settings


def main_process(debian: Debian) -> str:
    return debian.run("systemctl show --property MainPID --value firezone-relay").strip()


def is_another(debian: Debian, process: str) -> bool:
    return main_process(debian) != process


def check_reloads(debian: Debian, portal: ScriptedPortal) -> int:
    """Reload three times, kill the relay, and restart it: systemd follows the main process. Return the number of joins."""
    joined = 2
    for _ in range(3):
        before = main_process(debian)
        # The command returns when the successor relays; then systemd is told.
        debian.run("systemctl reload firezone-relay")
        joined += 1
        portal.wait_until_joined(joined)
        wait_until(functools.partial(is_another, debian, before))
    assert portal.presence.drops == 0
    assert debian.run("systemctl show --property NRestarts --value firezone-relay") == "0\n"
    debian.run(f"kill -9 {main_process(debian)}")
    portal.wait_until_joined(joined + 1)
    debian.run("systemctl restart firezone-relay")
    portal.wait_until_joined(joined + 2)
    assert debian.run("systemctl is-active firezone-relay") == "active\n"
    return joined + 2


def check_reloads_with_offload(debian: Debian, portal: ScriptedPortal, joined: int) -> None:
    """The successor has the capabilities of the unit, and replaces the XDP program."""
    drop_in = "/etc/systemd/system/firezone-relay.service.d"
    debian.run(
        f"install -D -m 0644 /usr/share/firezone-relay/deploy/firezone-relay-offload.conf {drop_in}/offload.conf && "
        "cp -p /etc/firezone-relay/environment /root/environment && "
        "echo EBPF_OFFLOADING=near >>/etc/firezone-relay/environment && "
        "systemctl daemon-reload && systemctl restart firezone-relay"
    )
    portal.wait_until_joined(joined := joined + 1)
    for _ in range(2):
        before = main_process(debian)
        debian.run("systemctl reload firezone-relay")
        portal.wait_until_joined(joined := joined + 1)
        wait_until(functools.partial(is_another, debian, before))
    log = debian.run("journalctl --output cat --unit firezone-relay")
    assert log.count("near goes on relaying in the kernel") == 2
    debian.run(f"rm -r {drop_in} && mv /root/environment /etc/firezone-relay/ && systemctl daemon-reload")


def test_the_package_carries_pages_rules_dashboard_units_and_completions(debian: Debian) -> None:
    debian.run(
        "cd /usr/share/firezone-relay && cat README.md docs/operations.md deploy/prometheus-rules.yml "
        "deploy/grafana-dashboard.json deploy/firezone-relay-offload.conf /usr/share/doc/firezone-relay/CHANGELOG.md"
    )
    debian.run("bash -c '. /usr/share/bash-completion/completions/firezone-relay && complete -p firezone-relay'")


def test_no_file_of_the_package_names_the_folder_of_its_build(debian: Debian) -> None:
    programs = debian.run("head -n 1 /opt/firezone-relay/bin/firezone-relay; cat /opt/firezone-relay/pyvenv.cfg")
    assert programs.startswith("#!/opt/firezone-relay/bin/python\n")
    assert debian.run("grep -rl /tmp/tmp /opt/firezone-relay --include=pyvenv.cfg --include='*.pyc' || true") == ""


def test_commands_of_root_add_no_bytecode_to_the_package(debian: Debian) -> None:
    """A removal would leave it."""
    before = debian.run("find /opt/firezone-relay | sort")
    debian.run("firezone-relay --help && firezone-relay probe --help && firezone-relay credentials --help")
    assert debian.run("find /opt/firezone-relay | sort") == before


def test_the_package_starts_is_upgraded_removed_and_purged(debian: Debian, portal: ScriptedPortal) -> None:
    newer = build_newer(debian)
    debian.boot()
    assert debian.fails("systemctl is-active firezone-relay"), "started before the operator asked for it"
    settings = configure(debian, portal)

    debian.run("systemctl enable --now firezone-relay")
    connection = portal.wait_until_joined()
    debian.run("firezone-relay healthcheck --ready")
    credential = portal.mint("client")
    debian.run(f"firezone-relay probe {ADDRESS} --username {credential.username} --password {credential.password}")
    users = debian.run(f"grep ^Uid: /proc/{main_process(debian)}/status")
    assert "0" not in users.split()
    assert debian.run("cat /proc/sys/net/ipv4/ip_local_reserved_ports") == "49152-65535\n"

    before = main_process(debian)
    debian.run("apt-get install --yes --option Dpkg::Options::=--force-confold /root/newer.deb")
    portal.wait_until_joined(2)
    connection.wait_until_closed()
    assert not connection.left, "clients of the portal were told of the upgrade"
    assert portal.presence.drops == 0
    assert main_process(debian) not in {before, "0"}
    assert debian.run("dpkg-query --show --showformat '${Version}' firezone-relay") == newer
    assert debian.run("cat /etc/firezone-relay/environment") == settings

    check_reloads_with_offload(debian, portal, check_reloads(debian, portal))

    debian.run("apt-get remove --yes firezone-relay")
    # Both restarts left, too.
    portal.wait_until_left(3)
    assert debian.run("bash -c 'ls -d /{opt,usr/bin,usr/lib/*,etc/systemd/system/*}/*firezone* 2>/dev/null' || true") == ""
    assert debian.run("cat /etc/firezone-relay/environment /etc/firezone-relay/token") == f"{settings}{TOKEN}\n"

    debian.run("apt-get purge --yes firezone-relay && rm -r /root/*")
    assert debian.run("find / -xdev -iname '*firezone*'; grep -ri firezone /etc || true") == ""
