"""Rate limits of new connections, in total and per source."""

from relay.ops.http.connections import REJECT_COST, AcceptLimiter, Limits

LOOPBACK = ("127.0.0.1", 40000)


def source(number: int) -> tuple[str, int]:
    return (f"198.51.{number // 250}.{number % 250 + 1}", 40000 + number)


def test_each_source_has_a_rate_limit() -> None:
    limiter = AcceptLimiter(Limits(rate=1000, source_rate=10, burst=2))
    assert [limiter.allows(source(1), 5.0) for _ in range(25)] == [True] * 20 + [False] * 5
    assert limiter.allows(source(2), 5.0)
    assert limiter.allows(source(1), 5.11)
    assert not limiter.allows(source(1), 5.11)


def test_addresses_of_one_network_are_one_source() -> None:
    limiter = AcceptLimiter(Limits(rate=1000, source_rate=1, burst=1))
    assert limiter.allows(("2001:db8::1", 1, 0, 0), 0.0)
    assert not limiter.allows(("2001:db8::2", 1, 0, 0), 0.0)
    assert limiter.allows(("2001:db8:1::1", 1, 0, 0), 0.0)


def test_loopback_is_always_allowed() -> None:
    limiter = AcceptLimiter(Limits(rate=1000, source_rate=1, burst=1))
    assert all(limiter.allows(each, 0.0) for each in (LOOPBACK, ("::1", 1, 0, 0)) * 50)


def test_all_sources_together_have_a_rate() -> None:
    limiter, now, allowed = AcceptLimiter(Limits(rate=100, source_rate=100, burst=2)), 0.0, 0
    while now < 10:
        allowed += limiter.allows(source(allowed), now)
        now += limiter.pause(now) or 0.0001
    assert 10 * 100 <= allowed <= 12 * 100 + 1


def test_rejections_count_toward_the_total_rate() -> None:
    limiter, now, seen = AcceptLimiter(Limits(rate=100, source_rate=1, burst=1)), 0.0, 0
    while now < 10:
        limiter.allows(source(1), now)
        seen += 1
        now += limiter.pause(now) or 0.0001
    assert seen * REJECT_COST <= 11 * 100 + 10


def test_a_flood_of_one_source_leaves_room_in_the_queue_for_others() -> None:
    """1,000 connections per second, with the default limits. The kernel queues up to 64 connections."""
    limiter = AcceptLimiter(Limits())
    now, handled, longest = 0.0, 0, 0
    while now < 20:
        longest = max(longest, int(now * 1000) - handled)
        while handled < int(now * 1000) and not limiter.pause(now):
            limiter.allows(source(1), now)
            handled += 1
        now += limiter.pause(now) or 0.001
    assert longest < 64


def test_after_a_pause_no_connection_waits() -> None:
    limiter = AcceptLimiter(Limits(rate=100, source_rate=100, burst=1))
    for _ in range(300):
        limiter.allows(LOOPBACK, 0.0)
    assert limiter.pause(0.0) > 1
    assert limiter.pause(3.0) == 0
