"""Write the SBOM in CycloneDX: each shipped package with version, licence, hashes and dependencies.

One document is for requirements/relay.txt, another for otlp.txt. The data comes from these files and the metadata of the
installed packages, without network access. The same lock gives the same document, except for the time (SOURCE_DATE_EPOCH).

`cyclonedx-py requirements` would write hashes, but neither licences nor dependencies, and `cyclonedx-py environment` the
opposite, for all of the virtual environment.
"""

import os
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
"""Extras of the relay with a lock file."""

_OSI: Final = "License :: OSI Approved :: "
_LICENSES: Final = LicenseFactory()


def main() -> None:
    """Write the documents to the folder of the command line."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER.parent / "dist"
    folder.mkdir(parents=True, exist_ok=True)
    for extra in (None, *EXTRAS):
        path = folder / f"{NAME}-{__version__}{'' if extra is None else f'+{extra}'}.cdx.json"
        path.write_text(document(extra), encoding="utf-8")
        print(path)


def document(extra: str | None = None) -> str:
    """Return the document as JSON, for an installation with an extra or without."""
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + (project["optional-dependencies"][extra] if extra else [])
    lock = extra or "relay"
    components = {pin.name: _component(pin) for pin in read(lock) if pin.is_for_linux}
    relay = Component(
        name=NAME,
        version=__version__,
        type=ComponentType.APPLICATION,
        bom_ref=f"{NAME}@{__version__}",
        licenses=[_LICENSES.make_from_string(project["license"])],
    )
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    time = datetime.now(UTC) if epoch is None else datetime.fromtimestamp(int(epoch), UTC)
    text = (FOLDER / f"{lock}.txt").read_text(encoding="utf-8")
    serial_number = uuid.uuid5(uuid.NAMESPACE_OID, f"{NAME} {__version__} {text}")
    about = BomMetaData(timestamp=time, component=relay)
    bom = Bom(components=components.values(), serial_number=serial_number, metadata=about)
    bom.register_dependency(relay, [components[name] for name in _names(wanted)])
    for name, component in components.items():
        needed = _names(metadata.requires(name) or [])
        bom.register_dependency(component, [components[each] for each in needed if each in components])
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def _component(pin: Pin) -> Component:
    purl = PackageURL("pypi", None, pin.name, pin.version)
    # The hashes of all files: the machine decides which of the files pip installs.
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
    """Return the licences in a package's metadata: an expression, a line of text, or classifiers."""
    found = metadata.metadata(name)
    text = (found.get_all("License-Expression") or found.get_all("License") or [""])[0]
    if text and "\n" not in text:
        yield _LICENSES.make_from_string(text)
        return
    for classifier in found.get_all("Classifier") or ():
        if classifier.startswith(_OSI):
            yield _LICENSES.make_with_name(classifier.removeprefix(_OSI))


def _names(requirements: list[str]) -> Iterator[NormalizedName]:
    """Return the names of requirements on Linux without extras."""
    for each in map(Requirement, requirements):
        if each.marker is None or each.marker.evaluate(LINUX | {"extra": ""}):
            yield canonicalize_name(each.name)


if __name__ == "__main__":
    main()
