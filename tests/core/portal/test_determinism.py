"""The same inputs with the same seed give the same commands at the same times."""

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from relay.core.portal.commands import PortalCommand
from tests.support.portal_channel import INIT, TOKEN_EXPIRED, UNMATCHED_TOPIC, Driver, reply, write

INPUTS: dict[str, Callable[[Driver], list[PortalCommand]]] = {
    "connected": lambda driver: driver.report_connected(),
    "joined": lambda driver: driver.receive(reply(0)),
    "refused": lambda driver: driver.report_refused(503, "3"),
    "lost": lambda driver: driver.report_lost(),
    "init": lambda driver: driver.receive(INIT),
    "unmatched": lambda driver: driver.receive(UNMATCHED_TOPIC),
    "close": lambda driver: driver.receive(write("relay", "phx_close")),
    "nonsense": lambda driver: driver.receive("{"),
    "binary": lambda driver: driver.receive_other("binary"),
    "leave": lambda driver: driver.leave(),
    "expired": lambda driver: driver.receive(TOKEN_EXPIRED),
}
steps = st.lists(
    st.sampled_from(["connected", "joined", "init", "lost"] * 3 + list(INPUTS)) | st.integers(0, 160).map(lambda n: n / 4),
    max_size=40,
)


def take(driver: Driver, step: str | float) -> list[PortalCommand]:
    return INPUTS[step](driver) if isinstance(step, str) else driver.pass_time(step)


@given(steps, st.integers(0, 2**32))
def test_the_same_inputs_and_seed_give_the_same_commands(given_steps: list[str | float], seed: int) -> None:
    one, other = Driver(seed=seed).join(), Driver(seed=seed).join()
    # Interleaved, to detect shared state.
    for step in given_steps:
        assert take(one, step) == take(other, step)
        assert one.channel.poll_timeout() == other.channel.poll_timeout()
    assert one.log == other.log


def test_another_seed_gives_different_times() -> None:
    one, other = Driver(seed=1).join(), Driver(seed=2).join()
    one.report_lost()
    other.report_lost()
    assert one.channel.poll_timeout() != other.channel.poll_timeout()
