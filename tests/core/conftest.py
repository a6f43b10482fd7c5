"""A core server and a client of it, for tests of one of each."""

import pytest

from tests.core.driver import Client, Relay


@pytest.fixture
def relay() -> Relay:
    return Relay()


@pytest.fixture
def client(relay: Relay) -> Client:
    return Client(relay)
