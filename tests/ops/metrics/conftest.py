"""Sources of metrics."""

from tests.support.metrics import measured

__all__ = ["measured"]
