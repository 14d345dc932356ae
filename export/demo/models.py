"""The models of the page: an exported file in ONNX Runtime or OpenVINO, or the run's teacher in torch, with a stopwatch.

Shape legend: B batch, N patches, D width, S side of the square input.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from statistics import median

import numpy as np
import onnxruntime
from PIL import Image

from distill.data.preprocess import Preprocess
from distill.errors import EnvironmentFailed, UserError
from export.artifact import Artifact, ArtifactFile, Unrunnable
from export.sessions import exact_session

OUTPUTS = ["cls", "patches"]
REMEMBERED = 20  # calls that the median latency is of

Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # images [B, 3, S, S] float32 -> cls [B, D], patches [B, N, D]


@dataclass(frozen=True)
class Look:
    """What a model sees in one image.

    Attributes:
        picture: [S, S] RGB, as the network gets it.
        cls_D, patches_ND: float32. grid: rows and columns of the patches.
        preprocess_ms, model_ms: of this very call. median_ms: of the model over its last calls, this one included. calls: how many.
    """

    picture: Image.Image
    cls_D: np.ndarray
    patches_ND: np.ndarray
    grid: tuple[int, int]
    preprocess_ms: float
    model_ms: float
    median_ms: float
    calls: int


@dataclass
class Model:
    """An opened model.

    Attributes:
        name: as it stands in the page. identity: of its weights and precision, for what is kept on disk of it.
        runtime: with its version. max_batch: images a call.
    """

    name: str
    identity: str
    runtime: str
    preprocess: Preprocess
    max_batch: int
    run: Run
    times_ms: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    lock: threading.Lock = field(default_factory=threading.Lock)  # OpenVINO's requests serve one caller at a time

    def look(self, image: Image.Image) -> Look:
        """An RGB image of any size -> its features, and how long they took.

        Raises:
            UserError: the features are no numbers, or fill no square grid.
        """
        began = time.perf_counter()
        tensor = self.preprocess(image)[None]
        prepared = time.perf_counter()
        with self.lock:
            start = time.perf_counter()
            cls_BD, patches_BND = self.run(tensor)
            model_ms = (time.perf_counter() - start) * 1000
            self.times_ms.append(model_ms)
            usual, calls = median(self.times_ms), len(self.times_ms)
        if not (np.isfinite(cls_BD).all() and np.isfinite(patches_BND).all()):
            raise UserError(f"{self.name} gave NaN or infinity for this image; export it again, or choose another artifact.")
        side = round(patches_BND.shape[1] ** 0.5)
        if side * side != patches_BND.shape[1]:
            raise UserError(
                f"{self.name} gives {patches_BND.shape[1]} patches, which fill no square; the page cannot draw them."
            )
        pixels = replace(self.preprocess, normalize="none")(image).transpose(1, 2, 0)
        picture = Image.fromarray(np.clip(pixels * 255 + 0.5, 0, 255).astype(np.uint8))
        ms = (prepared - began) * 1000
        return Look(picture, cls_BD[0], patches_BND[0], (side, side), ms, model_ms, usual, calls)

    def cls(self, images: list[Image.Image]) -> np.ndarray:
        """RGB images -> [B, D] float32, in as few calls as the file allows."""
        tensors = np.stack([self.preprocess(image) for image in images])
        with self.lock:
            parts = [self.run(tensors[i : i + self.max_batch])[0] for i in range(0, len(tensors), self.max_batch)]
        return np.concatenate(parts)


def open_model(artifact: Artifact, entry: ArtifactFile, name: str, torch_allowed: bool) -> Model:
    """An artifact's file, opened on this machine.

    Args:
        torch_allowed: engines run by torch's CUDA buffers; without it they are Unrunnable here.

    Raises:
        Unrunnable: this machine cannot execute it.
        UserError: the file was changed since it was exported.
    """
    if artifact.runtime == "onnxruntime":
        run, runtime = onnx_run(artifact, entry)
    elif artifact.runtime == "openvino":
        run, runtime = openvino_run(artifact, entry)
    elif torch_allowed:
        run, runtime = engine_run(artifact, entry)
    else:
        raise Unrunnable("a TensorRT engine needs torch and a GPU in this page; open the run instead of the bundle")
    settings = Preprocess.from_json(entry.preprocess)
    return Model(name, artifact.content_sha256(entry), runtime, settings, artifact.max_batch, run)


def cores() -> int:
    """Cores that this process may use (a container often has fewer than the machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def onnx_run(artifact: Artifact, entry: ArtifactFile) -> tuple[Run, str]:
    """An ONNX file in ONNX Runtime on the CPU."""
    data = artifact.content(entry)
    try:
        session = exact_session(data, cores())
    except Exception as e:  # its exceptions have no common base; the bytes are the exported ones, so it is the runtime
        raise Unrunnable(f"onnxruntime {onnxruntime.__version__} cannot load {entry.path} ({first_line(e)})") from e

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cls, patches = session.run(OUTPUTS, {entry.inputs[0].name: images})
        return cls, patches

    return run, f"onnxruntime {onnxruntime.__version__}"


def openvino_run(artifact: Artifact, entry: ArtifactFile) -> tuple[Run, str]:
    """An ONNX file or an IR in OpenVINO on the CPU, with the precision inside that the artifact asks for."""
    try:
        import openvino
    except (ImportError, OSError) as e:
        raise Unrunnable("openvino is not installed; pip install 'decant-vision[openvino]'") from e
    runtime = f"openvino {openvino.__version__.partition('-')[0]}"
    properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": cores(), "NUM_STREAMS": 1}
    default = {"fp32": "f32", "bf16": "bf16"}.get(artifact.precision)
    if hint := artifact.details.get("openvino", {}).get("inference_precision", default):
        properties["INFERENCE_PRECISION_HINT"] = hint
    beside = PurePath(entry.path).with_suffix(".bin").name if entry.path.endswith(".xml") else None
    data = (artifact.content(entry), *(artifact.content(extra) for extra in artifact.extras if extra.path == beside))
    core = openvino.Core()
    try:
        request = core.compile_model(core.read_model(*data), "CPU", properties).create_infer_request()
    except Exception as e:  # a RuntimeError of its own; the bytes are the exported ones, so it is the runtime
        raise Unrunnable(f"{runtime} cannot load {entry.path} ({first_line(e)})") from e

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = request.infer({entry.inputs[0].name: images}, share_outputs=False)
        cls, patches = (found[name] for name in OUTPUTS)
        return cls, patches

    return run, runtime


def engine_run(artifact: Artifact, entry: ArtifactFile) -> tuple[Run, str]:
    """A TensorRT or TensorRT-RTX engine on this machine's GPU, by way of torch."""
    try:
        import torch

        from export.runtimes import open_artifact
    except ImportError as e:
        raise Unrunnable("a TensorRT engine needs torch in this page; pip install torch") from e
    try:
        encoder = open_artifact(artifact, entry.resolution)
    except EnvironmentFailed as e:
        raise Unrunnable(first_line(e)) from e

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features = encoder(torch.from_numpy(images))
        return features.cls.numpy(), features.patches.numpy()

    return run, str(encoder.conditions["runtime"])


def open_teacher(folder: Path, name: str) -> Model:
    """A model folder in torch, in its own precision.

    Raises:
        Unrunnable: torch is not installed.
        UserError: the folder holds no model of ours.
    """
    try:
        import torch
    except ImportError as e:
        raise Unrunnable("torch is not installed; pip install torch") from e
    from distill.encoder import TorchEncoder
    from distill.files import sha256_file
    from distill.models.checkpoints import load_backbone, model_info

    encoder = TorchEncoder(load_backbone(folder))
    settings = Preprocess.from_json(model_info(folder)["preprocess"])

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features = encoder(torch.from_numpy(images))
        return features.cls.numpy(), features.patches.numpy()

    return Model(name, sha256_file(folder / "backbone.safetensors"), f"torch {torch.__version__}", settings, 16, run)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
