import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.credentials import RelaySecret
from relay.core.portal.endpoint import PortalToken
from relay.core.portal.quoting import quoting
from tests.core.portal.driver import SECRET, TOKEN

quote = quoting(PortalToken(TOKEN), RelaySecret(SECRET))


@pytest.mark.parametrize("text", ["", "plain", "Zürich 東京 ✓", "{\"a\": 'b'}\\"])
def test_a_short_printable_text_stays_as_it_is(text: str) -> None:
    assert quote(text) == text


def test_200_characters_are_shown() -> None:
    assert quote("x" * 200) == "x" * 200
    assert quote("x" * 201) == "x" * 200 + "..."
    assert quote("x" * 1_000_000) == "x" * 200 + "..."


@pytest.mark.parametrize("text", ["a\nb", "a\x1bb", "a\x00b", "a\u2028b", "a\u202eb", "a\ud800b", "a\x7fb", "a\x9bb"])
def test_what_could_disturb_a_terminal_is_not_shown(text: str) -> None:
    assert quote(text) == "a?b"


def test_what_is_concealed_is_not_shown() -> None:
    assert quote(TOKEN) == quote(SECRET) == "[concealed]"
    assert quote(f"a {TOKEN} b {SECRET} c {TOKEN}{TOKEN}") == "a [concealed] b [concealed] c [concealed][concealed]"


def test_what_is_concealed_is_not_shown_where_a_text_is_cut_either() -> None:
    for before in range(150, 205):
        shown = quote("x" * before + SECRET + "y" * 300)
        assert len(shown) <= 203
        assert set(shown) <= set("xy.[conealed]")


texts = st.text(max_size=30) | st.sampled_from([TOKEN, SECRET, "x" * 190, "\n" * 50])


@given(st.lists(texts, max_size=20).map("".join))
def test_any_text_is_made_short_printable_and_free_of_what_is_concealed(text: str) -> None:
    shown = quote(text)
    assert shown.isprintable()
    assert len(shown) <= 203
    assert TOKEN not in shown
    assert SECRET not in shown
    assert quote(shown[:200]) == shown[:200]


@pytest.mark.parametrize("length", [500, 1000, 20_000])
def test_no_part_of_a_long_token_is_shown_however_often_it_is_said(length: int) -> None:
    token = "Q" * length
    assert "Q" not in quoting(PortalToken(token))(token * 40)
