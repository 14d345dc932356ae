"""What this machine has, and what each missing thing would give."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from export.fingerprint import fingerprint

GB = 1e9
ROOM_GB = 5.0  # a run with checkpoints, exports and a bundle of ViT-S to ViT-B students


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        works: it is there and did what it was asked to.
        found: what is there, or why not.
        gives: what it is good for, or what to do to have it.
        needed: decant does not work without it.
    """

    name: str
    works: bool
    found: str
    gives: str
    needed: bool = False


def examine(folder: Path) -> list[Finding]:
    """Look at everything; `folder` is where runs would be written."""
    machine = fingerprint()
    return [*_needed(), *_processor(machine), *_graphics(machine), *_runtimes(), _disk(folder)]


def _needed() -> Iterator[Finding]:
    yield _tried(
        "torch", _torch_works, "training and evaluation", "install it again: pip install --force-reinstall torch", needed=True
    )
    again = "install it again: pip install --force-reinstall onnxruntime"
    yield _tried("onnxruntime", _onnxruntime_works, "evaluation and benchmark of ONNX files", again, needed=True)


def _tried(name: str, trial: Callable[[], str], gives: str, remedy: str, needed: bool = False) -> Finding:
    """Any failure of a native package counts as not working, whatever it raises."""
    try:
        return Finding(name, True, trial(), gives, needed)
    except Exception as e:
        missing = isinstance(e, ModuleNotFoundError) and e.name == name  # PackageNotFoundError is one too
        why = "not installed" if missing else f"does not work: {(str(e).splitlines() or [type(e).__name__])[0]}"
        return Finding(name, False, why, remedy, needed)


def _torch_works() -> str:
    torch = import_module("torch")
    product = torch.ones(4, 4) @ torch.ones(4, 4)
    if product.sum().item() != 64:
        raise RuntimeError("a matrix product came out wrong")
    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def _onnxruntime_works() -> str:
    helper, numpy, runtime = import_module("onnx.helper"), import_module("numpy"), import_module("onnxruntime")
    value = [helper.make_tensor_value_info(name, 1, [4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "doubled", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    if session.run(None, {"x": numpy.ones(4, numpy.float32)})[0].tolist() != [2.0] * 4:
        raise RuntimeError("a sum came out wrong")
    return f"{runtime.__version__}, {', '.join(p.removesuffix('ExecutionProvider') for p in runtime.get_available_providers())}"


def _processor(machine: dict[str, Any]) -> Iterator[Finding]:
    cpu, features = machine["cpu"], set(machine["cpu"]["features"])
    yield Finding("processor", True, f"{cpu['model']}, {cpu['usable_threads']} threads, {machine['memory_gb']} GB", "")
    kinds = {
        "bf16": ({"avx512_bf16", "amx_bf16", "bf16"}, "training of wide models in bf16 (precision: auto)"),
        "int8 products": ({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}, "INT8 artifacts faster than FP32 ones"),
        "matrix tiles": ({"amx_tile"}, "faster bf16 and int8 products (Intel Xeons since 2023)"),
    }
    for name, (wanted, gives) in kinds.items():
        have = sorted(features & wanted)
        yield Finding(name, bool(have), ", ".join(have) or "this processor has none", gives if have else f"would give {gives}")


def _graphics(machine: dict[str, Any]) -> Iterator[Finding]:
    for gpu in machine["gpus"]:
        yield Finding("GPU", True, f"{gpu['name']}, {gpu['memory_gb']} GB", "training at full scale, execution of engines")
    if not machine["gpus"]:
        yield Finding(
            "GPU", False, "none", "would give training at full scale, and engines that are measured, not only compiled"
        )


def _runtimes() -> Iterator[Finding]:
    def versioned(name: str) -> Callable[[], str]:
        return lambda: str(import_module(name).__version__)

    compiled = "TensorRT-RTX engines, compiled with or without a GPU"
    yield _tried("tensorrt_rtx", versioned("tensorrt_rtx"), compiled, f"would give {compiled}: pip install tensorrt_rtx")
    full = "TensorRT engines for this machine's GPU"
    yield _tried("tensorrt", versioned("tensorrt"), full, f"would give {full}: pip install 'decant-vision[tensorrt]'")
    served = "openvino targets, often the fastest on a CPU"
    yield _tried("openvino", versioned("openvino"), served, f"would give {served}: pip install 'decant-vision[openvino]'")
    page = "the page of `decant demo`"
    yield _tried("gradio", partial(version, "gradio"), page, f"would give {page}: pip install 'decant-vision[demo]'")
    videos = "evaluation on videos"
    yield _tried("av", versioned("av"), videos, f"would give {videos}: pip install 'decant-vision[video]'")


def _disk(folder: Path) -> Finding:
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / GB
    enough = free >= ROOM_GB
    gives = "" if enough else f"free {ROOM_GB - free:.1f} GB more for a run with checkpoints, exports and bundles"
    return Finding("disk", enough, f"{free:.1f} GB free", gives)


def table(findings: list[Finding]) -> Any:
    """The findings as a rich table."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("", "what", "found", "good for"):
        shown.add_column(title)
    for f in findings:
        state = Text("ok", "green") if f.works else Text("MISSING", "bold red") if f.needed else Text("-", "yellow")
        shown.add_row(state, Text(f.name), Text(f.found), Text(f.gives))
    return shown
