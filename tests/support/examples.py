"""Number and choice of Hypothesis' examples.

`make test` tries the same examples on each machine. `make test-long` tries ten times as many: new examples in each run,
or the same examples if ``CI`` is set, so that a failure in CI is caused by the change.
"""

import os
from typing import Any

from hypothesis import HealthCheck, settings

EVERYONE = "everyone"
LONG = "long"
"""Names of profiles, for ``pytest --hypothesis-profile``."""

_EXAMPLES = 40
"""Default number of examples of a test, in `EVERYONE`."""

_TIMES_IN_LONG = 10


def register_profiles() -> None:
    """Register both profiles, and load `EVERYONE`; the pytest option replaces the profile before tests are imported."""
    # A slow example is not a failure: the machine may be busy.
    patient: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    fixed: dict[str, Any] = {"derandomize": True, "database": None}
    settings.register_profile(EVERYONE, max_examples=_EXAMPLES, **fixed, **patient)
    settings.register_profile(
        LONG,
        max_examples=_EXAMPLES * _TIMES_IN_LONG,
        print_blob=True,
        **(fixed if os.environ.get("CI") else {"derandomize": False}),
        **patient,
    )
    settings.load_profile(EVERYONE)


def examples(count: int, **others: Any) -> settings:  # noqa: ANN401 - arguments of settings
    """Return settings with ``count`` examples in `EVERYONE`, multiplied by the factor of the loaded profile."""
    # Read at the import of a test, like Hypothesis reads the profile.
    loaded = settings.default
    assert loaded is not None
    return settings(max_examples=count * loaded.max_examples // _EXAMPLES, **others)
