"""A verified bundle laid out as other tools and devices want it. The same bundle gives the same bytes.

triton       a Triton model repository: one model for each ONNX file or TensorRT engine, batched dynamically, and an ensemble that takes
             uint8 pictures of any size
oci          an OCI image layout that holds the bundle as an artifact: `oras copy --from-oci-layout DIR:TAG REGISTRY/NAME:TAG`
docker       a build context: a slim CPU image whose health check is the bundle's self-test
jetson       a folder with install.sh: verifies, compiles engines on the Jetson, tests them
windows-rtx  a folder with install.ps1, which does the same with TensorRT for RTX
"""

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from distill.errors import UserError
from export.bundling.archive import bad_name, shown
from export.bundling.layout_device import jetson, windows_rtx
from export.bundling.layout_docker import docker
from export.bundling.layout_oci import oci
from export.bundling.layout_triton import triton
from export.bundling.verify import ANYONE, Manifest, Trust, unpack

LAYOUTS: dict[str, Callable[[Path, Manifest, Path, Path], list[str]]] = {
    "triton": triton,
    "oci": oci,
    "docker": docker,
    "jetson": jetson,
    "windows-rtx": windows_rtx,
}


def layout(bundle: Path, to: str, out: Path, trust: Trust = ANYONE) -> list[str]:
    """Verify a bundle, write it to the folder `out` in the layout `to`, and return the lines to print. The folder is whole or not there.

    Raises:
        UserError: no such bundle or layout, `out` exists, or the bundle holds nothing for this layout.
        GateFailed: the bundle does not verify, or was not signed by whom `trust` names.
    """
    if to not in LAYOUTS:
        raise UserError(f"There is no layout {to}; choose one of {', '.join(LAYOUTS)}.")
    if out.exists():
        raise UserError(f"{out} exists; name a new folder for the layout.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".part-", dir=out.parent) as work:
        files, made = Path(work) / "bundle", Path(work) / "layout"
        manifest = unpack(bundle, files, trust=trust).manifest
        if bad_name(manifest.student) or "/" in manifest.student:
            raise UserError(
                f"{bundle} names its student {shown(manifest.student)}, which is no file name; build it under another."
            )
        made.mkdir()
        lines = LAYOUTS[to](bundle, manifest, files, made)
        os.rename(made, out)
    return [f"Wrote {out}: {manifest.student} as {to}.", *(line.replace("DIR", str(out)) for line in lines)]
