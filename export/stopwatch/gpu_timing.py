"""What the GPU alone takes: its own events around the network, images and features staying on the GPU.

The end-to-end time of a call holds copies, launches and this process's own work besides; both are told apart in every report.
With a CUDA graph the launches of all kernels are recorded once and replayed at once, which is what servers do with small batches.
`cuda` is `torch.cuda`; tests bring their own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

CAPTURE_WARM_UP = 3  # calls before a capture: lazy initialisation must not be recorded


@dataclass(frozen=True)
class GpuWork:
    """One call of a network on the GPU: `run` enqueues it on `stream` (None: the current one) and does not wait."""

    run: Callable[[], object]
    stream: Any = None


def gpu_work(encoder: Any, images: Tensor | dict[str, np.ndarray]) -> GpuWork | str:
    """The part of an encoder's call that runs on the GPU, for images [B, 3, H, W] or a foreign engine's inputs by name; a sentence where it
    cannot be had alone.
    """
    runtime = str(encoder.conditions.get("runtime", ""))
    if hasattr(encoder, "infer"):  # an engine
        if isinstance(images, dict):
            fed: Any = {name: torch.from_numpy(x).to("cuda") for name, x in images.items()}
        else:
            fed = images.to("cuda")
        return GpuWork(lambda: encoder.infer(fed), encoder.stream)
    if hasattr(encoder, "backbone"):  # PyTorch
        assert isinstance(images, Tensor)
        on_gpu = images.to(encoder.device)

        def run() -> object:
            with torch.inference_mode():
                return encoder.backbone(on_gpu)

        return GpuWork(run)
    return f"{runtime or 'this runtime'} runs on CUDA streams of its own, which no event of ours can stand in."


def captured(work: GpuWork, cuda: Any = torch.cuda) -> GpuWork | str:
    """The same work as a CUDA graph, or why it cannot be captured."""
    side = work.stream or cuda.Stream()
    try:
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for _ in range(CAPTURE_WARM_UP):
                work.run()
        cuda.synchronize()
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=side):
            kept = work.run()
    except RuntimeError as e:  # CUDA's errors come as this
        return f"it cannot be captured into a CUDA graph: {' '.join(str(e).split())[:200]}."

    def replay(outputs: object = kept) -> object:  # the graph writes into them: they live as long as it does
        graph.replay()
        return outputs

    return GpuWork(replay, side)


def event_seconds(work: GpuWork, calls: int, cuda: Any = torch.cuda) -> np.ndarray:
    """[calls] seconds between two events around each call; the calls are enqueued together and waited for once."""
    stream = work.stream or cuda.current_stream()
    pairs = [(cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)) for _ in range(calls)]
    with cuda.stream(stream):
        for start, end in pairs:
            start.record(stream)
            work.run()
            end.record(stream)
    stream.synchronize()
    return np.array([start.elapsed_time(end) / 1e3 for start, end in pairs])
