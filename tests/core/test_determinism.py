"""The same inputs with the same seed give the same bytes at the same times."""

from hypothesis import given
from hypothesis import strategies as st

from relay.core.addresses import AllocationId
from relay.core.attributes import ADDITIONAL_ADDRESS_FAMILY, CHANNEL_NUMBER, LIFETIME, XOR_PEER_ADDRESS
from relay.core.commands import BindPort, Command
from relay.core.lifecycle import BindRefusal
from relay.core.stun import Method
from tests.support.core import (
    CHANNEL,
    CLIENT,
    CLIENT6,
    OTHER_CLIENT,
    PEER,
    UDP,
    AttributeValue,
    Client,
    channel_data,
    of_kind,
    relay_with,
)

REQUESTS: dict[str, tuple[Method, list[AttributeValue]]] = {
    "allocate": (Method.ALLOCATE, [UDP]),
    "allocate dual": (Method.ALLOCATE, [UDP, (ADDITIONAL_ADDRESS_FAMILY, 2)]),
    "refresh": (Method.REFRESH, [(LIFETIME, 700)]),
    "delete": (Method.REFRESH, [(LIFETIME, 0)]),
    "permission": (Method.CREATE_PERMISSION, [(XOR_PEER_ADDRESS, PEER)]),
    "channel": (Method.CHANNEL_BIND, [(CHANNEL_NUMBER, CHANNEL), (XOR_PEER_ADDRESS, PEER)]),
}
OTHERS = ["garbage", "cut", "data", "bound", "port", "machine", "failed", "peer", "time", "wake"]
inputs = st.lists(
    st.tuples(st.sampled_from([*REQUESTS, *OTHERS]), st.integers(0, 2), st.binary(max_size=30)), min_size=1, max_size=40
)


class Run:
    """A relay with a record of its outputs."""

    def __init__(self, seed: int) -> None:
        self.relay = relay_with(seed=seed, ports=range(50000, 50004))
        addresses = (CLIENT, OTHER_CLIENT, CLIENT6)
        self.clients = [Client(self.relay, address, salt=str(n)) for n, address in enumerate(addresses)]
        for client in self.clients:
            client.take_nonce()
        self.id = AllocationId(1)
        self.out: list[tuple[list[Command], float | None]] = []

    def give(self, kind: str, who: int, noise: bytes) -> None:
        if kind == "time":
            self.relay.pass_time(len(noise) * 31.25)
            return
        commands = self.outcome(kind, self.clients[who], noise)
        self.id = next((bind.allocation for bind in of_kind(BindPort, commands)), self.id)
        self.out.append((commands, self.relay.server.poll_timeout()))

    def outcome(self, kind: str, client: Client, noise: bytes) -> list[Command]:
        if kind in REQUESTS:
            method, attributes = REQUESTS[kind]
            return client.send(client.write(method, *attributes, fingerprint=len(noise) > 3))
        match kind:
            case "garbage":
                return client.send(noise)
            case "cut":
                return client.send(client.write(Method.ALLOCATE, UDP)[: 4 * len(noise)])
            case "data":
                return client.send(channel_data(CHANNEL, noise))
            case "peer":
                return self.relay.receive_from_peer(self.id, noise, PEER)
            case _:
                return self.report(kind)

    def report(self, kind: str) -> list[Command]:
        match kind:
            case "bound":
                return self.relay.report_bound(self.id)
            case "failed":
                return self.relay.report_failed(self.id)
            case "wake":
                return self.relay.wake()
            case _:
                return self.relay.report_refused(self.id, BindRefusal(kind))


@given(inputs, st.integers(0, 2**32))
def test_the_same_inputs_and_seed_give_the_same_outputs(given_inputs: list[tuple[str, int, bytes]], seed: int) -> None:
    runs = Run(seed), Run(seed)
    # Interleaved, to detect shared state.
    for each in given_inputs:
        for run in runs:
            run.give(*each)
    assert runs[0].out == runs[1].out
    assert runs[0].relay.counters == runs[1].relay.counters
    assert runs[0].relay.server.allocations.by_id == runs[1].relay.server.allocations.by_id


def test_another_seed_gives_different_nonces_and_ports() -> None:
    one, other = Run(1), Run(2)
    assert one.clients[0].nonce != other.clients[0].nonce
    ports = [[client.allocate().port for client in run.clients] for run in (one, other)]
    assert ports[0] != ports[1]
