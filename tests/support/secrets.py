"""Search for secrets in output and HTTP pages."""

import base64
import contextlib
import http.client
import json

from relay.core.credentials import Credential, integrity_key


class Secrets:
    """Secret texts and bytes, in all encodings."""

    def __init__(self) -> None:
        self._spellings: dict[str, str] = {}

    def add(self, what: str, secret: str | bytes) -> None:
        data = secret.encode() if isinstance(secret, str) else secret
        text, based = data.decode("latin-1"), base64.b64encode(data).decode()
        for spelling in (text, repr(data)[2:-1], json.dumps(text)[1:-1], data.hex(), based.rstrip("=")):
            self._spellings[spelling] = what

    def add_credential(self, credential: Credential) -> None:
        self.add("username", credential.username)
        self.add("salt of a username", credential.username.partition(":")[2])
        self.add("password", credential.password)
        self.add("key", integrity_key(credential.username, "firezone", credential.password))

    def found_in(self, text: str) -> set[str]:
        return {what for spelling, what in self._spellings.items() if spelling in text}


def page(address: tuple[str, int], method: str, path: str) -> str:
    """Return the content of a page."""
    connection = http.client.HTTPConnection(*address, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        return f"{answer.status} {answer.headers} {answer.read().decode()}"


def pages_of(address: tuple[str, int]) -> list[str]:
    """Return all pages, as listed in the response to an unknown page."""
    text = page(address, "GET", "/")
    found: list[str] = json.loads(text[text.index("{") :])["pages"]
    assert found
    return found
