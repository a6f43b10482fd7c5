"""A relay with a status page."""

from tests.support.status import watched

__all__ = ["watched"]
