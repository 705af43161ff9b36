"""What is in an artefact, as a CycloneDX document: which packages, in which versions, under which licences.

Source: CycloneDX 1.6. Of the time nothing is said, and the serial number follows from the content, so that two builds
give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from dps_package.distributions import BuildFailed, run


def write_sbom(artefact: Path, version: str, needs: Sequence[str] = ()) -> Path:
    """Writes `{artefact}.cdx.json`; `needs` are what it needs beside what is in it, by the target's names."""
    bundled = [_library(fields) for fields in _bundled(artefact) if fields["Name"] != "dps-agent"]
    required = [
        {"type": "library", "name": name, "bom-ref": f"required/{name}", "scope": "required"}
        for name in dict.fromkeys(needs)  # python3 is needed from one version on, and before another
    ]
    components = sorted([*bundled, *required], key=lambda each: str(each["bom-ref"]))
    digest = hashlib.sha256(artefact.read_bytes()).hexdigest()
    product = {
        "type": "application",
        "name": "dps-agent",
        "version": version,
        "bom-ref": artefact.name,
        "licenses": [{"license": {"id": "MIT"}}],
        "hashes": [{"alg": "SHA-256", "content": digest}],
    }
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, digest)}",
        "version": 1,
        "metadata": {"component": product},
        "components": components,
        "dependencies": [{"ref": artefact.name, "dependsOn": [each["bom-ref"] for each in components]}],
    }
    text = json.dumps(document, indent=2)
    check_sbom(text)
    path = artefact.with_name(f"{artefact.name}.cdx.json")
    path.write_text(f"{text}\n")
    return path


def check_sbom(text: str) -> None:
    """BuildFailed unless a text is a CycloneDX 1.6 document."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if error is not None:
        said = str(error)  # the value comes first, and what is wrong with it last
        raise BuildFailed(f"expected a CycloneDX 1.6 document: {said[:200]} … {said[-300:]}")


def _library(fields: Message) -> dict[str, Any]:
    name, version = str(fields["Name"]), str(fields["Version"])
    reference = f"pkg:pypi/{name.lower().replace('_', '-')}@{version}"
    found: dict[str, Any] = {
        "type": "library",
        "name": name,
        "version": version,
        "bom-ref": reference,
        "purl": reference,
    }
    licence = fields["License-Expression"] or (fields["License"] or "").partition("\n")[0]
    if licence:
        found["licenses"] = [{"license": {"name": str(licence)}}]
    return found


def _bundled(artefact: Path) -> Iterator[Message]:
    """The metadata of each Python package that lies in an artefact, the agent's own included."""
    for text in sorted(_metadata(artefact)):
        yield HeaderParser().parsestr(text)


def _metadata(artefact: Path) -> Iterator[str]:
    if artefact.suffix == ".whl":
        with zipfile.ZipFile(artefact) as wheel:
            for name in wheel.namelist():
                if name.endswith(".dist-info/METADATA"):
                    yield wheel.read(name).decode()
    elif artefact.suffix == ".deb":
        with tempfile.TemporaryDirectory(prefix="dps-sbom-") as folder:
            run(["dpkg-deb", "--extract", str(artefact), folder])
            for path in Path(folder).rglob("*.dist-info/METADATA"):
                yield path.read_text()
    elif artefact.name.endswith(".tar.gz"):
        with tarfile.open(artefact) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.name.endswith(".dist-info/METADATA") else None
                if file is not None:
                    yield file.read().decode()
