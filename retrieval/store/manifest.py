"""The manifests by which products on disk describe themselves, and the comparison that refuses
products which do not fit together."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neighborlm.common.errors import InputError


def read_manifest(
    path: Path, kind: str, version: int, required: Sequence[str] = ()
) -> dict[str, Any]:
    """Reads the manifest of a product.

    Args:
        path: the JSON file.
        kind: what it must describe, e.g. "datastore".
        version: the newest format version that the caller understands.
        required: fields that the caller needs.

    Raises:
        InputError: missing, not JSON, incomplete, of another kind or a newer version.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected the manifest of a {kind}") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f"{path}: is not JSON; expected the manifest of a {kind}") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        found = manifest.get("kind") if isinstance(manifest, dict) else manifest
        raise InputError(f"{path}: describes {found!r}; expected the manifest of a {kind}")
    found = manifest.get("version")
    if not isinstance(found, int) or found > version:
        raise InputError(f"{path}: has format version {found}; this program reads up to {version}")
    missing = [field for field in required if field not in manifest]
    if missing:
        raise InputError(f"{path}: lacks {', '.join(missing)}; expected the manifest of a {kind}")
    return manifest


def write_manifest(path: Path, kind: str, version: int, fields: Mapping[str, Any]) -> None:
    """Writes a manifest so that a reader sees the old one or the new one, never a part."""
    manifest = {"kind": kind, "version": version, "command": sys.argv, **fields}
    making = path.with_name(f"{path.name}.making-{os.getpid()}")
    with open(making, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(making, path)


def refuse_mismatch(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compares what a product was made from with what is at hand.

    Args:
        path: the product.
        found: what its manifest says.
        expected: what is at hand; only these keys are compared.

    Raises:
        InputError: one sentence that names the first difference and both sides of it.
    """
    for key, value in expected.items():
        if found.get(key) != value:
            raise InputError(
                f"{path}: its {key.replace('_', ' ')} is {found.get(key)}, "
                f"but {value} is expected here; use a matching one or another place"
            )
