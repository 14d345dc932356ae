"""A bundle as an artifact of OCI registries."""

import json
import re
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

from distill.errors import GateFailed
from distill.files import sha256_file
from export.bundling.verify import Manifest

ARTIFACT_TYPE = "application/vnd.decant.bundle.v1"
LAYER_TYPE = "application/vnd.decant.bundle.v1.tar+gzip"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
EMPTY_TYPE, EMPTY = (
    "application/vnd.oci.empty.v1+json",
    b"{}",
)  # the configuration of an artifact that has none (image-spec 1.1)


def oci(bundle: Path, manifest: Manifest, files: Path, out: Path) -> list[str]:
    """oci-layout, index.json, blobs/sha256/*: the bundle as it is, signature included, is the only layer."""
    del files
    blobs, tag = out / "blobs" / "sha256", tag_of(manifest)
    blobs.mkdir(parents=True)

    def blob(data: bytes, media_type: str) -> dict[str, Any]:
        digest = sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    digest = sha256_file(bundle)
    shutil.copyfile(bundle, blobs / digest)
    if sha256_file(blobs / digest) != digest:
        raise GateFailed(f"{bundle} changed while it was copied; nothing was written.")
    layer = {"mediaType": LAYER_TYPE, "digest": f"sha256:{digest}", "size": bundle.stat().st_size}
    layer["annotations"] = {"org.opencontainers.image.title": f"{manifest.student}.tar.gz"}
    about = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": blob(EMPTY, EMPTY_TYPE) | {"data": "e30="},
        "layers": [layer],
        "annotations": {
            "org.opencontainers.image.title": manifest.student,
            "org.opencontainers.image.version": manifest.decant,
        },
    }
    entry = blob(as_json(about), MANIFEST_TYPE) | {"artifactType": ARTIFACT_TYPE}
    entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [entry]}
    (out / "index.json").write_bytes(as_json(index))
    (out / "oci-layout").write_bytes(as_json({"imageLayoutVersion": "1.0.0"}))
    return [f"Push: oras copy --from-oci-layout DIR:{tag} REGISTRY/NAME:{tag}"]


def as_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def tag_of(manifest: Manifest) -> str:
    """A tag that the distribution specification allows."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", manifest.student)[:128]
