"""Fixtures: a portal channel before its start, and a joined portal channel."""

import pytest

from tests.support.portal_channel import Driver


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def joined() -> Driver:
    return Driver().join()
