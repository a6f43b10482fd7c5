"""The SBOM is complete, valid and reproducible."""

import json
import tomllib
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from relay import __version__
from supply.pins import FOLDER, read
from supply.sbom import EXTRAS, document


@pytest.fixture
def bom(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1795000000")
    found: dict[str, Any] = json.loads(document())
    return found


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_the_document_is_valid_by_the_schema(extra: str | None) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(document(extra)) is None


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_has_a_document_of_its_own(bom: dict[str, Any], extra: str) -> None:
    more = json.loads(document(extra))
    listed = {each["name"] for each in more["components"]}
    assert listed == {pin.name for pin in read(extra) if pin.is_for_linux}
    assert listed > {each["name"] for each in bom["components"]}
    assert more["serialNumber"] != bom["serialNumber"]
    needed = {ref for each in more["dependencies"] for ref in each.get("dependsOn", ())}
    assert len(needed) == len(listed), "each component is a dependency"


def test_an_invalid_document_is_detected(bom: dict[str, Any]) -> None:
    broken = json.dumps(bom | {"components": [{"name": "without a type"}]})
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(broken) is not None


def test_each_locked_package_has_version_licence_and_hashes(bom: dict[str, Any]) -> None:
    locked = {pin.name: pin for pin in read("relay") if pin.is_for_linux}
    assert {each["name"]: each["version"] for each in bom["components"]} == {
        name: pin.version for name, pin in locked.items()
    }
    for each in bom["components"]:
        assert each["licenses"], each["name"]
        (files,) = each["externalReferences"]
        assert {found["content"] for found in files["hashes"]} == set(locked[each["name"]].hashes)
    assert (bom["metadata"]["component"]["name"], bom["metadata"]["component"]["version"]) == ("firezone-relay", __version__)


def test_the_document_has_the_dependencies(bom: dict[str, Any]) -> None:
    needs = {each["ref"]: {ref.partition("@")[0] for ref in each.get("dependsOn", ())} for each in bom["dependencies"]}
    declared = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    assert len(needs[f"firezone-relay@{__version__}"]) == len(declared)
    (rich,) = [ref for ref in needs if ref.startswith("pkg:pypi/rich@")]
    assert needs[rich] == {"pkg:pypi/markdown-it-py", "pkg:pypi/pygments"}
    everything = {"pkg:pypi/" + each["name"] for each in bom["components"]}
    assert set().union(*needs.values()) == everything, "each component is a dependency"


def test_the_same_lock_gives_the_same_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1795000000")
    assert document() == document()
