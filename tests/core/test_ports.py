from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.addresses import RelayedPort
from relay.core.ports import PortPool


@given(
    st.integers(0, 100),
    st.integers(0, 30),
    st.lists(st.sampled_from(["draw", "draw even", "give back"]), max_size=80),
    st.integers(),
)
def test_a_port_is_either_free_or_taken(first: int, size: int, steps: list[str], seed: int) -> None:
    random = Random(seed)
    ports = set(range(first, first + size))
    pool = PortPool(ports)
    out: list[RelayedPort] = []
    for step in steps:
        inside = ports - set(out)
        if step == "give back":
            if out:
                pool.give_back(out.pop(random.randrange(len(out))))
            continue
        even = step == "draw even"
        candidates = {port for port in inside if port % 2 == 0} if even else inside
        port = pool.draw(random, even=even)
        if port is None:
            assert not candidates
        else:
            assert port in candidates
            out.append(port)
        assert len(pool) == len(ports) - len(out)
    rest = [pool.draw(random, even=False) for _ in range(len(pool))]
    assert {*rest, *out} == ports
    assert pool.draw(random, even=False) is None
    assert pool.draw(random, even=True) is None


@pytest.mark.parametrize("even", [True, False])
def test_all_ports_are_equally_likely(even: bool) -> None:  # noqa: FBT001
    random = Random(1)
    pool = PortPool(range(50000, 50010))
    drawn = dict.fromkeys(range(50000, 50010, 2 if even else 1), 0)
    for _ in range(1000 * len(drawn)):
        port = pool.draw(random, even=even)
        assert port is not None
        drawn[port] += 1
        pool.give_back(port)
    # Six standard deviations of a uniform draw are less than 190.
    assert all(abs(count - 1000) < 190 for count in drawn.values())


def test_the_same_seed_draws_the_same_ports() -> None:
    def draws(seed: int) -> list[int | None]:
        random, pool = Random(seed), PortPool(range(49152, 65536))
        return [pool.draw(random, even=False) for _ in range(20)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
