"""A bundle as a Docker build context, and the versions that requirements.txt pins."""

import os
import re
from pathlib import Path

from distill.errors import UserError
from export.bundling.archive import shown
from export.bundling.layout_oci import tag_of
from export.bundling.verify import Manifest

DOCKERFILE = """\
# {student}, made by Decant {decant}: features of images on the CPU.
#     docker build -t {tag} .
#     docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" {tag} /data/photo.jpg --out /data/features.npz
FROM python:{python}-slim
COPY requirements.txt /
RUN pip install --no-cache-dir -r /requirements.txt
COPY bundle /bundle
# No image without a passing self-test; a container that stays up repeats it.
RUN ["python", "-I", "-B", "/bundle/selftest.py", "--seconds", "0"]
HEALTHCHECK --interval=5m --timeout=5m CMD ["python", "-I", "-B", "/bundle/selftest.py", "--seconds", "0"]
USER 65534:65534
ENTRYPOINT ["python", "-B", "/bundle/infer.py"]
"""


def docker(bundle: Path, manifest: Manifest, files: Path, out: Path) -> list[str]:
    """Dockerfile, requirements.txt and the unpacked bundle."""
    runtimes = sorted({a.runtime for a in manifest.artifacts} & {"onnxruntime", "openvino"})
    if not runtimes:
        raise UserError(f"{bundle} holds no artifact that runs on a CPU; export onnx-fp32 or another.")
    versions = versions_in(manifest)
    pins = pinned(bundle, versions, "numpy", "pillow", *runtimes)
    python = ".".join(plain_version(bundle, "python", versions).split(".")[:2])
    tag = tag_of(manifest).lower().strip("._-") or "student"
    about = {"student": manifest.student, "decant": shown(manifest.decant), "python": python, "tag": tag}
    (out / "Dockerfile").write_text(DOCKERFILE.format(**about), encoding="utf-8")
    (out / "requirements.txt").write_text("\n".join(pins) + "\n", encoding="utf-8")
    os.rename(files, out / "bundle")
    return [f"Build: docker build -t {tag} DIR"]


def versions_in(manifest: Manifest) -> dict[str, str]:
    """Package -> version, of what made the bundle and of its artifacts' runtimes."""
    versions = dict(manifest.built_with)
    for artifact in manifest.artifacts:
        versions |= {r: v for r, v in artifact.compatibility.built_with.items() if r == artifact.runtime}
    return versions


def pinned(bundle: Path, versions: dict[str, str], *names: str) -> list[str]:
    """Lines of requirements.txt."""
    return [f"{name}=={plain_version(bundle, name, versions)}" for name in names]


def plain_version(bundle: Path, name: str, versions: dict[str, str]) -> str:
    """A release number such as 2.4.6, without build numbers; a manifest may say anything, and this becomes part of a command."""
    if not (found := re.match(r"\d+\.\d+(\.\d+)*", versions.get(name, ""))):
        raise UserError(f"{bundle} does not say with which version of {name} it was built; build it again.")
    return found[0]
