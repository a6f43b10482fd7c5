"""Mutation tests: the simulation has to detect each mutant of the relay.

``python -m tests.simulation.mutants`` copies the relay for each mutant, runs worlds until a world fails, and prints the
world. Words select mutants by name. A full run takes some minutes. The exit code is 1 if a mutant is not detected, if its
original code no longer exists, or if a world fails without a mutation.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
WORLDS = "9/20,11/20,5/20,6/20,3/20,8/20,10/20,2/20,7,8,10"
"""Worlds with the most detected mutants per second first."""
UNNOTICED = "UNNOTICED"


class Mutant(NamedTuple):
    """A wrong change of the code."""

    name: str
    module: str
    right: str
    wrong: str
    test: str = ""
    """The test that detects the mutant, if no world does."""

    @property
    def can_be_made(self) -> bool:
        """Whether the module still contains the original text."""
        return self.right in self.path_in(ROOT).read_text(encoding="utf-8")

    def path_in(self, tree: Path) -> Path:
        return tree / "relay" / "core" / f"{self.module}.py"


MUTANTS = (
    Mutant("a channel has no cool-down", "allocation", "CHANNEL_GRACE_PERIOD = 300", "CHANNEL_GRACE_PERIOD = 0.001"),
    Mutant("a channel cools down for too long", "allocation", "CHANNEL_GRACE_PERIOD = 300", "CHANNEL_GRACE_PERIOD = 301"),
    Mutant("a channel lives for too long", "allocation", "CHANNEL_LIFETIME = 600", "CHANNEL_LIFETIME = 600.0005"),
    Mutant("a channel ends too early", "allocation", "CHANNEL_LIFETIME = 600", "CHANNEL_LIFETIME = 599.9995"),
    Mutant(
        "a channel is still relayed to the client when it cools down",
        "allocations",
        "del allocation.live[number], allocation.live_peers[peer]\n",
        "del allocation.live[number]\n",
    ),
    Mutant(
        "data for a client of this relay leaves the machine",
        "config",
        "return address[1] in self.ports and",
        "return False and",
    ),
    Mutant("data inside comes from another port", "data", "self._by_id[allocation].port, *peer[2:])", "peer[1], *peer[2:])"),
    Mutant(
        "data inside reaches clients without a channel to the sender",
        "data",
        "binding = self._live_peers.get(allocation, _NONE).get(peer)\n",
        "binding = next(iter(self._live_peers.get(allocation, _NONE).values()), None)\n",
    ),
    Mutant(
        "a refreshed channel does not live longer",
        "allocations",
        "binding.live, binding.until = True, now + CHANNEL_LIFETIME\n",
        "binding.live, binding.until = True, binding.until or now + CHANNEL_LIFETIME\n",
    ),
    Mutant(
        "a channel may be bound to a second peer",
        "requests",
        "        if before is not of_peer:\n",
        "        if before is None and of_peer:\n",
    ),
    Mutant(
        "the kernel is not told of a channel's end",
        "allocations",
        "            self._offload.append(RemoveChannel(",
        "            [].append(RemoveChannel(",
    ),
    Mutant(
        "the kernel is told of a later end of a channel",
        "allocations",
        "        until = min(binding.until, allocation.ends)\n",
        "        until = min(binding.until + 1, allocation.ends)\n",
    ),
    Mutant(
        "the kernel is told of no end of an allocation",
        "allocations",
        "        until = min(binding.until, allocation.ends)\n",
        "        until = binding.until\n",
    ),
    Mutant(
        "the kernel is not told that an allocation lives longer",
        "allocations",
        "        if allocation.cut_short:\n",
        "        if False:\n",
    ),
    Mutant(
        "channels of a deleted family go on",
        "allocations",
        "if family_of(each.peer) is family]",
        "if family_of(each.peer) is family == 2]",
    ),
    Mutant(
        "a username is kept in its table",
        "allocations",
        "        del self.by_username[allocation.username]\n",
        "        pass\n",
    ),
    Mutant(
        "deadlines of freed channels are kept",
        "allocations",
        "        self.deadlines.discard(allocation.id)\n",
        "        pass\n",
    ),
    Mutant(
        "a freed port is not given back",
        "lifecycle",
        "            self.ports.give_back(*self._held_ports.pop(client))\n",
        "            self._held_ports.pop(client)\n",
    ),
    Mutant(
        "refused ports are not given back",
        "lifecycle",
        "        self.ports.give_back(*allocation.refused_ports)\n",
        "",
    ),
    Mutant(
        "a port is given out twice",
        "ports",
        "        return ports.pop()",
        "        return ports.pop() if count % 5 else ports[-1]",
    ),
    Mutant(
        "a roaming client's old allocation stays",
        "lifecycle",
        "        if replaced is not None:\n            self.free",
        "        if False:\n            self.free",
    ),
    Mutant("sockets are waited for too long", "lifecycle", "BIND_TIMEOUT = 5", "BIND_TIMEOUT = 6"),
    Mutant("the quota is one more", "lifecycle", ">= self._config.max_allocations:", "> self._config.max_allocations:"),
    Mutant(
        "nobody is told that it has drained",
        "lifecycle",
        "            self._commands.append(Drained())\n",
        "            pass\n",
    ),
    Mutant(
        "a refresh does not extend",
        "requests",
        "        self._tables.extend(allocation, context.now + allocation.lifetime)\n",
        "",
    ),
    Mutant("a refresh grants too much", "requests", "MAX_LIFETIME = 3600", "MAX_LIFETIME = 5000"),
    Mutant(
        "anyone may refresh and bind channels",
        "requests",
        "if allocation.username != context.username and not deletes:",
        "if False:",
    ),
    Mutant(
        "another user can't delete what is in the way", "requests", "context.username and not deletes:", "context.username:"
    ),
    Mutant(
        "peers are not judged",
        "requests",
        "        if rule is not None:\n",
        "        if rule is not None and port is None:\n",
    ),
    Mutant(
        "channels to an address of this machine go on",
        "requests",
        "        arrived = addresses - self._peers.relay_addresses\n",
        "        arrived = frozenset[str]()\n",
    ),
    Mutant(
        "thousands of channels to an address of this machine go on",
        "requests",
        "            if left <= 0:\n                return\n        self._arrived",
        "            if left <= 0:\n                break\n        self._arrived",
        test="tests/core/test_own_addresses.py::test_thousands_of_channels_end_in_portions_and_none_is_granted_meanwhile",
    ),
    Mutant(
        "a repeated Allocate is refused",
        "requests",
        "(existing.transaction_id, existing.username) !=",
        "(b'', existing.username) !=",
    ),
    Mutant(
        "nonces are not checked",
        "authentication",
        "    if outcome is not NonceOutcome.OURS:\n",
        "    if False:\n",
    ),
    Mutant("nonces live a minute longer", "nonces", "NONCE_LIFETIME = 3600", "NONCE_LIFETIME = 3660"),
    Mutant("nonces are for every address", "nonces", 'b"%b %b %d" % (second, client[0].encode(), client[1])', "second"),
    Mutant("credentials don't expire", "authentication", "if user.username.is_expired(now.unix):", "if False:"),
    Mutant("MESSAGE-INTEGRITY is not checked", "authentication", "if not message.integrity_holds(user.key):", "if False:"),
    Mutant(
        "what ends at a moment does not end at it",
        "deadlines",
        "while self._heap and self._heap[0][0] <= now",
        "while self._heap and self._heap[0][0] < now",
    ),
    Mutant(
        "a deadline is forgotten when it moves",
        "deadlines",
        "        heapq.heappush(self._heap, entry)\n",
        "        if self.sequence % 50:\n            heapq.heappush(self._heap, entry)\n",
    ),
    Mutant(
        "time passes unseen between wake-ups",
        "data",
        "        if now >= self._deadlines.earliest:\n",
        "        if False:\n",
    ),
    Mutant(
        "the payloads of a train are cut one byte short",
        "data",
        "last_length = _unpack(data, last)[1]",
        "last_length = _unpack(data, last)[1] - 1",
    ),
    Mutant(
        "a train's last datagram is lost", "data", "(whole, _pack(binding.number, last_length), data[last:])", "(whole,)"
    ),
    Mutant(
        "padding is relayed",
        "data",
        "payload = data[CHANNEL_HEADER_LENGTH : CHANNEL_HEADER_LENGTH + length]",
        "payload = data[CHANNEL_HEADER_LENGTH:]",
    ),
    Mutant(
        "packets to clients are not counted",
        "data",
        "        counters.to_client_bytes += ",
        "        counters.to_client_bytes += 0 * ",
    ),
    # What is over, and turns.
    Mutant(
        "a repeated Allocate is handled again",
        "requests",
        "        if message.integrity in self.replays:\n",
        "        if False:\n",
    ),
    Mutant("an old nonce does not prove an address", "requests", "error.reason is Reason.OLD_NONCE", "False"),
    Mutant(
        "a client floods with requests",
        "server",
        "(CLIENT_REQUESTS, client) if is_known",
        "(1 << 30, client) if is_known",
        test="tests/core/test_flood.py::test_a_client_has_few_requests_in_a_flood",
    ),
    Mutant(
        "what is late is relayed",
        "lifecycle",
        "            if each is not None and each.live and each.until <= now:\n",
        "            if False:\n",
        test="tests/core/test_turns.py::test_expired_channels_relay_nothing_while_others_wait_for_their_end",
    ),
    Mutant(
        "a port is given out while the kernel has its channels",
        "lifecycle",
        "if not self._tables.is_in_kernel(each)",
        "if True",
        test="tests/core/test_turns.py::test_the_kernel_removes_a_large_allocation_in_portions_and_its_port_stays_taken",
    ),
    # Limits and families.
    Mutant(
        "answers to strangers come twice as often", "limiter", "round(_NANOSECONDS / rate)", "round(_NANOSECONDS / rate / 2)"
    ),
    Mutant("strangers get one more answer at once", "limiter", "(burst - 1) * self._cost", "burst * self._cost"),
    Mutant("answers are limited for each port", "limiter", "network_of(client).encode()", "repr(client).encode()"),
    Mutant("answers are limited for each IPv6 address", "limiter", "network_of(client).encode()", "client[0].encode()"),
    Mutant("one row of buckets is not drawn from", "limiter", "max(second[there], full_at)", "second[there]"),
    Mutant(
        "Bindings are not limited",
        "requests",
        "        if limiter is not None and not",
        "        if error is not None and limiter is not None and not",
    ),
    Mutant(
        "challenges are not limited",
        "requests",
        "        if limiter is not None and not",
        "        if error is None and limiter is not None and not",
    ),
    Mutant(
        "authenticated requests are limited",
        "requests",
        "        if user is None:\n",
        "        if user is None or (self._limiter is not None and not self._limiter.allows(client, now.monotonic)):\n",
    ),
    Mutant(
        "a flood is heard in full",
        "server",
        "if is_known else (UNAUTHENTICATED_REQUESTS, None)",
        "if is_known else (1 << 30, None)",
    ),
    Mutant(
        "clients are not heard in a flood",
        "server",
        "            is_known = client in self.allocations.by_client\n",
        "            is_known = False\n",
    ),
    Mutant(
        "what is withheld is not counted",
        "requests",
        "self._counters.withheld[method, code] += 1",
        "pass",
    ),
    Mutant(
        "the family that is not served is not told of",
        "lifecycle",
        "        for family in allocation.missing_families:\n",
        "        for family in ():\n",
    ),
    Mutant(
        "a family that is not served gets 508",
        "requests",
        "RequestError(ErrorCode.ADDRESS_FAMILY_NOT_SUPPORTED)",
        "RequestError(ErrorCode.INSUFFICIENT_CAPACITY)",
    ),
    Mutant(
        "a channel may be bound to a peer of another family",
        "requests",
        "        if address[0] not in allocation.families:\n",
        "        if False:\n",
    ),
    Mutant(
        "permissions are given for another family",
        "requests",
        "if not {family for family, _, _ in peers}.issubset(allocation.families):",
        "if False:",
    ),
    Mutant(
        "permissions are given for anyone",
        "requests",
        "        if rule is not None:\n",
        "        if rule is not None and port is not None:\n",
    ),
    Mutant(
        "a family that an allocation has not is deleted",
        "requests",
        "if family is not None and family not in allocation.families:",
        "if False:",
    ),
    Mutant("there is one channel more", "requests", ">= self._config.max_channels", "> self._config.max_channels"),
    Mutant("an address has one allocation more", "lifecycle", ">= most:", "> most:"),
    Mutant(
        "an address has what its allocations had",
        "allocations",
        "            del self.by_network[network]\n",
        "            self.by_network[network] = 1\n",
    ),
    Mutant(
        "who roams within an address finds no room",
        "lifecycle",
        "makes_room = replaced is not None and",
        "makes_room = False and",
    ),
    Mutant(
        "who roams finds no room",
        "lifecycle",
        "len(self._tables.by_id) - (replaced is not None)",
        "len(self._tables.by_id)",
    ),
    Mutant("a quota is answered with 508", "responses", "if limit in _QUOTAS else", "if False else"),
    Mutant(
        "the port of who roams is not to be had",
        "lifecycle",
        "if replaced is not None and is_freed_at_once else ()",
        "if False else ()",
    ),
    Mutant(
        "the next port that is tried may be odd",
        "lifecycle",
        "even=allocation.even_port",
        "even=False",
        "tests/core/test_allocate.py::test_an_even_port_in_use_is_replaced_by_another_even_port",
    ),
    Mutant("who drains allocates", "lifecycle", "        if self._draining:\n", "        if False:\n"),
    Mutant(
        "a cancelled drain goes on",
        "lifecycle",
        'do nothing."""\n        self._draining = False\n',
        'do nothing."""\n',
        "tests/core/test_drain.py::test_after_a_cancelled_drain_clients_allocate_again",
    ),
    # Reports, time and responses.
    Mutant(
        "what is established is established again",
        "server",
        "found if found is not None and found.state is AllocationState.BINDING else None",
        "found",
    ),
    Mutant(
        "sockets that fail are not heard of",
        "server",
        "            self._lifecycle.free(ended, reason)\n",
        "            pass\n",
    ),
    Mutant(
        "nobody is told that the sockets failed before they were bound",
        "lifecycle",
        "reason in (FreeReason.REFUSED, FreeReason.FAILED, FreeReason.KICKED)",
        "reason is FreeReason.REFUSED",
        test="tests/core/test_allocate.py::test_an_allocation_that_ends_while_its_sockets_are_bound_gets_508",
    ),
    Mutant(
        "what is still being bound may be refreshed",
        "requests",
        "(allocation.state is AllocationState.BINDING and not deletes)",
        "False",
        test="tests/core/test_allocate.py::test_an_allocation_is_in_the_tables_while_its_sockets_are_bound",
    ),
    Mutant("a credential is good for one second more", "credentials", "self.expiry < unix", "self.expiry + 1 < unix"),
    Mutant("credentials expire by the other clock", "authentication", "now.unix", "(1_700_000_000 + now.monotonic)"),
    Mutant("an answer has no FINGERPRINT", "responses", "fingerprint=context.fingerprint", "fingerprint=False"),
    Mutant(
        "an answer without a nonce is not signed",
        "requests",
        "None if user is None else user.key",
        "None",
    ),
    Mutant(
        "what an ended channel relayed is forgotten",
        "allocations",
        "        allocation.to_peer_bytes += binding.to_peer_bytes\n",
        "",
    ),
    Mutant(
        "the traffic class is lost",
        "data",
        "return _make(SendToClient, (frames, binding.client, segment_size, traffic_class))",
        "return _make(SendToClient, (frames, binding.client, segment_size, 0))",
    ),
    Mutant(
        "datagrams of another traffic class join a batch",
        "../net/grouping",
        "            and traffic_class == group[3]\n",
        "",
        test="tests/core/test_trains.py::test_a_batch_from_clients_equals_its_datagrams_one_by_one",
    ),
    Mutant(
        "early data waits for too long",
        "overload",
        "EARLY_AGE: Final = 1.0",
        "EARLY_AGE: Final = 1.001",
        test="tests/core/test_early.py::test_data_is_relayed_until_its_age_is_reached",
    ),
    Mutant(
        "early data is lost when its channel is bound",
        "early",
        "            self._relay(each, now)\n",
        "            pass\n",
    ),
    Mutant("early data is relayed in reverse", "early", "in channel.datagrams:", "in reversed(channel.datagrams):"),
    Mutant(
        "early data is relayed again when its channel is refreshed",
        "early",
        "channel = self._remove((allocation, number))",
        "channel = self._channels[allocation, number]",
    ),
    Mutant(
        "early data has no limit",
        "early",
        "if self._sizes.get(allocation.id, 0) >= room:",
        "if False:",
        test="tests/core/test_early.py::test_a_client_at_its_limit_keeps_its_first_data",
    ),
    Mutant(
        "a few clients use up the room for early data",
        "early",
        "(EARLY_BYTES - self._size) // EARLY_SHARE",
        "EARLY_BYTES - self._size",
        test="tests/core/test_early.py::test_clients_that_flood_have_equal_shares_and_leave_one_to_the_next_client",
    ),
    Mutant(
        "early data is held for a client without a response to its Allocate",
        "early",
        " or allocation.state is AllocationState.BINDING",
        "",
        test="tests/core/test_early.py::test_data_of_a_client_without_an_allocation_is_not_held",
    ),
    Mutant("the channels of a batch are not told apart", "data", "not _is_uniform(data, segment_size, count)", "False"),
)


def main() -> int:
    """Test all selected mutants, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.mutants", description=__doc__)
    parser.add_argument("words", nargs="*", help="words of mutant names; all by default")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="number of parallel runs")
    options = parser.parse_args()
    mutants = [each for each in MUTANTS if not options.words or any(word in each.name for word in options.words)]
    missed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        # The run without a mutation takes longest.
        without = pool.submit(run, Mutant("none", "server", "", ""))
        for mutant, outcome in zip(mutants, pool.map(run, mutants), strict=True):
            missed += not outcome.startswith("noticed")
            print(f"{mutant.name}: {outcome}", flush=True)
        if (flaw := without.result()) != UNNOTICED:
            print(f"without any mistake: {flaw}")
            return 1
    print(f"{len(mutants) - missed} of {len(mutants)} noticed")
    return 1 if missed else 0


def run(mutant: Mutant) -> str:
    """Return the outcome of a mutant."""
    if not mutant.can_be_made:
        return "NOT MADE: the code has changed"
    with tempfile.TemporaryDirectory() as folder:
        # The copy includes compiled files, so only the changed module is compiled.
        shutil.copytree(ROOT / "relay", Path(folder) / "relay")
        (Path(folder) / "tests").symlink_to(ROOT / "tests")
        path = mutant.path_in(Path(folder))
        path.write_text(path.read_text(encoding="utf-8").replace(mutant.right, mutant.wrong), encoding="utf-8")
        if mutant.test:
            ran = _run_in(folder, "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", mutant.test)
            # 1: tests failed. Other codes: no test ran, or all passed.
            return f"noticed by {mutant.test}" if ran.returncode == 1 else f"{UNNOTICED}: pytest ended with {ran.returncode}"
        ran = _run_in(folder, "tests.simulation", WORLDS, "--as-is")
    said = ran.stdout.splitlines()
    why = next((line.partition("BROKEN")[2].strip() for line in said if "BROKEN" in line), ran.stderr[-200:])
    command = next((line.strip() for line in said if line.strip().startswith("make simulate")), "?")
    return f"noticed by {command}: {why[:140]}" if ran.returncode else UNNOTICED


def _run_in(folder: str, module: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "PYTHONPATH": folder}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
