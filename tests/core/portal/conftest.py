"""A portal channel before its start, and one that is joined."""

import pytest

from tests.core.portal.driver import Driver


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def joined() -> Driver:
    return Driver().join()
