"""Teacher targets kept on disk: a second student, a second epoch or a rerun with the same crops pays no teacher.

A batch is a function of (source, settings, seed, step), so its targets are too. Of each target the cache keeps either

    the bottleneck vector   what the head multiplies with its prototypes. That product, centring and temperature are done anew, so the
                            target is the live one up to float16 (2^-11 a coordinate), at any batch and temperature
    the k largest           of its probabilities, renormalised. No teacher at all at replay, and few bytes where targets are sharp; what
                            that costs is bounded by the mass lost (`distill/losses/assignments.py`), which is measured and reported

and first use and replay train on the very same numbers: `put` returns what `get` will return later.

A folder holds `meta.json`, which says in plain words what the targets depend on, and shards (`distill/target_shards.py`), each whole or
absent. A kill loses at most the open shard; its steps are computed again. Rows are found by their place in the global batch, so any
number of processes reads what any other number wrote.
"""

import json
import re
import secrets
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distill.config import Config
from distill.errors import UserError
from distill.files import sha256_json, unfinished
from distill.losses.assignments import InRows, prototypes_of, top_k
from distill.models.heads import HeadConfig
from distill.same_settings import same_settings
from distill.target_shards import (
    CROP_BYTES,
    SAME_VIEW,
    Rows,
    Shard,
    Target,
    decode,
    encode,
    mask_checksums,
    open_shard,
    quarter_means,
    row_bytes,
    totals,
    write_shard,
)

STALE = 3600  # seconds: no write takes so long; what looks unfinished is what a kill left
SHARD_BYTES = 64 * 2**20  # of one process; so much may wait in memory
OPEN_SHARDS = 64
NAME = re.compile(r"rank(\d+)of(\d+)-(\d+)-[0-9a-f]+\.safetensors")


class CacheConfig(Config):
    """How teacher targets are kept.

    Attributes:
        dino_k, ibot_k: prototypes kept of a CLS target, and of a patch's; null: the bottleneck vector is kept instead. No k is right for
            all heads: on fitted heads 64 of 1,024 prototypes lost 2 to 10 % of the mass, 64 of 4,096 lost 41 to 61 %, and Sinkhorn over
            few images spreads every target over K/S prototypes (`sinkhorn_loses`).
        replay: images after which crops and targets repeat, so that every later epoch pays no teacher; null: they never do, and the
            cache serves further students and reruns.
    """

    dino_k: int | None = None
    ibot_k: int | None = None
    replay: int | None = None

    def problems(self) -> list[str]:
        kept = {"dino_k": self.dino_k, "ibot_k": self.ibot_k}
        found = [f"{n} must be at least 1, or null, got {v}" for n, v in kept.items() if v is not None and v < 1]
        if self.replay is not None and self.replay < 1:
            found.append(f"replay must be at least 1 image, or null, got {self.replay}")
        return found


class Cached(NamedTuple):
    """One step's targets of this process's b images.

    Attributes:
        dino: of CLS, [2b, k], all first global crops, then all second ones; or vectors [2b, E]; None where `put` got None.
        ibot: of the chosen patches, [M, k'], in row-major order of the masks; or vectors [M, E']; or None.
        dino_lost, ibot_lost: mean mass outside the kept prototypes; 0 for vectors.
    """

    dino: Target | None
    ibot: Target | None
    dino_lost: float
    ibot_lost: float


class TargetsCache:
    """Targets by step. Every process has its own, made at the same time as the others'.

    Attributes:
        hits, misses: how often `get` found something, or did not.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], config: CacheConfig, batch: int, share: tuple[int, int] = (0, 1)
    ):
        """Open or create the cache.

        Args:
            identity: everything the targets depend on, as JSON values: hash of the teacher's weights, fingerprint of the source, crops,
                masks, seed, normalisation, temperatures, centring. Batch and k are added here; `replay` changes no step's targets.
            batch: images a step, over all processes.
            share: (rank, processes), as in LoaderSettings.

        Raises:
            UserError: the folder holds targets of other settings, a damaged shard, or something else.
        """
        self.folder, self.config, self.batch, self.share = folder, config, batch, share
        settings = {**identity, "batch": batch, "dino_k": config.dino_k, "ibot_k": config.ibot_k}
        settings = json.loads(json.dumps(settings, allow_nan=False))  # tuples become lists, as meta.json has them
        self._key = sha256_json(settings)
        self._period = None if config.replay is None else -(-config.replay // batch)
        self._pending: list[tuple[int, Rows]] = []
        self._waiting = 0  # bytes of it
        self._open = lru_cache(OPEN_SHARDS)(lambda path: open_shard(path)[0])
        self._where: dict[tuple[int, int], dict[int, tuple[Path | Shard, int]]] = {}  # (processes, rank) -> slot -> shard, row
        self._about: dict[Path, dict[str, Any]] = {}  # what every shard says of itself
        self._sequence = 0
        self.hits = self.misses = 0
        same_settings(folder, settings, writes=share[0] == 0)
        self._scan()
        self._known = _known_to_all({slot for slot in set().union(*self._where.values()) if self._parts(slot)}, share[1])

    def slot(self, step: int) -> int:
        """The step whose crops, masks, temperature and targets `step` uses: itself, or its place within the replayed period."""
        return step if self._period is None else step % self._period

    def get(self, step: int, crops_C3HW: Tensor, chosen_CN: Tensor) -> Cached | None:
        """The targets of `step`, on the crops' device, or None: in every process or in none.

        Args:
            crops_C3HW: this process's global crops, crop-major; chosen_CN: their patches that iBOT asks. They are what `put` saw, and
                are compared with it.

        Raises:
            UserError: they are not: the targets belong to other crops.
        """
        slot = self.slot(step)
        parts = self._parts(slot) if slot in self._known else []
        if not parts:
            self.misses += 1
            return None
        self.hits += 1
        read = [self._shard(s).read(t, view[v]) for v in (0, 1) for s, t, view in parts]
        rows = {name: np.concatenate([r[name] for r in read]) for name in read[0]}
        self._check_crops(slot, rows, crops_C3HW, chosen_CN)
        return _cached(rows, crops_C3HW.device)

    def put(
        self, step: int, crops_C3HW: Tensor, chosen_CN: Tensor, dino: Tensor | InRows | None, ibot: Tensor | InRows | None
    ) -> Cached:
        """Keep the targets of this process's crops; what `get` will return, exactly.

        Args:
            dino, ibot: assignments of the 2b crops and of the M chosen patches, [S, K] or made in rows; where k is null, the bottleneck
                vectors [S, E]; None, then in every step, for an objective that the run does without.

        Raises:
            EnvironmentFailed: the disk is full. Nothing that was stored before is harmed, and no weight was changed yet.
        """
        slot = self.slot(step)
        rows = _rows(crops_C3HW, chosen_CN, {"dino": (dino, self.config.dino_k), "ibot": (ibot, self.config.ibot_k)})
        if slot not in self._known:
            self._known.add(slot)
            self._pending.append((slot, rows))
            self._mine()[slot] = (Shard(np.array([slot]), rows, len(crops_C3HW)), 0)
            self._waiting += sum(a.nbytes for a in rows.values())
            if self._waiting >= SHARD_BYTES:
                self.flush()
        return _cached(rows, crops_C3HW.device)

    def flush(self) -> None:
        """Write what waits in memory. Call it before a checkpoint is written and at the end, so that a restart finds all steps before it.

        Raises:
            EnvironmentFailed: the disk is full; what waits goes on waiting.
        """
        if not self._pending:
            return
        rank, world = self.share
        # The token keeps two runs that fill one cache at the same time from replacing each other's shards.
        path = self.folder / f"rank{rank}of{world}-{self._sequence:06d}-{secrets.token_hex(4)}.safetensors"
        steps, records = [s for s, _ in self._pending], [r for _, r in self._pending]
        about = {"settings": self._key, "share": self.share, "totals": totals(records)}
        write_shard(path, steps, records, about)
        self._sequence += 1
        self._mine().update({step: (path, t) for t, step in enumerate(steps)})
        self._about[path] = about
        self._pending, self._waiting = [], 0

    def statistics(self) -> dict[str, float]:
        """Of everything on disk and waiting here: bytes, steps, images, bytes an image, mean lost mass; hits and misses of `get`."""
        for path in self._shard_paths():  # other processes' new ones too
            if path not in self._about:
                self._about[path] = open_shard(path)[1]
        t = totals([r for _, r in self._pending])
        for about in self._about.values():
            t = {k: v + about["totals"][k] for k, v in t.items()}
        size = self._waiting + sum(p.stat().st_size for p in self._about)
        return {
            "bytes": size,
            "steps": len(self._known),
            "images": t["crops"] / 2,
            "bytes_per_image": 2 * size / max(t["crops"], 1),
            "dino_lost": t["dino_lost"] / max(t["crops"], 1),
            "ibot_lost": t["ibot_lost"] / max(t["patches"], 1),
            "hits": self.hits,
            "misses": self.misses,
        }

    def _mine(self) -> dict[int, tuple[Path | Shard, int]]:
        rank, world = self.share
        return self._where.setdefault((world, rank), {})

    def _shard_paths(self) -> list[Path]:
        """In the order of writing, for each writer."""
        return sorted(p for p in self.folder.glob("*.safetensors") if not unfinished(p.name))

    def _scan(self) -> None:
        """Note which steps the shards hold; a later shard's wins."""
        for path in self.folder.glob(".*"):
            if unfinished(path.name) and path.stat().st_mtime < time.time() - STALE:
                path.unlink(missing_ok=True)
        for path in self._shard_paths():
            named = NAME.fullmatch(path.name)
            if not named:
                raise UserError(f"{path} is no file of a cache of targets. Move it out of that folder.")
            shard, about = open_shard(path)
            if about["settings"] != self._key:
                raise UserError(f"{path} holds targets of other settings than its folder's meta.json. Delete this file.")
            writer, processes = about["share"]
            if (writer, processes) == self.share:
                self._sequence = max(self._sequence, int(named[3]) + 1)
            self._about[path] = about
            where = self._where.setdefault((processes, writer), {})
            where.update({int(slot): (path, t) for t, slot in enumerate(shard.steps)})

    def _shard(self, at: Path | Shard) -> Shard:
        return at if isinstance(at, Shard) else self._open(at)

    def _parts(self, slot: int) -> list[tuple[Path | Shard, int, tuple[range, range]]]:
        """Where this process's images of a slot lie, in order: shard, row, its crops of either view. Empty if not all are there."""
        mine = _images(self.share[0], self.share[1], self.batch)
        for world in sorted({w for w, _ in self._where}, key=lambda w: w != self.share[1]):
            parts = []
            for rank in range(world):
                theirs = _images(rank, world, self.batch)
                first, last = max(mine.start, theirs.start), min(mine.stop, theirs.stop)
                if first >= last:
                    continue
                found = self._where.get((world, rank), {}).get(slot)
                if found is None:
                    break
                a, b, n = first - theirs.start, last - theirs.start, len(theirs)
                parts.append((*found, (range(a, b), range(n + a, n + b))))
            else:
                return parts
        return []

    def _check_crops(self, slot: int, rows: Rows, crops_C3HW: Tensor, chosen_CN: Tensor) -> None:
        same = len(rows["mask"]) == len(chosen_CN)
        if same:
            far = np.abs(rows["view"].astype(np.float32) - quarter_means(crops_C3HW)).max(1) > SAME_VIEW
            wrong = np.flatnonzero(far | (rows["mask"] != mask_checksums(chosen_CN)))
            same = len(wrong) == 0
        if not same:
            raise UserError(
                f"The targets in {self.folder} belong to other crops or masks than this run makes (first seen at step {slot}). "
                "The images, or the code that cuts crops, have changed. Delete the folder, or leave the cache out."
            )


def estimate_bytes(config: CacheConfig, images: int, patches_per_image: float, dino: HeadConfig, ibot: HeadConfig) -> int:
    """Size of a cache after `images` images seen, to about a percent.

    Args:
        patches_per_image: patches chosen for iBOT over both global crops; on average, with block masks.
        dino, ibot: the teacher's heads.
    """
    stored = images if config.replay is None else min(images, config.replay)
    crop = CROP_BYTES + row_bytes(config.dino_k, dino.prototypes, dino.bottleneck)
    return round(stored * (2 * crop + patches_per_image * row_bytes(config.ibot_k, ibot.prototypes, ibot.bottleneck)))


def _rows(crops_C3HW: Tensor, chosen_CN: Tensor, targets: dict[str, tuple[Tensor | InRows | None, int | None]]) -> Rows:
    """What a shard stores of one step; `targets`: name -> what was given, and k."""
    counts = chosen_CN.sum(1).cpu()
    crops = torch.arange(len(counts))
    crop_of_row = {"dino": crops, "ibot": crops.repeat_interleave(counts)}
    rows: Rows = {}
    lost_C2 = torch.zeros(len(crops), 2)
    for column, (name, (given, k)) in enumerate(targets.items()):
        if given is None:
            continue
        assert len(given) == len(crop_of_row[name])
        if k is None:
            assert isinstance(given, Tensor)
            rows |= {f"{name}/{part}": array for part, array in encode(given).items()}
        else:
            kept, lost_S = top_k(given, k)
            rows |= {f"{name}/{part}": array for part, array in encode(kept, prototypes_of(given)).items()}
            lost_C2[:, column].index_add_(0, crop_of_row[name], lost_S.cpu())
    lost_C2[:, 1] /= counts.clamp_min(1)
    return rows | {
        "chosen": counts.numpy().astype(np.uint32),
        "mask": mask_checksums(chosen_CN),
        "view": quarter_means(crops_C3HW).astype(np.float16),
        "lost": lost_C2.numpy().astype(np.float16),
    }


def _cached(rows: Rows, device: torch.device) -> Cached:
    def target(name: str) -> Target | None:
        mine = {n.removeprefix(name): a for n, a in rows.items() if n.startswith(name)}
        return decode(mine).to(device) if mine else None

    t = totals([rows])
    lost = t["dino_lost"] / max(t["crops"], 1), t["ibot_lost"] / max(t["patches"], 1)
    return Cached(target("dino/"), target("ibot/"), *lost)


def _images(rank: int, world: int, batch: int) -> range:
    """A process's images of the global batch, as the loader shares them out."""
    return range(rank * batch // world, (rank + 1) * batch // world)


def _known_to_all(slots: set[int], world: int) -> set[int]:
    """Slots that every process can read: a process that asked its teacher alone would wait for the others for ever."""
    if world == 1 or not (dist.is_available() and dist.is_initialized()):
        return slots
    each: list[Any] = [None] * world
    dist.all_gather_object(each, slots)
    return set.intersection(*each)
