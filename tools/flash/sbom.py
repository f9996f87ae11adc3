"""The bill of materials of a kit (CycloneDX 1.6): each wheel with its version, hash and licence."""

from __future__ import annotations

import json
import uuid
import zipfile
from collections.abc import Iterable
from email.message import Message
from email.parser import HeaderParser

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License, LicenseAcknowledgement
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from fleetune.edge.protocol.errors import AssetError
from fleetune.tools.flash.content import Content
from fleetune.tools.flash.wheelhouse import Wheel

_MAX_METADATA = 1 << 20
_SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "MIT License": "MIT",
}
"""What wheels state in words → its SPDX identifier."""


def bill_of_materials(content: Content) -> str:
    """The document, as JSON; the same for the same content.

    Raises:
        AssetError: A wheel has no metadata, or no licence is known for it.
    """
    own = Component(
        name="fleetune",
        version=content.version,
        type=ComponentType.APPLICATION,
        bom_ref="fleetune",
        purl=PackageURL("pypi", name="fleetune", version=content.version),
        licenses=[LicenseFactory().make_from_string("Apache-2.0")],
    )
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_OID, f"fleetune {content.tier.name} {content.kit}"))
    bom.metadata.component = own
    parts = list(_components(content.wheels))
    bom.components.update(parts)
    bom.register_dependency(own, parts)
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    del document["metadata"]["timestamp"]  # the same content is the same document
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def _components(wheels: Iterable[Wheel]) -> Iterable[Component]:
    for wheel in wheels:
        metadata = _metadata(wheel)
        yield Component(
            name=wheel.name,
            version=wheel.version,
            type=ComponentType.LIBRARY,
            bom_ref=wheel.file.name,
            description=metadata.get("Summary"),
            purl=PackageURL("pypi", name=wheel.name, version=wheel.version),
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=wheel.sha256)],
            licenses=[_licence(wheel.name, metadata)],
        )


def _licence(name: str, metadata: Message) -> License:
    stated = metadata.get("License-Expression") or metadata.get("License") or ""
    classifiers = [words for words in metadata.get_all("Classifier", []) if words.startswith("License :: ")]
    if "\n" in stated or not stated:  # the whole text, or nothing
        stated = classifiers[0].rpartition(" :: ")[2] if classifiers else ""
    if not stated:
        raise AssetError(f"the wheel of {name} states no licence", "look it up, and add it to tools/flash/sbom.py")
    stated = _SPDX.get(stated, stated)
    return LicenseFactory().make_from_string(stated, license_acknowledgement=LicenseAcknowledgement.DECLARED)


def _metadata(wheel: Wheel) -> Message:
    try:
        with zipfile.ZipFile(wheel.file) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".dist-info/METADATA")]
            if len(entries) != 1 or entries[0].file_size > _MAX_METADATA:
                raise AssetError(f"{wheel.file} has no metadata that could be read", "take another file")
            return HeaderParser().parsestr(archive.read(entries[0]).decode("utf-8", "replace"))
    except zipfile.BadZipFile as error:
        raise AssetError(f"{wheel.file}: {error}", "take another file") from error
