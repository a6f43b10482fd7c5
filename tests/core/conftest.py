"""Fixtures: a core server and its client."""

import pytest

from tests.support.core import Client, Relay


@pytest.fixture
def relay() -> Relay:
    return Relay()


@pytest.fixture
def client(relay: Relay) -> Client:
    return Client(relay)
