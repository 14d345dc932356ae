"""A bundle as a folder for a device that compiles its own engines: a Jetson, a Windows PC with an RTX GPU.

All files of the bundle stay, in `bundle/`: the manifest may be signed and lists every one of them, its self-test opens none before all
are there and right, and what a device would not need (the report, engines for other GPUs) is small beside the models. SHA256SUMS lets
the installer check everything with the system's own tool before it runs any code of the bundle.
"""

import os
from pathlib import Path

from distill.errors import UserError
from distill.files import sha256_file
from export.bundling.layout_docker import pinned, versions_in
from export.bundling.verify import Manifest

TEMPLATES = Path(__file__).parent.parent / "templates" / "layouts"


def jetson(bundle: Path, manifest: Manifest, files: Path, out: Path) -> list[str]:
    """bundle/, SHA256SUMS, install.sh, README.md."""
    device(bundle, manifest, files, out, {"install.sh": "install.sh", "README.md": "jetson.md"})
    (out / "install.sh").chmod(0o755)
    return ["Install: copy DIR to the Jetson and run sh install.sh in it"]


def windows_rtx(bundle: Path, manifest: Manifest, files: Path, out: Path) -> list[str]:
    """bundle/, SHA256SUMS, install.ps1, requirements.txt, README.md."""
    versions = versions_in(manifest)
    known = [n for n in ("onnxruntime", "tensorrt_rtx") if n in versions]
    pins = pinned(bundle, versions, "numpy", "pillow", *known)
    if "tensorrt_rtx" not in known:
        pins.append("tensorrt_rtx>=1,<2")  # no engine in the bundle asks for the version that compiled it
    device(bundle, manifest, files, out, {"install.ps1": "install.ps1", "README.md": "windows-rtx.md"})
    (out / "requirements.txt").write_text("\n".join(pins) + "\n", encoding="utf-8")
    return ["Install: copy DIR to the PC and run powershell -ExecutionPolicy Bypass -File install.ps1 in it"]


def device(bundle: Path, manifest: Manifest, files: Path, out: Path, templates: dict[str, str]) -> None:
    """What both have: the bundle's files, their hashes, the templates with the student's name."""
    if manifest.rebuild is None:
        raise UserError(f"{bundle} holds no ONNX file that TensorRT compiles; export onnx-fp16 or onnx-int8 and bundle it.")
    os.rename(files, out / "bundle")
    there = sorted(p.relative_to(out).as_posix() for p in (out / "bundle").rglob("*") if p.is_file())
    sums = "".join(f"{sha256_file(out / name)}  {name}\n" for name in there)
    (out / "SHA256SUMS").write_text(sums, encoding="utf-8", newline="\n")
    for name, template in templates.items():
        text = (TEMPLATES / template).read_text(encoding="utf-8")
        (out / name).write_text(text.replace("STUDENT", manifest.student), encoding="utf-8", newline="\n")
