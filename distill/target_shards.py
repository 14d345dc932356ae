"""Cached teacher targets on disk: how a target becomes bytes, and files of many steps from which a few crops are read.

A shard is one safetensors file with the rows of one process, step after step, each step crop-major as in the batch:

    steps         [T]        which steps
    chosen, mask  [T C]      patches chosen for iBOT, and a checksum of which ones
    view          [T C, 4]   mean brightness of the crop's quarters: a mirrored or misplaced crop shows
    lost          [T C, 2]   mass outside the kept prototypes, of CLS and (mean) of the crop's chosen patches
    dino/...      [T C, k]   of CLS;   ibot/... [sum of chosen, k'] of the chosen patches:
        values    float16: its error (2^-11 of each value) is far below the mass that leaving out prototypes costs
        low       index: uint8 for at most 256 prototypes, else its lower 16 bits
        high      bits 16, 17, ... of the index, 8 entries a byte: [rows, bits, ceil(k / 8)]; only beyond 65,536 prototypes
      or, where no k is set:
        vector    float16 [.., E]: what the head multiplies with its prototypes
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.nn import functional as F

from distill.errors import UserError
from distill.files import replacing
from distill.losses.assignments import TopK, normalised
from distill.same_settings import FORMAT

CROP_BYTES = 4 + 4 + 4 * 2 + 2 * 2  # chosen, mask, view, lost
SAME_VIEW = 0.02  # float16 rounds a quarter's mean by at most 0.002; a mirrored crop differs by tenths

Rows = dict[str, np.ndarray]
Target = TopK | Tensor  # the largest probabilities; or bottleneck vectors [S, E], from which they can be made


def encode(target: Target, prototypes: int = 0) -> Rows:
    """values, low and perhaps high; or vector."""
    if isinstance(target, Tensor):
        return {"vector": target.detach().float().cpu().numpy().astype(np.float16)}
    topk = target
    indices = topk.indices.cpu().numpy()
    rows: Rows = {"values": topk.values.cpu().numpy().astype(np.float16)}
    rows["low"] = indices.astype(np.uint8) if prototypes <= 256 else (indices & 0xFFFF).astype(np.uint16)
    if bits := high_bits(prototypes):
        rows["high"] = np.packbits(np.stack([indices >> (16 + b) & 1 for b in range(bits)], 1).astype(np.uint8), axis=-1)
    return rows


def decode(rows: Rows) -> Target:
    """What `encode` wrote, as every reader gets it: float32, probabilities renormalised after the rounding."""
    if "vector" in rows:
        return torch.from_numpy(rows["vector"].astype(np.float32))
    values = torch.from_numpy(rows["values"].astype(np.float32))
    indices = rows["low"].astype(np.int64)
    if "high" in rows:
        bits = np.unpackbits(rows["high"], axis=-1, count=indices.shape[1])
        for b in range(bits.shape[1]):
            indices |= bits[:, b].astype(np.int64) << (16 + b)
    return normalised(values, torch.from_numpy(indices))


def high_bits(prototypes: int) -> int:
    """Bits of an index beyond 16."""
    return max(0, (prototypes - 1).bit_length() - 16)


def row_bytes(k: int | None, prototypes: int, bottleneck: int) -> int:
    """Bytes of one target with the k largest of `prototypes` entries, or as a vector."""
    if k is None:
        return 2 * bottleneck
    k = min(k, prototypes)
    return k * (3 if prototypes <= 256 else 4) + high_bits(prototypes) * -(-k // 8)


def mask_checksums(chosen_CN: Bool[Tensor, "c n"]) -> np.ndarray:
    """uint32 [C]; equal only for equal masks, but for one chance in four billion."""
    packed = np.packbits(chosen_CN.cpu().numpy(), axis=1)
    return np.array([zlib.crc32(row.tobytes()) for row in packed], np.uint32)


def quarter_means(crops_C3HW: Float[Tensor, "c 3 h w"]) -> np.ndarray:
    """Mean of each quarter's pixels, of at most 64 rows and columns evenly spread; float32 [C, 4]."""
    rows, columns = (max(1, side // 32) for side in crops_C3HW.shape[-2:])
    few = crops_C3HW[..., ::rows, ::columns].detach().float()
    return F.adaptive_avg_pool2d(few.mean(1, keepdim=True), 2).flatten(1).cpu().numpy()


class Shard:
    """Steps of one process, in memory or in a file.

    Attributes:
        steps: which, in order of writing.
        rows: name -> anything that can be sliced along its first axis (an array, or a safetensors slice that reads only what it is asked).
    """

    def __init__(self, steps: np.ndarray, rows: Mapping[str, Any], crops: int):
        self.steps, self.rows, self.crops = steps, rows, crops
        self.patches = np.concatenate([[0], np.cumsum(rows["chosen"][:], dtype=np.int64)])

    def read(self, t: int, crops: range) -> Rows:
        """Rows of these crops (of one process: 2b, crop-major) of the t-th step."""
        a, b = t * self.crops + crops.start, t * self.crops + crops.stop
        p, q = int(self.patches[a]), int(self.patches[b])
        p, q = (p, q) if p < q else (0, 0)  # safetensors refuses an empty slice at a tensor's end
        return {name: x[p:q] if name.startswith("ibot/") else x[a:b] for name, x in self.rows.items()}


def write_shard(path: Path, steps: list[int], records: list[Rows], about: dict[str, Any]) -> None:
    """One file, whole or not at all.

    Raises:
        EnvironmentFailed: the disk is full.
    """
    tensors = {name: np.concatenate([r[name] for r in records]) for name in records[0]}
    with replacing(path) as part:
        save_file(tensors | {"steps": np.array(steps, np.int64)}, part, {"format": FORMAT, "about": json.dumps(about)})


def open_shard(path: Path) -> tuple[Shard, dict[str, Any]]:
    """A shard that reads from disk what it is asked for, and what `write_shard` was told about it.

    Raises:
        UserError: the file is damaged or no shard.
    """
    try:
        file = safe_open(path, framework="numpy")  # checks that header and length agree
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"format {metadata.get('format')!r}, not {FORMAT!r}")
        about = json.loads(metadata["about"])
        rows = {name: file.get_slice(name) for name in file.keys() if name != "steps"}  # noqa: SIM118 (no mapping)
        rows |= {name: file.get_tensor(name) for name, x in rows.items() if x.get_shape()[0] == 0}  # which cannot be sliced
        steps = file.get_tensor("steps")
        return Shard(steps, rows, len(rows["chosen"][:]) // len(steps)), about
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
        first = " ".join(str(e).split())[:200]
        raise UserError(
            f"{path} is not a whole file of cached targets ({first}). Delete this file: its targets will be computed again."
        ) from e


def totals(records: list[Rows]) -> dict[str, float]:
    """Numbers of crops and chosen patches, and sums over them of the mass lost (targets that are not finite left out)."""
    t = dict.fromkeys(("crops", "patches", "dino_lost", "ibot_lost"), 0.0)
    for r in records:
        lost = np.nan_to_num(r["lost"].astype(np.float64), posinf=0, neginf=0)
        t["crops"] += len(lost)
        t["patches"] += float(r["chosen"].sum())
        t["dino_lost"] += float(lost[:, 0].sum())
        t["ibot_lost"] += float(lost[:, 1] @ r["chosen"])
    return t
