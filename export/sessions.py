"""ONNX Runtime's sessions, as every part of export opens them."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnxruntime

# Without VNNI, ONNX Runtime multiplies 8-bit numbers by an instruction that adds two products in 16 bits and cuts off what does not fit.
# On an AVX2 machine a trained ViT-S/14 then fell from .9988 to .9979 (least CLS cosine), and a tiny network whose weights use the whole
# range to below 0. This entry takes exact products instead, for a fifth more time there (171 against 202 ms). With VNNI products are exact
# without it, and with it ONNX Runtime 1.32 took 57 ms in place of 37 for the same numbers.
EXACT_PRODUCTS = ("session.x64quantprecision", "1")
# What ONNX Runtime 1.32 says to that entry where two weights share a zero point, as in graphs of other tools; ours do not.
SHARED_ZERO_POINT = "Attempt to replace the existing tensor"


VNNI = {"avx512_vnni", "avx_vnni"}
CPU = ("CPUExecutionProvider",)


def quiet_options(
    threads: int | None = None, spinning: bool = True, entries: Mapping[str, str] = MappingProxyType({})
) -> onnxruntime.SessionOptions:
    """Nothing on the console but errors.

    Args:
        threads: of the CPU; None: all.
        spinning: threads without work burn the CPU for a while, ready for more: good for one call after the other, bad for short pieces
            with other work between them.
        entries: more of ONNX Runtime's own configuration.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return options


def exact_session(
    model: bytes | str, threads: int | None = None, providers: Sequence[str] = CPU, **more: Any
) -> onnxruntime.InferenceSession:
    """A session whose 8-bit products are exact on every processor; of a graph that ONNX Runtime cannot open so, a usual one. `more`: as of
    `quiet_options`.
    """
    if has_vnni():
        return usual_session(model, threads, providers, **more)
    options = quiet_options(threads, **more)
    options.add_session_config_entry(*EXACT_PRODUCTS)
    options.log_severity_level = 4  # what it says to a graph that it cannot open so is no news
    try:
        return onnxruntime.InferenceSession(model, options, providers=list(providers))
    except Exception as e:
        if SHARED_ZERO_POINT not in str(e):
            raise
    return usual_session(model, threads, providers, **more)


def usual_session(
    model: bytes | str, threads: int | None = None, providers: Sequence[str] = CPU, **more: Any
) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model, quiet_options(threads, **more), providers=list(providers))


@cache
def has_vnni() -> bool:
    """Whether this processor's own 8-bit products are exact; False where nobody says so (no /proc/cpuinfo)."""
    try:
        return bool(VNNI & set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()))
    except OSError:
        return False
