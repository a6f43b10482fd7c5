"""Relays with one mistake each: the simulation has to notice every one.

``python -m tests.simulation.mutants`` makes a copy of the tree for each mistake, runs seeds in it until one fails, and tells
which did; words choose mistakes by their names. All take half an hour. It ends with code 1 if a mistake goes unnoticed or
can't be made any more, since the code has changed; or if a seed fails without one.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SEEDS = "1-16"
UNNOTICED = "UNNOTICED"


class Mutant(NamedTuple):
    """A mistake."""

    name: str
    module: str
    right: str
    wrong: str

    @property
    def can_be_made(self) -> bool:
        """Whether the right text is where it was."""
        return self.right in self.path_in(ROOT).read_text(encoding="utf-8")

    def path_in(self, tree: Path) -> Path:
        return tree / "relay" / "core" / f"{self.module}.py"


MUTANTS = (
    Mutant("a channel has no cool-down", "allocations", "CHANNEL_COOL_DOWN = 300", "CHANNEL_COOL_DOWN = 0.001"),
    Mutant("a channel cools down for too long", "allocations", "CHANNEL_COOL_DOWN = 300", "CHANNEL_COOL_DOWN = 301"),
    Mutant("a channel lives for too long", "allocations", "CHANNEL_LIFETIME = 600", "CHANNEL_LIFETIME = 600.0005"),
    Mutant("a channel ends too early", "allocations", "CHANNEL_LIFETIME = 600", "CHANNEL_LIFETIME = 599.9995"),
    Mutant(
        "a channel is still relayed to the client when it cools down",
        "allocations",
        "            del self.live_peers[binding.allocation, binding.peer]\n",
        "",
    ),
    Mutant(
        "a refreshed channel does not live longer",
        "allocations",
        "        self.deadlines.set((allocation.id, number), until)\n",
        "        if len(self.deadlines) % 7:\n            self.deadlines.set((allocation.id, number), until)\n",
    ),
    Mutant(
        "a channel may be bound to a second peer",
        "allocations",
        "if binding is not allocation.peers.get(peer):",
        "if binding is None and allocation.peers.get(peer):",
    ),
    Mutant(
        "the kernel is not told of a channel's end",
        "allocations",
        "self._offload.append(RemoveChannel(binding.client, binding.number, allocation.port, binding.peer))\n",
        "pass\n",
    ),
    Mutant(
        "the kernel is told of a later end of a channel",
        "allocations",
        "binding.peer, min(until, end))",
        "binding.peer, min(until + 1, end))",
    ),
    Mutant(
        "the kernel is told of no end of an allocation",
        "allocations",
        "        end = self.deadlines[allocation.id, None]\n",
        "        end = until\n",
    ),
    Mutant(
        "the kernel is not told that an allocation lives longer",
        "allocations",
        "            self._install(allocation, allocation.channels[number], until)\n",
        "            pass\n",
    ),
    Mutant(
        "channels of a deleted family go on",
        "allocations",
        "            if family_of(binding.peer) is family:\n",
        "            if family_of(binding.peer) is family and family == 2:\n",
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
        "        self.deadlines.discard((allocation.id, binding.number))\n",
        "        pass\n",
    ),
    Mutant("a freed port is not given back", "lifecycle", "        self._ports.give_back(allocation.port)\n", ""),
    Mutant(
        "refused ports are not given back",
        "lifecycle",
        "        for port in allocation.refused_ports:\n            self._ports.give_back(port)\n",
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
        "keys of answered requests are kept", "lifecycle", "        self._keys.pop(allocation.id, None)\n", "        pass\n"
    ),
    Mutant(
        "a refresh does not extend",
        "requests",
        "        self._tables.extend(allocation, request.now + allocation.lifetime)\n",
        "",
    ),
    Mutant("a refresh grants too much", "requests", "MAX_LIFETIME = 3600", "MAX_LIFETIME = 5000"),
    Mutant("anyone may refresh", "requests", "if allocation.username != request.username and not deletes:", "if False:"),
    Mutant(
        "another user can't delete what is in the way", "requests", "request.username and not deletes:", "request.username:"
    ),
    Mutant(
        "anyone may bind channels",
        "requests",
        "        if allocation.username != request.username:\n",
        "        if False:\n",
    ),
    Mutant("peers are not judged", "requests", "self._config.peers.rule_against(peer)", "None"),
    Mutant(
        "a repeated Allocate is refused",
        "requests",
        "(existing.transaction_id, existing.username) !=",
        "(b'', existing.username) !=",
    ),
    Mutant("nonces are not checked", "authentication", "if not nonces.is_valid(nonce, client, now):", "if False:"),
    Mutant("nonces live a minute longer", "nonces", "NONCE_LIFETIME = 3600", "NONCE_LIFETIME = 3660"),
    Mutant("nonces are for every address", "nonces", 'b"%b %b %d" % (second, client[0].encode(), client[1])', "second"),
    Mutant(
        "credentials don't expire", "authentication", "claim is None or claim.username.is_expired(now.unix)", "claim is None"
    ),
    Mutant("MESSAGE-INTEGRITY is not checked", "authentication", "if message.integrity_holds(claim.key)", "if True"),
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
        "        if self._sequence % 50:\n            heapq.heappush(self._heap, entry)\n",
    ),
    Mutant(
        "time passes unseen between wake-ups",
        "server",
        "        if now.monotonic >= self._relaying.due_at:\n",
        "        if False:\n",
    ),
    Mutant(
        "a run goes on after something else",
        "relaying",
        "            self._complete(run, count)\n",
        "            self._complete(run, count - 1)\n",
    ),
    Mutant(
        "a train's last datagram is lost",
        "relaying",
        "        if rest:\n            frames +=",
        "        if rest and False:\n            frames +=",
    ),
    Mutant(
        "padding is relayed",
        "relaying",
        "        payload = data[CHANNEL_HEADER_LENGTH:end]\n        count",
        "        payload = data[CHANNEL_HEADER_LENGTH:]\n        count",
    ),
    Mutant(
        "packets to clients are not counted",
        "relaying",
        "        counters.to_client_bytes += ",
        "        counters.to_client_bytes += 0 * ",
    ),
    # Limits and families.
    Mutant(
        "answers to strangers come twice as often", "limiter", "round(_NANOSECONDS / rate)", "round(_NANOSECONDS / rate / 2)"
    ),
    Mutant("strangers get one more answer at once", "limiter", "(burst - 1) * self._cost", "burst * self._cost"),
    Mutant("answers are limited for each port", "limiter", "network_of(client).encode()", "repr(client).encode()"),
    Mutant("answers are limited for each IPv6 address", "limiter", "network_of(client).encode()", "client[0].encode()"),
    Mutant("one row of buckets is not drawn from", "limiter", "max(second[there], full_at)", "second[there]"),
    Mutant("Bindings are not limited", "server", "if self._may_answer(to, None, now):", "if True:"),
    Mutant("challenges are not limited", "server", "if not self._may_answer(to, code, now):", "if False:"),
    Mutant(
        "authenticated requests are limited",
        "server",
        "            username, key = checked\n",
        "            username, key = checked\n            if not self._may_answer(to, None, now):\n                return\n",
    ),
    Mutant("a flood is heard in full", "server", "STRANGERS if is_flood else math.inf", "math.inf"),
    Mutant(
        "clients are not heard in a flood",
        "server",
        "            if client not in self.allocations.by_client:\n",
        "            if True:\n",
    ),
    Mutant("what is withheld is not counted", "server", "self.counters.count_withheld(to.method, code)", "pass"),
    Mutant(
        "the family that is not served is not told of",
        "lifecycle",
        "        for family in allocation.missing_families:\n",
        "        for family in ():\n",
    ),
    Mutant(
        "a family that is not served gets 508",
        "requests",
        "RefusalError(ErrorCode.ADDRESS_FAMILY_NOT_SUPPORTED)",
        "RefusalError(ErrorCode.INSUFFICIENT_CAPACITY)",
    ),
    Mutant(
        "a channel may be bound to a peer of another family",
        "requests",
        "        if family_of(peer) not in allocation.families:\n",
        "        if False:\n",
    ),
    Mutant(
        "permissions are given for another family",
        "requests",
        "if not {family_of(peer) for peer in peers}.issubset(allocation.families):",
        "if False:",
    ),
    Mutant("permissions are given for anyone", "requests", "self._config.peers.rule_against_host(peer)", "None"),
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
    Mutant("a quota is answered with 508", "lifecycle", "if limit in _QUOTAS else", "if False else"),
    Mutant(
        "the port of who roams is not to be had",
        "lifecycle",
        "() if replaced is None else (replaced.port, *replaced.refused_ports)",
        "()",
    ),
    Mutant("the next port that is tried may be odd", "lifecycle", "even=allocation.even_port", "even=False"),
    Mutant("who drains allocates", "lifecycle", "        if self._draining:\n", "        if False:\n"),
    # Reports, time and answers.
    Mutant(
        "what is established is established again",
        "server",
        "found if found is not None and found.state is AllocationState.BINDING else None",
        "found",
    ),
    Mutant(
        "sockets that fail are not heard of",
        "server",
        "            self._lifecycle.free(failed, FreeReason.FAILED)\n",
        "            pass\n",
    ),
    Mutant(
        "nobody is told that the sockets failed before they were bound",
        "lifecycle",
        "reason in (FreeReason.REFUSED, FreeReason.FAILED)",
        "reason is FreeReason.REFUSED",
    ),
    Mutant(
        "what is still being bound may be refreshed",
        "requests",
        "(allocation.state is AllocationState.BINDING and not deletes)",
        "False",
    ),
    Mutant("a credential is good for one second more", "credentials", "self.expiry < unix", "self.expiry + 1 < unix"),
    Mutant("credentials expire by the other clock", "authentication", "now.unix", "(1_700_000_000 + now.monotonic)"),
    Mutant("an answer has no FINGERPRINT", "answers", "fingerprint=to.fingerprint", "fingerprint=False"),
    Mutant(
        "an answer without a nonce is not signed",
        "server",
        "to if claim is None else to._replace(key=claim.key)",
        "to",
    ),
    Mutant(
        "the wake-up is not set after a request",
        "server",
        "            self._handle_stun(data, client, now)\n            self._set_wake_up()\n",
        "            self._handle_stun(data, client, now)\n",
    ),
    Mutant(
        "what an ended channel relayed is forgotten",
        "allocations",
        "        allocation.to_peer_bytes += binding.to_peer_bytes\n",
        "",
    ),
    Mutant(
        "the traffic class is lost",
        "relaying",
        "return frames, binding.client, CHANNEL_HEADER_LENGTH + length, traffic_class",
        "return frames, binding.client, CHANNEL_HEADER_LENGTH + length, 0",
    ),
    Mutant(
        "packets of another class continue a run",
        "relaying",
        "run is None or run.traffic_class != traffic_class or",
        "run is None or",
    ),
)


def main() -> int:
    """Try them all; give the exit code."""
    chosen = [mutant for mutant in MUTANTS if not sys.argv[1:] or any(word in mutant.name for word in sys.argv[1:])]
    if (flaw := run(Mutant("none", "server", "", ""))) != UNNOTICED:
        print(f"without any mistake: {flaw}")
        return 1
    missed = 0
    for mutant in chosen:
        outcome = run(mutant)
        missed += not outcome.startswith("noticed")
        print(f"{mutant.name}: {outcome}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} noticed")
    return 1 if missed else 0


def run(mutant: Mutant) -> str:
    """Tell what came of a mistake."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("relay", "tests"):
            shutil.copytree(ROOT / part, Path(folder) / part, ignore=shutil.ignore_patterns("__pycache__", "corpus"))
        path = mutant.path_in(Path(folder))
        text = path.read_text(encoding="utf-8")
        if not mutant.can_be_made:
            return "NOT MADE: the code has changed"
        path.write_text(text.replace(mutant.right, mutant.wrong), encoding="utf-8")
        command = [sys.executable, "-m", "tests.simulation", SEEDS, "--as-is"]
        environment = {**os.environ, "PYTHONPATH": folder}
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    said = ran.stdout.splitlines()
    why = next((line.partition("BROKEN")[2].strip() for line in said if "BROKEN" in line), ran.stderr[-200:])
    seed = next((line.split()[1] for line in said if line.startswith("seed ")), "?")
    return f"noticed by seed {seed}: {why[:140]}" if ran.returncode else UNNOTICED


if __name__ == "__main__":
    sys.exit(main())
