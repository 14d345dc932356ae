"""Frozen features on disk: computed once for an artifact, a data set and a preprocessing, shared by all evaluations, resumed midway.

    FOLDER/<hash of the identity>/
        identity.json     what the features depend on, their shapes, and the encoder's conditions
        cls.npy           [L, n, D] float32, the last L layers, earliest first
        mean_patch.npy    [L, n, D'] float32
        patches.npy       [L', n, N, D'] float16; only where they were asked for
        progress.json     how many images are done

Order of writes: the arrays at their full size, then progress of 0, then identity.json, without which a folder counts for nothing. After
each chunk the arrays are flushed to disk before progress.json is replaced: it never promises what a power failure could take back. Arrays
are written as files, not through memory maps, because a full disk is an error that way and not a signal that kills the process.

Shape legend: L layers, n images, B batch, N patch tokens, D width.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from distill.encoder import Encoder, Features, LayeredEncoder
from distill.errors import EnvironmentFailed
from distill.evaluate.features import Images, check_memory
from distill.evaluate.task import Stored, Unfit
from distill.files import read_json, sha256_json, write_json
from distill.progress import Progress

CHUNK = 256  # images between two flushes: what a kill costs at most
FORMAT = 1
TEMPORARY = "temporary-"
IDENTITY, PROGRESS = "identity.json", "progress.json"
TYPES: dict[str, np.dtype[Any]] = {"cls": np.dtype("<f4"), "mean_patch": np.dtype("<f4"), "patches": np.dtype("<f2")}


@dataclass(frozen=True)
class Wish:
    """How much of the features is wanted: layers from the end of CLS and mean patch, and of all patches (0: no patches)."""

    layers: int = 1
    patch_layers: int = 0

    def within(self, other: "Wish") -> bool:
        return self.layers <= other.layers and self.patch_layers <= other.patch_layers

    def both(self, other: "Wish") -> "Wish":
        return Wish(max(self.layers, other.layers), max(self.patch_layers, other.patch_layers))

    def deepest(self) -> int:
        return max(self.layers, self.patch_layers)


@dataclass(frozen=True)
class Kept:
    """Features from disk, and what is known of the encoder that made them: `target`, `conditions`, `depth`."""

    stored: Stored
    encoder: dict[str, Any]


def identity(weights: str, target: str, images: Images, batch: int) -> dict[str, Any]:
    """What features depend on. `weights`: hash of the model or artifact. `batch` counts: it moves the last bits of products."""
    return {
        "weights": weights,
        "target": target,
        "data": images.fingerprint,
        "images": len(images),
        "preprocess": images.preprocess.to_json(),
        "batch": batch,
    }


def depth_of(encoder: Encoder) -> int:
    """How many layers from the end an encoder shows."""
    return max(1, encoder.depth) if isinstance(encoder, LayeredEncoder) else 1


class FeatureStore:
    """Features of any number of artifacts and sets in one folder. One process works on it at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        for left in folder.glob(f"{TEMPORARY}*"):  # of a process that was killed
            shutil.rmtree(left)

    def temporary(self) -> TemporaryDirectory[str]:
        """A folder for a store of what has no lasting identity; on the same disk, as it may be large."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return TemporaryDirectory(prefix=TEMPORARY, dir=self.folder)

    def depth(self, weights: str) -> int | None:
        """The depth of the encoder of these weights, as far as features of it are here."""
        for path in self.folder.glob(f"*/{IDENTITY}"):
            if (found := _read(path.parent)) is not None and found.about["identity"]["weights"] == weights:
                return int(found.about["encoder"]["depth"])
        return None

    def features(
        self,
        what: dict[str, Any],
        wish: Wish,
        images: Images,
        open_encoder: Callable[[], Encoder],
        progress: Progress,
        title: str,
    ) -> Kept:
        """The features of all images, computed as far as they are not here. A wish for more than is here computes all anew, and
        what was here is a part of that.

        Args:
            what: their `identity`.
            open_encoder: called only where something must be computed.

        Raises:
            Unfit: the encoder shows fewer layers, or there are no images. TooLarge: they would not fit in memory. EnvironmentFailed: nor
                on the disk. The encoder's and the data's own errors; what was finished before stays.
        """
        home = self.folder / sha256_json(what)[:24]
        found = _read(home, what)
        if found is not None and found.complete() and wish.within(found.wish()):
            return found.kept(wish)
        encoder = open_encoder()
        asked = wish if found is None or not found.complete() else wish.both(found.wish())
        if asked.deepest() > (depth := depth_of(encoder)):
            shows = "its last layer only" if depth == 1 else f"{depth} layers only"
            raise Unfit(f"{title}: {asked.deepest()} layers are asked for, and {encoder.target} shows {shows}.")
        if len(images) == 0:
            raise Unfit(f"{images.name} holds no image.")
        if found is not None and found.about["encoder"]["conditions"] != json.loads(json.dumps(encoder.conditions)):
            found = None  # begun on another device or version: rows must not say of all what is true of some
        if found is None or found.wish() != asked:
            shutil.rmtree(home, ignore_errors=True)  # before the new files are made: maps of the old ones stay whole
            found = None
        _fill(home, what, asked, images, encoder, progress, title, 0 if found is None else found.done)
        found = _read(home, what)
        assert found is not None
        assert found.complete()
        return found.kept(wish)


@dataclass(frozen=True)
class _Folder:
    """A folder whose files agree with each other, as far as it was filled."""

    home: Path
    about: dict[str, Any]
    done: int

    def wish(self) -> Wish:
        shapes = self.about["shapes"]
        return Wish(shapes["cls"][0], shapes["patches"][0] if "patches" in shapes else 0)

    def complete(self) -> bool:
        return self.done == self.about["shapes"]["cls"][1]

    def kept(self, wish: Wish) -> Kept:
        arrays = {name: np.load(self.home / f"{name}.npy", mmap_mode="r") for name in self.about["shapes"]}
        patches = arrays["patches"][-wish.patch_layers :] if wish.patch_layers else None
        stored = Stored(arrays["cls"][-wish.layers :], arrays["mean_patch"][-wish.layers :], patches)
        return Kept(stored, self.about["encoder"])


def _read(home: Path, what: dict[str, Any] | None = None) -> _Folder | None:
    """What lies there; None where that is nothing, damaged, or of something else than `what`."""
    try:
        about, done = read_json(home / IDENTITY), read_json(home / PROGRESS)["done"]
        if about["format"] != FORMAT or (what is not None and about["identity"] != json.loads(json.dumps(what))):
            return None
        for name, shape in about["shapes"].items():
            array = np.load(home / f"{name}.npy", mmap_mode="r")  # refuses a file shorter than its header says
            if array.shape != tuple(shape) or array.dtype != TYPES[name]:
                return None
        found = _Folder(home, about, done)
        return found if {"target", "conditions", "depth"} <= about["encoder"].keys() and found.wish().layers else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _fill(
    home: Path, what: dict[str, Any], wish: Wish, images: Images, encoder: Encoder, progress: Progress, title: str, done: int
) -> None:
    """Compute from image `done` on; where that is 0, the files are made first."""
    flushed = done
    with ExitStack() as stack, progress.task(title, len(images), unit="images", start=done) as task:
        writer = None
        for x in images.batches(what["batch"], done):
            blocks = dict(_blocks(encoder, x, wish))
            if writer is None:
                shapes = {name: (len(b), len(images), *b.shape[2:]) for name, b in blocks.items()}
                if done == 0:
                    _create(home, what, shapes, encoder, title)
                writer = stack.enter_context(_Writer(home, shapes))
            for name, block in blocks.items():
                writer.put(name, done, block)
            done += len(x)
            if done - flushed >= CHUNK or done == len(images):
                writer.flush()
                write_json(home / PROGRESS, {"done": done})
                flushed = done
            task.advance(len(x))


def _blocks(encoder: Encoder, x: Any, wish: Wish) -> Iterator[tuple[str, np.ndarray]]:
    """A batch's part of each array: [L, B, ...]."""
    layers: list[Features]
    if wish.deepest() == 1:
        layers = [encoder(x)]
    else:
        assert isinstance(encoder, LayeredEncoder)
        layers = encoder.layers(x, wish.deepest())
    plain = layers[-wish.layers :]
    yield "cls", np.stack([f.cls.numpy() for f in plain])
    yield "mean_patch", np.stack([f.patches.mean(1).numpy() for f in plain])
    if wish.patch_layers:
        yield "patches", np.stack([f.patches.numpy().astype(np.float16) for f in layers[-wish.patch_layers :]])


def _create(home: Path, what: dict[str, Any], shapes: dict[str, tuple[int, ...]], encoder: Encoder, title: str) -> None:
    layers, n = shapes["cls"][:2]
    for name in ("cls", "mean_patch"):  # these are taken into memory whole; patches are read in slices
        check_memory(n, layers * shapes[name][2], title)
    home.mkdir(parents=True, exist_ok=True)
    sizes = {name: int(np.prod(shape)) * TYPES[name].itemsize for name, shape in shapes.items()}
    if (needed := sum(sizes.values())) > (free := shutil.disk_usage(home).free):
        raise EnvironmentFailed(
            f"{title}: the features of {n} images take {needed / 2**30:.1f} GiB on disk, and {free / 2**30:.1f} GiB are free "
            f"where {home.parent} lies. Free some space, or evaluate on fewer images or at a lower resolution."
        )
    for name, shape in shapes.items():
        with open(home / f"{name}.npy", "wb") as f:
            np.lib.format.write_array_header_1_0(f, {"descr": TYPES[name].str, "fortran_order": False, "shape": shape})
            f.truncate(f.tell() + sizes[name])
            f.flush()
            os.fsync(f.fileno())
    write_json(home / PROGRESS, {"done": 0})
    known = {"target": encoder.target, "conditions": encoder.conditions, "depth": depth_of(encoder)}
    write_json(home / IDENTITY, {"format": FORMAT, "identity": what, "shapes": shapes, "encoder": known})


class _Writer:
    """The arrays of a folder, open for writing in the middle."""

    def __init__(self, home: Path, shapes: dict[str, tuple[int, ...]]):
        self.shapes = shapes
        self.starts = {name: np.load(home / f"{name}.npy", mmap_mode="r").offset for name in shapes}
        self.files = {name: open(home / f"{name}.npy", "r+b") for name in shapes}  # noqa: SIM115  closed by __exit__

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for f in self.files.values():
            f.close()

    def put(self, name: str, first: int, block: np.ndarray) -> None:
        """`block` [L, B, ...] of the images from `first` on."""
        layers, n, *rest = self.shapes[name]
        assert block.shape == (layers, block.shape[1], *rest)
        size = int(np.prod(rest)) * TYPES[name].itemsize
        for i, part in enumerate(block):
            self.files[name].seek(self.starts[name] + (i * n + first) * size)
            self.files[name].write(np.ascontiguousarray(part, TYPES[name]).tobytes())

    def flush(self) -> None:
        for f in self.files.values():
            f.flush()
            os.fsync(f.fileno())
