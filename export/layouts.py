"""A verified bundle laid out as other tools want it. The same bundle gives the same bytes.

triton       a Triton model repository: one model for each ONNX file or TensorRT engine, batched dynamically, and an ensemble that takes
             uint8 pictures of any size
oci          an OCI image layout that holds the bundle as an artifact: `oras copy --from-oci-layout DIR:TAG REGISTRY/NAME:TAG`
docker       a build context: a slim CPU image whose health check is the bundle's self-test
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from distill.data.preprocess import Preprocess
from distill.errors import GateFailed, UserError
from distill.files import read_json, sha256_file
from export.archive import bad_name, shown
from export.nodes import serialize
from export.preprocess_graph import PIXELS, preprocess_graph
from export.verify import ANYONE, BundledArtifact, BundledFile, Manifest, Trust, unpack

ARTIFACT_TYPE = "application/vnd.decant.bundle.v1"
LAYER_TYPE = "application/vnd.decant.bundle.v1.tar+gzip"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
EMPTY_TYPE, EMPTY = (
    "application/vnd.oci.empty.v1+json",
    b"{}",
)  # the configuration of an artifact that has none (image-spec 1.1)
TRITON = {"onnxruntime": ("onnxruntime", "model.onnx"), "tensorrt": ("tensorrt", "model.plan")}
TRITON_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8"}
QUEUE_US = 1000
"""How long Triton waits for a batch to fill: about a tenth of what a small student takes on a CPU."""
DOCKERFILE = """\
# {student}, made by Decant {decant}: features of images on the CPU.
#     docker build -t {tag} .
#     docker run --rm -v "$PWD:/data" {tag} /data/photo.jpg --out /data/features.npz
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


# ---- Triton


def triton(bundle: Path, manifest: Manifest, files: Path, out: Path) -> list[str]:
    """NAME/config.pbtxt and NAME/1/model.* for every file, NAME-pixels for the ensemble with its preprocessing."""
    served = [(a, f) for a in manifest.artifacts if a.runtime in TRITON for f in a.files]
    if not served:
        raise UserError(
            f"{bundle} holds no artifact that Triton serves (ONNX Runtime or TensorRT); export onnx-fp32 or another."
        )
    sizes = sorted({f.resolution for _, f in served})
    largest = max(a.max_batch for a, _ in served)
    for size in sizes:
        graph = preprocess_graph(settings(bundle, files, size))
        name = f"{manifest.student}-preprocess-{size}"
        ports = ([(PIXELS, "uint8", [-1, -1, 3])], [("preprocessed", "float32", [3, size, size])])
        add_model(out, name, backend_config(name, "onnxruntime", largest, *ports), "model.onnx", serialize(graph))
    for artifact, file in served:
        backend, filename = TRITON[artifact.runtime]
        name = f"{manifest.student}-{artifact.target}-{file.resolution}"
        inputs, outputs = ([(p.name, p.dtype, numbers(p.shape[1:])) for p in ports] for ports in (file.inputs, file.outputs))
        add_model(out, name, backend_config(name, backend, artifact.max_batch, inputs, outputs), filename, files / file.path)
        add_model(out, f"{name}-pixels", ensemble_config(name, manifest.student, artifact, file), None, None)
    return [f"Serve: tritonserver --model-repository=DIR (models {manifest.student}-TARGET-SIZE; -pixels takes uint8 pictures)"]


def settings(bundle: Path, files: Path, size: int) -> Preprocess:
    """What preprocess.json says of a resolution."""
    try:
        return Preprocess.from_json(read_json(files / "preprocess.json")["resolutions"][str(size)])
    except (ValueError, KeyError, TypeError) as e:
        raise GateFailed(f"{bundle}: its preprocess.json has no usable settings for {size} px; rebuild it.") from e


def numbers(shape: list[int | str]) -> list[int]:
    return [s if isinstance(s, int) else -1 for s in shape]


def add_model(out: Path, name: str, config: str, filename: str | None, content: Path | bytes | None) -> None:
    """Version 1 of a model; an ensemble's is an empty folder, which Triton insists on."""
    (out / name / "1").mkdir(parents=True)
    (out / name / "config.pbtxt").write_text(config, encoding="utf-8")
    if isinstance(content, Path):
        shutil.copyfile(content, out / name / "1" / str(filename))
    elif content is not None:
        (out / name / "1" / str(filename)).write_bytes(content)
    else:
        (out / name / "1" / ".keep").write_bytes(b"")  # git, tar and object stores lose empty folders


Ports = list[tuple[str, str, list[int]]]


def backend_config(name: str, backend: str, max_batch: int, inputs: Ports, outputs: Ports) -> str:
    """config.pbtxt of a model that a backend runs."""
    lines = [f"name: {quoted(name)}", f"backend: {quoted(backend)}", f"max_batch_size: {max_batch}"]
    lines += port_lines("input", inputs) + port_lines("output", outputs)
    return "\n".join([*lines, f"dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_US} }}"]) + "\n"


def port_lines(kind: str, ports: Ports) -> list[str]:
    lines = []
    for name, dtype, dims in ports:
        if dtype not in TRITON_TYPES:
            raise UserError(
                f"Triton's configuration is not written for {shown(dtype)} ({shown(name)}); leave out that artifact."
            )
        lines.append(f"{kind} {{ name: {quoted(name)} data_type: {TRITON_TYPES[dtype]} dims: {dims} }}")
    return lines


def ensemble_config(name: str, student: str, artifact: BundledArtifact, file: BundledFile) -> str:
    """config.pbtxt of preprocessing and model in a row."""
    outputs = [(p.name, p.dtype, numbers(p.shape[1:])) for p in file.outputs]
    lines = [f"name: {quoted(name + '-pixels')}", 'platform: "ensemble"', f"max_batch_size: {artifact.max_batch}"]
    lines += port_lines("input", [(PIXELS, "uint8", [-1, -1, 3])]) + port_lines("output", outputs)
    kept = {p.name: p.name for p in file.outputs}
    lines.append("ensemble_scheduling {")
    lines += step(f"{student}-preprocess-{file.resolution}", {PIXELS: PIXELS}, {"preprocessed": "preprocessed"})
    lines += step(name, {file.inputs[0].name: "preprocessed"}, kept)
    return "\n".join([*lines, "}"]) + "\n"


def step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> list[str]:
    maps = [
        f"    {kind}_map {{ key: {quoted(k)} value: {quoted(v)} }}"
        for kind, ports in (("input", inputs), ("output", outputs))
        for k, v in ports.items()
    ]
    return ["  step {", f"    model_name: {quoted(model)} model_version: -1", *maps, "  }"]


def quoted(text: str) -> str:
    """A string of protobuf's text format; JSON's escapes are among its own."""
    return json.dumps(text)


# ---- OCI


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


# ---- Docker


def docker(bundle: Path, manifest: Manifest, files: Path, out: Path) -> list[str]:
    """Dockerfile, requirements.txt and the unpacked bundle."""
    runtimes = sorted({a.runtime for a in manifest.artifacts} & {"onnxruntime", "openvino"})
    if not runtimes:
        raise UserError(f"{bundle} holds no artifact that runs on a CPU; export onnx-fp32 or another.")
    versions = dict(manifest.built_with)
    for artifact in manifest.artifacts:
        versions |= {r: v for r, v in artifact.compatibility.built_with.items() if r == artifact.runtime}
    pins = [f"{name}=={plain_version(bundle, name, versions)}" for name in ("numpy", "pillow", *runtimes)]
    python = ".".join(plain_version(bundle, "python", versions).split(".")[:2])
    tag = tag_of(manifest).lower().strip("._-") or "student"
    about = {"student": manifest.student, "decant": shown(manifest.decant), "python": python, "tag": tag}
    (out / "Dockerfile").write_text(DOCKERFILE.format(**about), encoding="utf-8")
    (out / "requirements.txt").write_text("\n".join(pins) + "\n", encoding="utf-8")
    os.rename(files, out / "bundle")
    return [f"Build: docker build -t {tag} DIR"]


def plain_version(bundle: Path, name: str, versions: dict[str, str]) -> str:
    """A release number such as 2.4.6, without build numbers; a manifest may say anything, and this becomes part of a command."""
    if not (found := re.match(r"\d+\.\d+(\.\d+)*", versions.get(name, ""))):
        raise UserError(f"{bundle} does not say with which version of {name} it was built; build it again.")
    return found[0]


LAYOUTS: dict[str, Callable[[Path, Manifest, Path, Path], list[str]]] = {"triton": triton, "oci": oci, "docker": docker}
