"""The docs of the status page match the page."""

import json
import re
from pathlib import Path

from relay.status.model import Status
from relay.status.parameters import MAX_ALLOCATIONS, MAX_CHANNELS, parse
from relay.status.scan import SORTS
from relay.tools.control import read

TEXT = (Path(__file__).parents[2] / "docs" / "status.md").read_text(encoding="utf-8")


def test_the_example_matches_the_model() -> None:
    found = re.search(r"<!-- example: begin -->\n```json\n(.*?)```", TEXT, re.DOTALL)
    assert found is not None
    example = read(Status, json.loads(found[1]))
    assert example["allocations"][0]["channels"]


def test_parameters_are_documented_with_their_limits() -> None:
    for name, value in parse({}).items():
        assert f"| `{name}` |" in TEXT
        if value is not None and name != "order":
            assert re.search(rf"\| `{name}` \| `?{value}`? \|", TEXT)
    assert all(f"`{sort}`" in TEXT for sort in SORTS)
    assert f"0–{MAX_ALLOCATIONS}" in TEXT
    assert f"{MAX_CHANNELS} at most" in TEXT
