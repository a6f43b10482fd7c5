"""HTTP errors in response to the upgrade: fatal errors and retries."""

import json
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.portal.channel import State
from relay.core.portal.commands import Fatal, Note
from relay.core.portal.events import UpgradeRefused
from relay.core.portal.reasons import fatal_reason, wait_asked_for
from tests.support.portal_channel import START, TOKEN, Driver, of_kind, the


def problem(**members: object) -> bytes:
    return json.dumps({"type": "about:blank", "title": "Unauthorized", "status": 401, **members}).encode()


def reason_of(body: bytes) -> str:
    reason = fatal_reason(UpgradeRefused(401, None, body), lambda text: f"<{text}>")
    assert reason is not None
    return reason


@pytest.mark.parametrize("later", [False, True])
def test_401_is_fatal_before_and_after_the_first_join(later: bool) -> None:  # noqa: FBT001
    driver = Driver()
    if later:
        driver.join().report_lost()
        driver.pass_time(1)
    else:
        driver.start()
    (fatal,) = driver.report_refused(401, "42", problem(code="invalid_token", detail="The token is not valid."))
    assert isinstance(fatal, Fatal)
    assert "invalid_token: The token is not valid." in fatal.reason
    assert driver.is_in(State.OVER)
    assert driver.channel.poll_timeout() is None


def test_a_reason_contains_the_code_and_the_quoted_detail() -> None:
    assert "(<invalid_token>: <It is not ours.>)" in reason_of(problem(code="invalid_token", detail="It is not ours."))
    assert "(<missing_token>)" in reason_of(problem(code="missing_token"))
    assert "(<Go away.>)" in reason_of(problem(detail="Go away."))


def test_each_code_has_an_advice() -> None:
    assert "FIREZONE_TOKEN" in reason_of(problem(code="invalid_token"))
    assert "X-Authorization" in reason_of(problem(code="missing_token"))
    assert "FIREZONE_TOKEN" in reason_of(problem(code="some_new_code"))
    assert len({reason_of(problem(code=code)).split("): ")[1] for code in ("invalid_token", "missing_token", "new")}) == 3


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>401</html>",
        b"null",
        b"[]",
        b'"invalid_token"',
        b"{}",
        b'{"code":',
        b'{"code": 401, "detail": ["x"]}',
        b'{"code": "", "detail": null}',
        b'{"code": {"code": "invalid_token"}}',
        b"\xff\xfe\xfd",
        b"[" * 100_000,
        b'{"code": ' + b"1" * 5000 + b"}",
    ],
)
def test_a_body_without_a_problem_document_gives_no_reason(body: bytes) -> None:
    reason = reason_of(body)
    assert "(401 without a reason)" in reason
    assert "FIREZONE_TOKEN" in reason


@given(st.binary(max_size=50) | st.dictionaries(st.sampled_from(["code", "detail"]), st.text()).map(lambda d: problem(**d)))
def test_any_body_of_a_401_gives_a_single_line_reason(body: bytes) -> None:
    driver = Driver()
    driver.start()
    reason = the(Fatal, driver.report_refused(401, None, body)).reason
    assert reason.isprintable()
    assert len(reason) < 1000


def test_a_token_echoed_in_the_body_is_redacted_in_the_reason(driver: Driver) -> None:
    driver.start()
    fatal = the(Fatal, driver.report_refused(401, None, problem(code=TOKEN, detail=f"no relay has the token {TOKEN}.")))
    assert "no relay has the token [concealed]." in fatal.reason
    assert TOKEN not in fatal.reason


@pytest.mark.parametrize("status", [0, 200, 400, 402, 403, 404, 429, 500, 503])
def test_no_other_status_is_fatal(driver: Driver, status: int) -> None:
    driver.start()
    assert of_kind(Fatal, driver.report_refused(status, None, problem(code="invalid_token"))) == []
    assert driver.is_in(State.WAITING)


@pytest.mark.parametrize("status", [302, 400, 403, 429, 500, 503])
def test_a_problem_document_of_any_status_is_logged(driver: Driver, status: int) -> None:
    driver.start()
    body = problem(code="rate_limit", detail="Too many attempts.\nWait.")
    note = the(Note, driver.report_refused(status, None, body))
    assert note.fields["reason"] == f"it answered {status} to the upgrade (rate_limit: Too many attempts.?Wait.)"
    assert driver.channel.last_failure == note.fields["reason"]


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b'{"code": 1}', b"[" * 100_000])
def test_a_status_without_a_problem_document_is_logged_alone(driver: Driver, body: bytes) -> None:
    driver.start()
    assert the(Note, driver.report_refused(502, None, body)).fields["reason"] == "it answered 502 to the upgrade"


@given(
    st.dictionaries(st.sampled_from(["code", "detail"]), st.text() | st.just(f"a {TOKEN} " * 900)).map(
        lambda d: problem(**d)
    )
)
def test_a_logged_problem_document_is_short_and_printable_and_has_no_token(body: bytes) -> None:
    driver = Driver()
    driver.start()
    reason = str(the(Note, driver.report_refused(503, None, body)).fields["reason"])
    assert reason.isprintable()
    assert len(reason) < 500
    assert TOKEN[:20] not in reason


DAYS, MONTHS, ZONES = (
    ["Mon,", "Tue", "Sunday,", ","],
    ["Jan", "Feb", "Dec", "Foo", "13"],
    ["GMT", "+0100", "-9999", "EST", "Z"],
)
numbers = st.integers(-1, 100_000).map(str)
times = st.lists(st.integers(-1, 100).map(str), max_size=4).map(":".join)
date_like = st.lists(st.sampled_from([*DAYS, *MONTHS, *ZONES]) | numbers | times | st.text(max_size=3), max_size=7).map(
    " ".join
)
dates = st.tuples(st.sampled_from(DAYS), numbers, st.sampled_from(MONTHS), numbers, times, st.sampled_from(ZONES)).map(
    " ".join
)


@given(st.sampled_from([429, 503]), st.text() | date_like | dates, st.floats(0, 1e11))
def test_any_retry_after_gives_a_wait_up_to_an_hour_or_none(status: int, retry_after: str, unix: float) -> None:
    wait = wait_asked_for(UpgradeRefused(status, retry_after), unix)
    assert wait is None or 0 <= wait <= 3600


@pytest.fixture
def _in_new_york(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("_in_new_york")
@pytest.mark.parametrize(
    "date", ["22:14:02 GMT", "22:14:02 +0000", "22:14:02 -0000", "22:14:02 UTC", "22:14:02", "23:14:02 +0100"]
)
def test_a_date_is_in_its_own_time_zone_or_utc(date: str) -> None:
    # 42 s after START.
    assert wait_asked_for(UpgradeRefused(503, f"Tue, 14 Nov 2023 {date}"), START.unix) == 42
