"""End an allocation of a running relay by the command, like an operator."""

import json
import re
import urllib.request

from tests.support.process import run
from tests.support.program import Program
from tests.support.turn_client import TurnClient


def control_of(program: Program) -> str:
    """Return the control address, which has the relay's own port."""
    (found,) = re.findall(r" control=(\S+)", program.log)[:1]
    return str(found)


def test_a_kicked_client_gets_437_and_allocates_again(program: Program) -> None:
    at = ("--control-endpoint", control_of(program))
    with TurnClient((program.host, 3478), program.credential, "127.0.0.1") as client:
        client.allocate()
        with urllib.request.urlopen(f"http://{at[1]}/status?client=127.0.0.1", timeout=30) as answer:
            (row,) = json.load(answer)["allocations"]
        done = run("kick", str(row["id"]), *at)
        assert (done.returncode, done.stdout) == (0, f"allocation {row['id']} has ended\n")
        assert client.refresh(600) == 437
        client.allocate()
    assert re.search(rf"allocation freed +allocation={row['id']} .*reason=kicked", program.log)
    done = run("kick", str(row["id"]), *at)
    assert done.returncode == 1
    assert done.stderr == (
        f"firezone-relay: HTTP status 404 (there is no allocation {row['id']}: it has ended, or never existed)\n"
    )


def test_the_id_of_an_allocation_is_a_number(program: Program) -> None:
    done = run("kick", "x", "--control-endpoint", control_of(program))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
