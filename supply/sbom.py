"""Writes what the relay is shipped with, in CycloneDX: each package, its version, licence, hashes, and what needs what.

One document is about requirements/relay.txt, another about otlp.txt, of which an image may be built. They are made of these
and of what the installed packages say of themselves, so it takes no network. The same lock gives the same document but for
the time, which SOURCE_DATE_EPOCH sets.
"""

import os
import re
import sys
import tomllib
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Final

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from relay import __version__
from supply.pins import FOLDER, LINUX, Pin, read

NAME: Final = "firezone-relay"
EXTRAS: Final = ("otlp",)
"""Of the relay, that have a lock of their own."""

_PROJECT: Final = FOLDER.parent / "pyproject.toml"
_LICENSES: Final = LicenseFactory()


def main() -> None:
    """Write them to the folder that the command line says."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER.parent / "dist"
    folder.mkdir(parents=True, exist_ok=True)
    for extra in (None, *EXTRAS):
        path = folder / f"{NAME}-{__version__}{'' if extra is None else f'+{extra}'}.cdx.json"
        path.write_text(document(extra), encoding="utf-8")
        print(path)


def document(extra: str | None = None) -> str:
    """Give the document, as JSON.

    Args:
        extra: what it is installed with, of `EXTRAS`.

    Raises:
        importlib.metadata.PackageNotFoundError: what is pinned is not installed.
    """
    project = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]
    lock, wanted = "relay", list(project["dependencies"])
    if extra is not None:
        lock, wanted = extra, wanted + project["optional-dependencies"][extra]
    pins = [pin for pin in read(lock) if pin.is_for_linux]
    components = {pin.name: _component(pin) for pin in pins}
    relay = Component(
        name=NAME,
        version=__version__,
        type=ComponentType.APPLICATION,
        bom_ref=f"{NAME}@{__version__}",
        licenses=[_LICENSES.make_from_string(project["license"])],
    )
    about = BomMetaData(timestamp=_now(), component=relay)
    bom = Bom(components=components.values(), serial_number=_serial(lock), metadata=about)
    bom.register_dependency(relay, [components[name] for name in _named(wanted)])
    for pin in pins:
        needs = _named(metadata.requires(pin.name) or [])
        bom.register_dependency(components[pin.name], [components[name] for name in needs if name in components])
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def _component(pin: Pin) -> Component:
    purl = PackageURL("pypi", None, pin.name, pin.version)
    # Of all files of this version: which of them is installed depends on the machine. Where they are, the installer knows.
    files = ExternalReference(
        type=ExternalReferenceType.DISTRIBUTION,
        url=XsUri(purl.to_string()),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=each) for each in pin.hashes],
    )
    return Component(
        name=pin.name,
        version=pin.version,
        type=ComponentType.LIBRARY,
        bom_ref=purl.to_string(),
        purl=purl,
        licenses=list(_licenses(pin.name)),
        external_references=[files],
    )


def _licenses(name: NormalizedName) -> Iterator[License]:
    """Give what a package says of its licence; some say it in an expression, older ones in a line of text."""
    said = metadata.metadata(name)
    text = (said.get_all("License-Expression") or said.get_all("License") or [""])[0]
    if text and "\n" not in text:
        yield _LICENSES.make_from_string(text)
        return
    for classifier in said.get_all("Classifier") or ():
        if found := re.fullmatch(r"License :: OSI Approved :: (.+)", classifier):
            yield _LICENSES.make_with_name(found[1])


def _named(requirements: list[str]) -> Iterator[NormalizedName]:
    """Give the names of what is required on Linux without any extra."""
    for each in map(Requirement, requirements):
        if each.marker is None or each.marker.evaluate(LINUX | {"extra": ""}):
            yield canonicalize_name(each.name)


def _serial(lock: str) -> uuid.UUID:
    text = (FOLDER / f"{lock}.txt").read_text(encoding="utf-8")
    return uuid.uuid5(uuid.NAMESPACE_OID, f"{NAME} {__version__} {text}")


def _now() -> datetime:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    return datetime.now(UTC) if epoch is None else datetime.fromtimestamp(int(epoch), UTC)


if __name__ == "__main__":
    main()
