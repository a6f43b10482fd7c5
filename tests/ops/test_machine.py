"""What the relay finds out about its machine."""

import re
import ssl
from pathlib import Path

import pytest

from relay import __version__
from relay.config import BadUseError
from relay.ops.machine import trusted_authorities, user_agent


@pytest.mark.parametrize(
    ("content", "says"), [(None, "can't read SSL_CERT_FILE"), ("", "no certificate in it"), ("text", "no certificate in it")]
)
def test_authorities_that_are_none_are_bad_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, says: str
) -> None:
    """Without a word, each attempt to connect would fail for a reason that names no file."""
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(BadUseError, match=says):
        trusted_authorities()


def test_certificates_are_verified_and_names_compared() -> None:
    context = trusted_authorities()
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


def test_the_user_agent_names_system_relay_and_kernel() -> None:
    """The form that portals read: ``<os>/<version> relay/<version> (<arch>; <kernel>)``."""
    assert re.fullmatch(rf"[^ /]+/[^ /]+ relay/{re.escape(__version__)} \([^ ;]+; [^ ;]+\)", user_agent())
