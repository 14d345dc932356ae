"""An index of a folder of images by their CLS features, kept on disk and resumed where it stopped. Search is exact.

A folder a model holds shards of rows (name, size and time of the file, unit vector). A file that was changed is a new row; one that is gone
is passed over. A shard is whole or absent, so a build that is killed loses at most a shard's work.

Shape legend: n images, D width.
"""

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distill.data.folders import image_files
from distill.data.images import BadImage, decode
from distill.errors import EnvironmentFailed, UserError
from distill.files import write_bytes
from export.demo.models import Model
from export.demo.vision import unit

SHARD = 256  # images
BATCH = 8
FAISS_FROM = 100_000  # images; below, one product of a matrix and a vector takes milliseconds

Key = tuple[str, int, int]  # relative path, bytes, modification time in ns


@dataclass(frozen=True)
class Index:
    """`names` relative to `folder`, `units_nD` float32 of length 1 in the same order, `broken`: files that are no images."""

    folder: Path
    names: list[str]
    units_nD: np.ndarray
    broken: list[str]

    def search(self, cls_D: np.ndarray, count: int) -> list[tuple[str, float]]:
        """The nearest images and their cosines, nearest first."""
        query_D = unit(cls_D.astype(np.float32))
        count = min(count, len(self.names))
        if len(self.names) > FAISS_FROM and importlib.util.find_spec("faiss"):
            cosines, rows = self._faiss.search(query_D[None], count)
            return [(self.names[int(i)], float(c)) for i, c in zip(rows[0], cosines[0], strict=True)]
        cosines_n = self.units_nD @ query_D
        rows = np.argpartition(-cosines_n, count - 1)[:count] if count else np.array([], int)
        rows = rows[np.argsort(-cosines_n[rows], kind="stable")]
        return [(self.names[i], float(cosines_n[i])) for i in rows.tolist()]

    @cached_property
    def _faiss(self) -> Any:
        import faiss

        searcher = faiss.IndexFlatIP(self.units_nD.shape[1])
        searcher.add(self.units_nD)
        return searcher


def files_of(folder: Path) -> list[Key]:
    """Image files of a folder, however deep.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder} is no folder; name one that holds images.")
    found = []
    for name in image_files(str(folder)):
        path = folder / name
        if path.exists():  # not a link that leads nowhere
            status = path.stat()
            found.append((name, status.st_size, status.st_mtime_ns))
    if not found:
        raise UserError(f"--images {folder} holds no image file; name a folder with .jpg, .png or other pictures in it.")
    return found


def place(root: Path, folder: Path, model: Model) -> Path:
    """Where a model's index of a folder lies: other weights or another preprocessing are another index."""
    what = f"{folder.resolve()}\n{model.identity}\n{model.preprocess.to_json()}"
    return root / hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest()[:20]


def build(root: Path, folder: Path, model: Model, progress: Callable[[int, int], None] = lambda done, total: None) -> Index:
    """Read what is on disk, index what is missing, and give the whole.

    Args:
        progress: is told (done, total) now and then.

    Raises:
        UserError: no images, or all of them broken.
        EnvironmentFailed: the index cannot be written.
    """
    wanted = files_of(folder)
    shards = place(root, folder, model)
    rows = read_shards(shards)
    missing = [key for key in wanted if key not in rows]
    progress(len(wanted) - len(missing), len(wanted))
    for start in range(0, len(missing), SHARD):
        keys = missing[start : start + SHARD]
        before = len(wanted) - len(missing) + start
        made = embed(folder, keys, model, partial(told, progress, before, len(wanted)))
        try:
            write_shard(shards, keys, made)
        except OSError as e:
            raise EnvironmentFailed(
                f"The index cannot be written to {root} ({e.strerror}); name another folder with --index."
            ) from e
        rows |= dict(zip(keys, made, strict=True))
    good = [key for key in wanted if rows[key].any()]
    if not good:
        raise UserError(f"None of the {len(wanted)} image files in {folder} can be read; name another folder with --images.")
    lost = [key[0] for key in wanted if not rows[key].any()]
    return Index(folder, [key[0] for key in good], np.stack([rows[key] for key in good]), lost)


def told(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


def embed(folder: Path, keys: list[Key], model: Model, progress: Callable[[int], None]) -> np.ndarray:
    """Unit vectors [n, D] of files; zeros for those that are no images."""
    vectors: dict[int, np.ndarray] = {}
    for start in range(0, len(keys), BATCH):
        batch: dict[int, Image.Image] = {}
        for i in range(start, min(start + BATCH, len(keys))):
            try:
                batch[i] = decode(folder / keys[i][0], shorter_side=model.preprocess.resize)
            except BadImage:
                continue
        if batch:
            vectors |= dict(zip(batch, unit(model.cls(list(batch.values()))), strict=True))
        progress(min(start + BATCH, len(keys)))
    width = len(next(iter(vectors.values()))) if vectors else 1
    return np.stack([vectors.get(i, np.zeros(width, np.float32)) for i in range(len(keys))]).astype(np.float32)


def write_shard(shards: Path, keys: list[Key], units_nD: np.ndarray) -> None:
    """One .npz, named after its content: two processes that index at once do not overwrite each other."""
    out = BytesIO()
    names = np.array([key[0].encode("utf-8", "surrogateescape").hex() for key in keys])  # NumPy's text drops trailing zeros
    np.savez(out, names=names, sizes=[k[1] for k in keys], times=[k[2] for k in keys], units=units_nD)
    data = out.getvalue()
    write_bytes(shards / f"shard-{hashlib.sha256(data).hexdigest()[:16]}.npz", data)


def read_shards(shards: Path) -> dict[Key, np.ndarray]:
    """Rows of all shards; of a file that was indexed in several states each state is one."""
    rows: dict[Key, np.ndarray] = {}
    for path in sorted(shards.glob("shard-*.npz")):
        with np.load(path, allow_pickle=False) as shard:
            names = [bytes.fromhex(n).decode("utf-8", "surrogateescape") for n in shard["names"].tolist()]
            keys = zip(names, shard["sizes"].tolist(), shard["times"].tolist(), strict=True)
            rows |= dict(zip(keys, shard["units"], strict=True))
    return rows
