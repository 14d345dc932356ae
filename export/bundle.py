"""The bundle: one deterministic archive with everything that a device needs to run a student, and to prove that it runs right.

manifest.json         what the other files are (see verify.py); in a signed bundle signature.json (dsse.py) follows
artifacts/TARGET/     artifact.json and the artifact's files, as exported
preprocess.{py,json}  a copy of distill/data/preprocess.py, and its settings per resolution
heads/TASK.onnx       heads that the run's evaluations trained, if wanted (head_graph.py)
golden/               raw images (.png), their tensors (.npy), expected outputs per artifact (.npz)
infer.py selftest.py  a runtime sample and the self-test, with head.py and agreement.py; bench.py the stopwatch, with machine.py; numpy,
                      Pillow and a runtime are all they need
build_engine.py       compiles the ONNX files into engines on a device, with engine_*.py; REBUILD.md has trtexec's commands
samples/cpp/          the same sample in C++ with OpenVINO
report/               the run's report
lineage.json          what the model was made from; MODEL_CARD.md and sbom.cdx.json tell it to people and to other tools
README.md  LICENSE
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import machine, python_version, system
from typing import Any

import jinja2
import numpy as np
import onnxruntime
import PIL
import torch
from PIL import Image

from distill.data import preprocess
from distill.data.preprocess import Preprocess
from distill.errors import GateFailed, UserError
from distill.evaluate.kept_heads import KeptHead
from distill.files import replacing, sha256_file
from distill.models.checkpoints import model_info
from distill.progress import Progress
from distill.rows import Row
from export.artifact import NAME, Artifact, ArtifactFile, ExtraFile
from export.bundling import golden
from export.bundling.archive import CHUNK, bad_name, write_archive
from export.bundling.bundle_config import BundleConfig
from export.bundling.bundle_golden import Vectors, add_golden
from export.bundling.bundle_heads import add_heads, choose_heads
from export.bundling.dsse import SIGNATURE
from export.bundling.keys import PrivateKey, PublicKey
from export.bundling.model_card import model_card
from export.bundling.ports import LAYOUTS
from export.bundling.rebuild import kit, rebuild
from export.bundling.sbom import sbom
from export.bundling.signing import LINEAGE, first_envelope
from export.bundling.verify import ANYONE, FORMAT, MANIFEST, Trust, verify
from export.graphs.nodes import load_graph, serialize
from export.graphs.preprocess_graph import PIXELS, SUFFIX, with_preprocess
from export.targets import SPECS, ExportConfig

TEMPLATES = Path(__file__).parent / "templates" / "bundle"
COPIED = (
    *("infer.py", "selftest.py", "bench.py", "head.py", "agreement.py", "machine.py"),
    *("LICENSE", "samples/cpp/main.cpp", "samples/cpp/Makefile"),
)
REPORT_SUFFIXES = (".html", ".json", ".csv", ".md")
Content = bytes | Path
Json = dict[str, Any]


@dataclass(frozen=True)
class BundleInputs:
    """What a run supplies of a student.

    Attributes:
        run: what to say about the run (JSON), e.g. its name and fingerprint.
        artifacts: all of the student's; those not chosen still serve as sources of expected outputs.
        model_folder: the student in PyTorch: the last source of expected outputs, and part of the lineage.
        golden_images: at least `BundleConfig.golden_images`; more are ignored.
        report_folder: of the run's report, which goes in.
        lineage: what the model was made from (JSON), e.g. teacher, data, licences.
        rows: what was measured of this student, for its model card.
        heads: those that an evaluation trained on this student, for `BundleConfig.heads` to choose from.
        export: the recipe's export settings, by which a device compiles engines.
    """

    student: str
    run: Json
    artifacts: list[Artifact]
    model_folder: Path
    golden_images: list[Image.Image]
    report_folder: Path | None
    lineage: Json
    rows: Sequence[Row] = ()
    heads: Sequence[KeptHead] = ()
    export: ExportConfig = field(default_factory=ExportConfig)


def build_bundle(config: BundleConfig, inputs: BundleInputs, out: Path, progress: Progress) -> Path:
    """Write `out`, a .tar.gz that `verify` accepts; the same inputs give the same bytes. It is whole or not there.

    Raises:
        UserError: a chosen artifact or head does not exist or was changed, there are too few images, or the key cannot be read.
        GateFailed: a model gives NaN on a golden image, or the archive does not verify.
    """
    chosen, key = choose(config, inputs.artifacts), config.key()
    if len(inputs.golden_images) < (need := config.golden_images):
        have = len(inputs.golden_images)
        raise UserError(f"The bundle needs {need} golden images and got {have}; lower bundle.golden_images.")
    settings, with_heads = preprocess_settings(chosen), choose_heads(config.heads, inputs.heads, chosen)
    files = artifact_files(chosen)
    if config.preprocess_in_graph:
        files |= graphs_with_preprocess(chosen)
    images = [golden.golden_image(image) for image in inputs.golden_images[:need]]
    vectors = add_golden(files, config, chosen, inputs.artifacts, settings, images, inputs.model_folder, progress)
    heads = add_heads(files, with_heads, vectors.features, config.tolerance("fp32", same=True))
    section = rebuild_section(config, inputs, chosen, vectors, files)
    files |= kit(section, TEMPLATES) if section else {}
    files["preprocess.py"] = Path(preprocess.__file__)
    files["preprocess.json"] = as_json({"resolutions": {str(r): p.to_json() for r, p in settings.items()}})
    files |= {name: TEMPLATES / name for name in COPIED}
    files |= report_files(inputs.report_folder)
    about = add_origin(files, inputs, chosen, heads)
    told = {"report": "report/index.html" in files, "in_graph": config.preprocess_in_graph, "rebuild": section is not None}
    files["README.md"] = readme(inputs.student, chosen, heads, **told)
    text = as_json(manifest(config, inputs.student, chosen, vectors, heads, files) | ({"rebuild": section} if section else {}))
    signature = {} if key is None else {SIGNATURE: signed(text, about, key)}
    write(out, {MANIFEST: text, **signature}, files, progress, None if key is None else key.public)
    return out


def rebuild_section(
    config: BundleConfig, inputs: BundleInputs, chosen: list[Artifact], vectors: Vectors, files: dict[str, Content]
) -> Json | None:
    """The manifest's `rebuild`, from the golden outputs among `files`."""
    given = {name: content for name, content in files.items() if isinstance(content, bytes)}
    tolerance = partial(config.tolerance, same=False)
    return rebuild(chosen, vectors.expected, given, tolerance, inputs.export, inputs.model_folder)


def add_origin(files: dict[str, Content], inputs: BundleInputs, chosen: list[Artifact], heads: list[Json]) -> Json:
    """Add what tells people and other tools what the model was made from -> the value of lineage.json."""
    model = model_lineage(inputs.model_folder)
    about = {"student": inputs.student, "run": inputs.run, "model": model, "lineage": inputs.lineage}
    files[LINEAGE] = as_json(about)
    files["MODEL_CARD.md"] = model_card(inputs.student, chosen, inputs.rows, about, heads)
    inside = bundled(heads, files)
    files["sbom.cdx.json"] = as_json(sbom(inputs.student, decant_version(), chosen, inputs.rows, about, built_with(), inside))
    return about


def choose(config: BundleConfig, artifacts: list[Artifact]) -> list[Artifact]:
    """The artifacts that go in, in the order of the config or of the export."""
    have = {a.target: a for a in artifacts}
    foreign = [t for t, a in have.items() if any(not e.path.endswith((".onnx", ".engine")) for e in a.files)]
    if config.targets is not None and (first := [t for t in config.targets if t in foreign]):
        raise UserError(f"bundle.targets names {first[0]}, whose files are no single ONNX file or engine; leave it out.")
    own = [t for t in have if t not in foreign and (t not in SPECS or SPECS[t].ours)]
    wanted = config.targets if config.targets is not None else own
    if missing := [t for t in wanted if t not in have]:
        made = ", ".join(have) or "nothing"
        raise UserError(f"bundle.targets names {', '.join(missing)}, and export made {made}; add it to export's targets.")
    if not wanted:
        raise UserError("There is no artifact to bundle; run the export stage first.")
    return [have[t] for t in wanted]


def preprocess_settings(artifacts: list[Artifact]) -> dict[int, Preprocess]:
    """Resolution -> settings, which all artifacts of a resolution share."""
    settings: dict[int, Preprocess] = {}
    for artifact in artifacts:
        for entry in artifact.files:
            own = Preprocess.from_json(entry.preprocess)
            if settings.setdefault(entry.resolution, own) != own:
                where = f"{artifact.path(entry)} is preprocessed otherwise than the rest at {entry.resolution} px"
                raise UserError(f"{where}; run the export stage again for all targets.")
    return dict(sorted(settings.items()))


def artifact_files(artifacts: list[Artifact]) -> dict[str, Content]:
    """artifact.json and every file that it names, their hashes checked."""
    files: dict[str, Content] = {}
    for artifact in artifacts:
        files[f"artifacts/{artifact.target}/{NAME}"] = artifact.folder / NAME
        entries: list[ArtifactFile | ExtraFile] = [*artifact.files, *artifact.extras]
        for entry in entries:
            path = artifact.path(entry)
            if not path.is_file() or sha256_file(path) != entry.sha256:
                raise UserError(f"{path} is missing or was changed since it was exported; run the export stage again.")
            files[f"artifacts/{artifact.target}/{entry.path}"] = path
    return files


def graphs_with_preprocess(artifacts: list[Artifact]) -> dict[str, Content]:
    """The ONNX files of the artifacts with the preprocessing in front."""
    files: dict[str, Content] = {}
    for artifact in artifacts:
        for entry in artifact.files:
            if path := path_with_preprocess(artifact, entry):
                graph = with_preprocess(load_graph(artifact.path(entry)), Preprocess.from_json(entry.preprocess))
                files[path] = serialize(graph)
    return files


def path_with_preprocess(artifact: Artifact, entry: ArtifactFile) -> str | None:
    """Where a bundle has the file with the preprocessing in front, if it can have one."""
    exact = artifact.runtime != "openvino" or artifact.details.get("openvino", {}).get("inference_precision") == "f32"
    if not entry.path.endswith(".onnx") or not exact:
        return None
    return f"artifacts/{artifact.target}/{entry.path.removesuffix('.onnx')}{SUFFIX}"


def manifest(
    config: BundleConfig,
    student: str,
    chosen: list[Artifact],
    vectors: Vectors,
    heads: list[Json],
    files: dict[str, Content],
) -> Json:
    """The value of manifest.json; `verify.Manifest` is its schema."""
    return {
        "format": FORMAT,
        "layout": config.layout,
        "student": student,
        "decant": decant_version(),
        "built_with": built_with(),
        "artifacts": [described(a, vectors.expected, config.preprocess_in_graph) for a in chosen],
        "golden": vectors.about,
        **({"heads": heads} if heads else {}),
        "files": [{"path": name, "bytes": size(files[name]), "sha256": hashed(files[name])} for name in sorted(files)],
    }


def described(artifact: Artifact, expected: dict[str, Json], in_graph: bool) -> Json:
    """An artifact in the manifest."""
    native = artifact.runtime not in (
        "onnxruntime",
        "openvino",
    )  # an engine is machine code: for this system and these GPUs only
    files = []
    for entry in artifact.files:
        path = f"artifacts/{artifact.target}/{entry.path}"
        ports = {
            kind: [{**spec.model_dump(), "layout": LAYOUTS[spec.name]} for spec in specs]
            for kind, specs in (("inputs", entry.inputs), ("outputs", entry.outputs))
        }
        files.append({"path": path, "resolution": entry.resolution, **ports, "expected": expected[path]})
        if in_graph and (inside := path_with_preprocess(artifact, entry)):
            pixels = {"name": PIXELS, "dtype": "uint8", "shape": ["batch", "height", "width", 3], "layout": LAYOUTS[PIXELS]}
            files[-1]["with_preprocess"] = {"path": inside, "inputs": [pixels]}
    # ONNX is opened by whatever onnxruntime is there; the version that computed the golden outputs is the one known to work.
    runtime = {"onnxruntime": onnxruntime.__version__} if artifact.runtime == "onnxruntime" else {}
    same = artifact.model_dump(include={"target", "precision", "runtime", "dim", "patch", "opset", "max_batch"})
    where = {
        "runtime": artifact.runtime,
        "built_with": {**artifact.versions, **runtime},
        "systems": [system().lower()] * native,
        "machines": [machine().lower()] * native,
        "compute_capabilities": artifact.compute_capabilities,
    }
    if inside := artifact.details.get("openvino", {}).get("inference_precision"):
        where["inference_precision"] = inside
    return {**same, "files": files, "compatibility": where}


def bundled(heads: list[Json], files: dict[str, Content]) -> list[Json]:
    """The manifest's heads with their sha256."""
    return [{**head, "sha256": hashed(files[head["path"]])} for head in heads]


def built_with() -> dict[str, str]:
    """What computes the golden data."""
    return {"python": python_version(), "numpy": np.__version__, "pillow": PIL.__version__, "torch": str(torch.__version__)}


def signed(text: bytes, about: Json, key: PrivateKey) -> bytes:
    """signature.json for a manifest of these bytes."""
    return first_envelope(json.loads(text), sha256(text).hexdigest(), about, key).to_bytes()


def write(
    out: Path, first: dict[str, bytes], files: dict[str, Content], progress: Progress, signer: PublicKey | None = None
) -> None:
    """Write the archive beside `out`, verify it, rename it.

    Args:
        first: the manifest and, in a signed bundle, the signature. signer: who must have signed it.
    """
    for name in files:
        if reason := bad_name(name):
            raise UserError(f"This file cannot go into a bundle: {reason}; rename it.")

    def members() -> Iterator[tuple[str, int, Iterator[bytes]]]:
        for name, text in first.items():
            yield name, len(text), iter([text])
        for entry in json.loads(first[MANIFEST])["files"]:
            yield entry["path"], entry["bytes"], pieces(files[entry["path"]])
            task.advance()

    with replacing(out) as part:
        try:
            with progress.task(f"bundle {out.name}", len(files), "files") as task:
                write_archive(part, members())
            verify(part, trust=ANYONE if signer is None else Trust((signer,)))
        except (GateFailed, ValueError) as e:  # a file changed meanwhile, or is larger than a bundle may be
            raise GateFailed(f"{out} was not written, because the archive does not verify ({e}).") from e


def model_lineage(folder: Path) -> Json:
    """What model.json says of a model, and the hash of its weights."""
    info = model_info(folder)
    weights = sha256_file(folder / "backbone.safetensors")
    return {"backbone": info["backbone"], "lineage": info["lineage"], "weights_sha256": weights}


def report_files(folder: Path | None) -> dict[str, Content]:
    """The report's pages and tables, under report/. What only the runner needs stays out."""
    if folder is None:
        return {}
    found = [p for p in folder.rglob("*") if p.is_file() and p.suffix in REPORT_SUFFIXES]
    found = [p for p in found if p.name != "done.json" and not p.name.startswith(".")]
    return {f"report/{p.relative_to(folder).as_posix()}": p for p in found}


def readme(student: str, artifacts: list[Artifact], heads: list[Json], report: bool, in_graph: bool, rebuild: bool) -> bytes:
    """README.md of the bundle."""
    rows = []
    for a in artifacts:
        gpus = f", GPUs of compute capability {', '.join(a.compute_capabilities)}" if a.compute_capabilities else ""
        rows.append(
            {
                "target": a.target,
                "precision": a.precision,
                "runs_on": a.runtime + gpus,
                "input": ", ".join(f"{e.resolution} px" for e in a.files),
                "max_batch": a.max_batch,
                "size": f"{sum(e.bytes for e in a.files) / 1e6:.1f} MB",
            }
        )
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    template = environment.from_string((TEMPLATES / "README.md.j2").read_text(encoding="utf-8"))
    text = template.render(
        student=student,
        decant=decant_version(),
        dim=artifacts[0].dim,
        patch=artifacts[0].patch,
        report=report,
        in_graph=in_graph,
        rebuild=rebuild,
        artifacts=rows,
        heads=heads,
        engines=any(a.runtime in ("tensorrt", "tensorrt_rtx") for a in artifacts),
    )
    return text.encode()


def decant_version() -> str:
    try:
        return version("decant-vision")
    except PackageNotFoundError:  # run from a checkout
        return "unversioned"


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def hashed(content: Content) -> str:
    return sha256(content).hexdigest() if isinstance(content, bytes) else sha256_file(content)


def pieces(content: Content) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with open(content, "rb") as f:
        while piece := f.read(CHUNK):
            yield piece
