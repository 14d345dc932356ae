"""The accuracy budget's search, composed for an export: which layers of this student stay in floating point."""

from pathlib import Path

from torch import Tensor

from distill.files import sha256_file, write_bytes
from export.artifact import Artifact, ArtifactFile
from export.benchmark import BenchmarkConfig
from export.graph import load_graph, serialize
from export.quantize import QuantizeConfig, quantize
from export.quantizing.budget import LEDGER, BudgetResult, Kept, Ledger, Measured, search, sensitivity
from export.quantizing.budget_measures import Candidate, GalleryLoss, Measures, add_latency
from export.quantizing.calibration import Calibration
from export.quantizing.naive import quantize_everything
from export.quantizing.plan import plan_graph
from export.runtimes import OnnxEncoder, open_artifact
from export.targets import Job

NAIVE_IMAGES = 32
TIMING = BenchmarkConfig(batches=[1], seconds=1.0, rounds=10, warmup_seconds=0.5)


def search_kept(
    job: Job, source: Artifact, entry: ArtifactFile, calibration: Calibration, settings: QuantizeConfig
) -> BudgetResult:
    """Search on the artifact itself, quantized with one calibration and more or fewer layers kept; the measurements lie in `job.out`."""
    budget = settings.budget
    assert budget is not None
    path, precision = source.path(entry), job.spec.precision
    graph = load_graph(path)
    plan = [e for e in plan_graph(graph, settings, precision) if e.decision == precision]
    layers = {e.layer: e.mflops for e in plan}

    def make(kept: Kept) -> Candidate:
        return _candidate(job, entry, _bytes(path, calibration, settings, precision, kept))

    reference = open_artifact(source, entry.resolution)
    images = job.images.held_out(budget.images, entry.resolution, settings.images)
    loss: GalleryLoss | None = None
    if job.images.accuracy is not None and budget.asks_accuracy():
        loss = job.images.accuracy(entry.resolution, reference, entry.sha256, job.out / "features", job.progress)
    measures = Measures(budget, make, reference, images, loss)
    identity = {
        "source": sha256_file(path),
        "settings": settings.model_dump(),
        "precision": precision,
        "calibration": calibration.to_json(),
        "accuracy": loss.about() if loss is not None else None,
    }
    ledger = Ledger(job.out / LEDGER, identity)
    title = f"{job.target} of {job.student}"
    found = sensitivity(layers, measures.cosine, ledger, job.progress, f"{title}: sensitivity")
    naive = _naive(job, entry, path, images, measures) if precision == "int8" else None
    result = search(budget, found, measures, ledger, job.progress, f"{title}: budget", naive, measures.confirm)
    return add_latency(result, make, entry.resolution, TIMING)


def _naive(job: Job, entry: ArtifactFile, path: Path, images: Tensor, measures: Measures) -> Measured:
    """What a plan without knowledge of the network would give, for the report: everything quantized."""
    calibrating = job.images.training(NAIVE_IMAGES, entry.resolution)
    data = serialize(quantize_everything(path, calibrating))
    return measures.of(_candidate(job, entry, data))


def _bytes(path: Path, calibration: Calibration, settings: QuantizeConfig, precision: str, kept: Kept) -> bytes:
    with_kept = settings.model_copy(update={"keep": [*settings.keep, *sorted(kept)]})
    return serialize(quantize(load_graph(path), calibration, with_kept, precision)[0])


def _candidate(job: Job, entry: ArtifactFile, data: bytes) -> Candidate:
    """The graph on the runtime of its target, from a file that is no artifact of the run and goes once it is opened."""
    path = job.out / f"candidate_{entry.resolution}.onnx"
    write_bytes(path, data)
    try:
        described = entry.model_copy(update={"path": path.name, "sha256": sha256_file(path), "bytes": len(data)})
        artifact = job.source("onnx-fp32").model_copy(
            update={"target": job.target, "precision": job.spec.precision, "files": [described], "folder": job.out}
        )
        return Candidate(OnnxEncoder(artifact, described), len(data))
    finally:
        path.unlink(missing_ok=True)
