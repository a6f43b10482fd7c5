"""Why a client could not connect: asked after the fact, with the default log filter, like an operator."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.core.attributes import REQUESTED_TRANSPORT
from relay.core.credentials import Credential, RelaySecret, mint
from relay.core.stun import Method
from tests.interop.test_kick import control_of
from tests.support.process import run
from tests.support.program import Program, ProgramStarter
from tests.support.turn_client import UDP, TurnClient, code_of

SECRET = "0123456789abcdef" * 2
FIRST_STEP = "allocate: 401 no_credentials: normal first step: the response has a nonce"
HOST = "127.0.0.77"

Connect = Callable[..., TurnClient]


def credential(salt: str, *, valid_for: int = 600, secret: str = SECRET) -> Credential:
    return mint(RelaySecret(secret), int(time.time()) + valid_for, salt)


def explained(program: Program, address: str) -> list[str]:
    """Return the lines about a client, without times."""
    done = run("explain", address, "--control-endpoint", control_of(program))
    assert (done.returncode, done.stderr) == (0, "")
    return [re.sub(r"\d+s ago", "AGO", line).strip() for line in done.stdout.splitlines()]


@pytest.fixture
def full(start_program: ProgramStarter, tmp_path: Path) -> Program:
    """A relay with a port for one allocation, which allows no peer on loopback."""
    (tmp_path / "secret").write_text(SECRET)
    one_port = ("--lowest-port", "49999", "--highest-port", "49999", "--max-allocations", "1")
    return start_program("--relay-secret-file", str(tmp_path / "secret"), *one_port)


def attempt(program: Program, login: Credential, host: str = HOST) -> int | None:
    """Try to allocate, and return the error code."""
    with TurnClient((program.host, 3478), login, host) as client:
        return code_of(client.request(Method.ALLOCATE, (REQUESTED_TRANSPORT, UDP)))


def test_a_credential_of_another_relay_is_explained(full: Program) -> None:
    assert attempt(full, credential("a", secret="another" * 6)) == 401
    _, *lines = explained(full, HOST)
    assert lines[0] == f"AGO: {FIRST_STEP}"
    assert lines[1].startswith("AGO: allocate: 401 wrong_password: wrong password: the credential is for another relay")
    assert len(lines) == 2


def test_an_expired_credential_is_explained_with_its_expiry(full: Program) -> None:
    assert attempt(full, credential("a", valid_for=-60)) == 401
    last = explained(full, HOST)[-1]
    assert re.fullmatch(
        r"AGO: allocate: 401 credential_expired: the credential expired at 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC: .*", last
    )


def test_a_full_relay_is_explained_and_shows_who_has_an_allocation(full: Program) -> None:
    with TurnClient((full.host, 3478), credential("first"), "127.0.0.78") as first:
        first.allocate()
        assert attempt(full, credential("second")) == 508
        assert explained(full, HOST)[-1] == "AGO: allocate: 508 ports: no port is free: --lowest-port, --highest-port"
        allocation, heading, *lines = explained(full, "127.0.0.78/32")
        assert allocation.startswith("127.0.0.78:")
        assert allocation.endswith(" with 0 channels, dropped datagrams: none")
        assert heading == f"127.0.0.78:{first.address[1]} requested:"
        assert lines == [f"AGO: {FIRST_STEP}", "AGO: allocate: success"]


def test_a_denied_peer_is_explained_with_the_rule(full: Program) -> None:
    with TurnClient((full.host, 3478), credential("a"), HOST) as client:
        client.allocate()
        for _ in range(3):
            assert client.bind_channel(0x4000, ("127.0.0.9", 53)) == 403
    line = explained(full, "127.0.0.64/27")[-1]
    assert line.startswith("AGO, 3 times: channel_bind: 403 never_a_peer: 127.0.0.9:53 is loopback")


def test_a_quota_and_a_lost_allocation_are_explained(start_program: ProgramStarter) -> None:
    program = start_program("--max-allocations-per-address", "1")
    with TurnClient((program.host, 3478), program.credential, HOST) as client:
        client.allocate()
        with TurnClient((program.host, 3478), program.credential, HOST) as twin:
            # The same user roams.
            twin.allocate()
            assert client.refresh(600) == 437
    assert any("refresh: 437 allocation_mismatch: " in line for line in explained(program, HOST))


def test_a_client_that_sends_nothing_is_told_apart(full: Program) -> None:
    assert explained(full, "203.0.113.9") == [
        "no request of 203.0.113.9/32 was refused in the last " + explained(full, "203.0.113.9")[0].rpartition(" ")[2],
        "Either its requests do not arrive (check its address, its network and the firewall), or all succeeded.",
    ]


def test_no_explanation_has_a_secret(full: Program) -> None:
    login = credential("a-salt-nobody-else-has", secret="another" * 6)
    assert attempt(full, login) == 401
    shown = "\n".join(explained(full, HOST))
    for secret in (login.username, login.password, "a-salt-nobody-else-has", SECRET):
        assert secret not in shown


def test_an_invalid_address_is_a_usage_error(full: Program) -> None:
    done = run("explain", "client.example", "--control-endpoint", control_of(full))
    assert done.returncode == 2
    assert "'client.example' is not an address or a network: use 203.0.113.5 or 203.0.113.0/24" in done.stderr


def test_a_missing_relay_is_one_line_and_exit_code_1() -> None:
    done = run("explain", HOST, "--control-endpoint", "127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.startswith("firezone-relay: no answer from 127.0.0.1:9: connection refused")
