"""CA certificates and the user agent."""

import re
import ssl
from pathlib import Path

import pytest

from relay import __version__
from relay.config import UsageError
from relay.system.portal import trusted_authorities, user_agent


@pytest.mark.parametrize(
    ("content", "says"), [(None, "can't read SSL_CERT_FILE"), ("", "no certificate in it"), ("text", "no certificate in it")]
)
def test_an_invalid_ca_file_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, says: str
) -> None:
    """Without this check, each connection attempt would fail with an error without the file name."""
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(UsageError, match=says):
        trusted_authorities()


def test_certificates_are_verified_and_names_compared() -> None:
    context = trusted_authorities()
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


def test_the_user_agent_contains_system_relay_and_kernel() -> None:
    """Portals parse the form ``<os>/<version> relay/<version> (<arch>; <kernel>)``."""
    assert re.fullmatch(rf"[^ /]+/[^ /]+ relay/{re.escape(__version__)} \([^ ;]+; [^ ;]+\)", user_agent())
