"""What the docs say of the status is what it is."""

import json
import re
from pathlib import Path

from relay.status.model import Status
from relay.status.parameters import MOST_ALLOCATIONS, MOST_CHANNELS, Parameters
from relay.status.ranking import SORTS
from relay.top.reading import read

TEXT = (Path(__file__).parents[2] / "docs" / "status.md").read_text(encoding="utf-8")


def test_the_example_is_an_answer() -> None:
    found = re.search(r"<!-- example: begin -->\n```json\n(.*?)```", TEXT, re.DOTALL)
    assert found is not None
    example = read(Status, json.loads(found[1]))
    assert example["allocations"][0]["channels"]


def test_parameters_are_documented_with_their_limits() -> None:
    default = Parameters()
    for parameter, value in default._asdict().items():
        name = "order" if parameter == "descending" else parameter
        assert f"| `{name}` |" in TEXT
        if isinstance(value, int | str) and name != "order":
            assert re.search(rf"\| `{name}` \| `?{value}`? \|", TEXT)
    assert all(f"`{sort}`" in TEXT for sort in SORTS)
    assert f"0–{MOST_ALLOCATIONS}" in TEXT
    assert f"{MOST_CHANNELS} at most" in TEXT
