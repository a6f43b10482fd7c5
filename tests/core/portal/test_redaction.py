import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.credentials import RelaySecret
from relay.core.portal.commands import Connect, Fatal
from relay.core.portal.endpoint import PortalToken
from relay.core.portal.reasons import redactor
from tests.support.portal_channel import SECRET, TOKEN, Driver, of_kind, the

redact = redactor(PortalToken(TOKEN), RelaySecret(SECRET))


@pytest.mark.parametrize("text", ["", "plain", "Zürich 東京 ✓", "{\"a\": 'b'}\\"])
def test_a_short_printable_text_is_unchanged(text: str) -> None:
    assert redact(text) == text


def test_a_text_is_truncated_to_200_characters() -> None:
    assert redact("x" * 200) == "x" * 200
    assert redact("x" * 201) == "x" * 200 + "..."
    assert redact("x" * 1_000_000) == "x" * 200 + "..."


@pytest.mark.parametrize("text", ["a\nb", "a\x1bb", "a\x00b", "a\u2028b", "a\u202eb", "a\ud800b", "a\x7fb", "a\x9bb"])
def test_control_characters_are_replaced(text: str) -> None:
    assert redact(text) == "a?b"


def test_a_secret_is_not_shown() -> None:
    assert redact(TOKEN) == redact(SECRET) == "[concealed]"
    assert redact(f"a {TOKEN} b {SECRET} c {TOKEN}{TOKEN}") == "a [concealed] b [concealed] c [concealed][concealed]"


def test_a_secret_is_not_shown_at_the_end_of_a_truncated_text() -> None:
    for before in range(150, 205):
        shown = redact("x" * before + SECRET + "y" * 300)
        assert len(shown) <= 203
        assert set(shown) <= set("xy.[conealed]")


texts = st.text(max_size=30) | st.sampled_from([TOKEN, SECRET, "x" * 190, "\n" * 50])


@given(st.lists(texts, max_size=20).map("".join))
def test_any_redacted_text_is_short_printable_and_without_secrets(text: str) -> None:
    shown = redact(text)
    assert shown.isprintable()
    assert len(shown) <= 203
    assert TOKEN not in shown
    assert SECRET not in shown
    assert redact(shown[:200]) == shown[:200]


@pytest.mark.parametrize("length", [500, 1000, 20_000])
def test_no_part_of_a_repeated_long_token_is_shown(length: int) -> None:
    token = "Q" * length
    assert "Q" not in redactor(PortalToken(token))(token * 40)


def test_a_new_token_is_sent_at_the_next_attempt_and_concealed() -> None:
    driver = Driver().join()
    driver.channel.use_token(PortalToken("rotated"))
    driver.report_lost()
    (connect,) = of_kind(Connect, driver.pass_time(1))
    assert ("X-Authorization", "Bearer rotated") in connect.headers
    body = b'{"code": "x", "detail": "rotated is no token"}'
    assert "(x: [concealed] is no token)" in the(Fatal, driver.report_refused(401, None, body)).reason
