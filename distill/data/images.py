"""Encoded images become RGB whatever they are, or a BadImage with its reason; and a set of them that bad ones cannot stop.

`decode` decodes. `Encoded` is a store of encoded images (`FolderImages` here, table cells in tables.py), and `ImageSource`
makes a map-style Source (see sources.py) of any store.
"""

import mmap
import os
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image

from distill.data.preprocess import to_rgb
from distill.errors import UserError
from distill.files import sha256_json
from distill.progress import Progress

MAX_PIXELS = 100_000_000
MAX_ASPECT = 500  # of longer to shorter side; resizing the shorter side of a longer sliver to 500 px would not fit in memory
# Pillow also opens formats that run other programs (EPS) or decode nothing but a stub; images from outside get these alone.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "MPO", "PPM", "DIB", "JPEG2000", "AVIF")
# Pillow warns of every odd tag; what matters of it ends in a BadImage with its reason.
warnings.filterwarnings("ignore", module=r"PIL\.")
PROBED = 100  # more than half bad among this many: the data is wrong, not an item of it


class BadImage(Exception):
    """Encoded data that gives no image; `reason` is a short phrase such as "truncated"."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def decode(data: bytes | Path, shorter_side: int | None = None) -> Image.Image:
    """Encoded image, or a file of one, -> Pillow RGB image that holds its pixels itself.

    Greyscale, palette, alpha, CMYK, 16-bit and EXIF rotation are converted (see preprocess.to_rgb). Of several frames the
    first is taken.

    Args:
        shorter_side: the pixels that will be needed. A JPEG of more than four times as many is decoded at 1/2, 1/4 or 1/8 of
            its size (never below twice `shorter_side`): several times quicker, and the antialiasing is left to the later
            resize.

    Raises:
        BadImage: empty, corrupt, truncated, missing, or of more than 100 million pixels (by its header; nothing is unpacked).
    """
    try:
        if isinstance(data, Path):
            if data.stat().st_size == 0:
                raise BadImage("empty file")
            with open(data, "rb") as file:
                return _decode(file, shorter_side)
        if not data:
            raise BadImage("empty file")
        return _decode(BytesIO(data), shorter_side)
    except (BadImage, MemoryError):
        raise
    except FileNotFoundError as e:
        raise BadImage("missing file") from e
    except Image.DecompressionBombError as e:
        raise BadImage(f"more than {MAX_PIXELS / 1e6:.0f} million pixels") from e
    except Image.UnidentifiedImageError as e:
        raise BadImage("not an image of a known format") from e
    except (
        Exception
    ) as e:  # Pillow's plugins raise nearly anything on hostile bytes: OSError, SyntaxError, struct.error, IndexError ...
        raise BadImage(str(e).splitlines()[0] if str(e) else type(e).__name__) from e


def _decode(file: Any, shorter_side: int | None) -> Image.Image:
    with Image.open(file, formats=_formats()) as image:
        w, h = image.size
        if w * h > MAX_PIXELS:
            raise BadImage(f"{w} x {h} is more than {MAX_PIXELS / 1e6:.0f} million pixels")
        if min(w, h) == 0:
            raise BadImage("no pixels")
        if max(w, h) > MAX_ASPECT * min(w, h):
            raise BadImage(f"{w} x {h} is too narrow: one side is more than {MAX_ASPECT} times the other")
        if shorter_side is not None and image.format in ("JPEG", "MPO"):
            scale = 2 * shorter_side / min(w, h)
            image.draft(None, (max(1, round(w * scale)), max(1, round(h * scale))))
        image.load()
        try:
            return to_rgb(image)
        except (
            Exception
        ):  # cameras and editors write broken EXIF; the picture under it is still good, and often its rotation too
            clean = Image.Exif()
            with suppress(Exception):
                clean[ExifTags.Base.Orientation] = image.getexif()[ExifTags.Base.Orientation]
            bare = image.copy()
            for key in set(bare.info) - {"transparency"}:
                del bare.info[key]
            bare.info["exif"] = clean.tobytes()
            return to_rgb(bare)


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(f for f in FORMATS if f in Image.OPEN)


class Encoded(Protocol):
    """A store of encoded images by row: cheap in memory, picklable, safe to read from forked processes."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> bytes | Path:
        """Raises: BadImage, when the row holds nothing."""

    def where(self, row: int) -> str:
        """How a message names the row: a relative path or a row number."""

    def fingerprint(self, rows: np.ndarray) -> str:
        """Hash of the content of these rows, wherever it lies."""


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def image_files(root: str, prefix: str = "", roots: tuple[Path, ...] = ()) -> Iterator[str]:
    """Relative paths (with /) of the image files under `root`, by suffix, names in byte order; hidden files and folders are
    left out.

    Links are followed, but not into what is visited anyway (loops). A link that leads nowhere is listed: a bad image, not no
    image.

    Raises:
        UserError: a folder that may not be read.
    """
    roots = roots or (Path(root).resolve(),)
    try:
        entries = sorted(os.scandir(root), key=lambda entry: os.fsencode(entry.name))
    except OSError as e:
        raise UserError(f"The folder {root} cannot be read ({e.strerror}). Change its permissions or name another.") from e
    for entry in entries:
        if entry.name.startswith("."):
            continue
        link, path = entry.is_symlink(), prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from image_files(entry.path, path + "/", roots)
        elif link and os.path.isdir(entry.path):
            real = Path(entry.path).resolve()
            if not any(real.is_relative_to(r) or r.is_relative_to(real) for r in roots):
                yield from image_files(entry.path, path + "/", (*roots, real))
        elif path.lower().endswith(SUFFIXES):
            # Regular files alone: opening a named pipe would wait for ever.
            dangling = link and not os.path.exists(entry.path)
            if dangling or (os.path.isfile(entry.path) if link else entry.is_file(follow_symlinks=False)):
                yield path


class FolderImages:
    """Image files under `root` by relative path, as one Arrow array: to forked workers a million of them are one object."""

    def __init__(self, root: Path, paths: list[str]):
        self.root = str(root)
        self.paths = pa.array([os.fsencode(p) for p in paths], pa.large_binary())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Path:
        return Path(self.root, os.fsdecode(self.paths[row].as_py()))

    def where(self, row: int) -> str:
        return self.paths[row].as_py().decode("utf-8", "replace")

    def fingerprint(self, rows: np.ndarray) -> str:
        """Names, sizes, and the first and last 2 KiB of each file: quick, and equal for a copy."""
        return files_fingerprint((self.paths[row].as_py(), self[row]) for row in rows.tolist())


def files_fingerprint(files: Iterable[tuple[bytes, Path]]) -> str:
    """sha256 of (name, file) pairs by names, sizes and both ends (2 KiB each) of the files."""
    total = sha256()
    for name, path in files:
        try:
            with open(path, "rb") as f:
                size = os.fstat(f.fileno()).st_size
                ends = f.read(2048)
                if size > 2048:
                    f.seek(-2048, os.SEEK_END)
                    ends += f.read(2048)
        except OSError:  # a bad image like any other; that it is unreadable is its content
            size, ends = -1, b""
        total.update(b"%d %d %d " % (len(name), size, len(ends)) + name + ends)
    return total.hexdigest()


UNTRIED, GOOD, BAD = 0, 1, 2


class ImageSource:
    """A map-style Source of encoded images, decoded at each access.

    Item i is row `order[i]` of the store. A bad item's place is taken, always in the same way, by the next good item of its own
    class (of any class where there are no labels, or no good one is left), so `labels()[i]` stays true of `image(i)` and a run
    never stops. An evaluation must not count such a stand-in: it uses `checked()`, which has none.

    Attributes:
        name: for tables and messages; no part of the fingerprint.
        classes: class names; `labels()` are indices into them.
        order: [n] int64, the store's row of each item.
        dropped: what `checked()` left out, by the reason.
    """

    def __init__(
        self,
        name: str,
        encoded: Encoded,
        order: np.ndarray,
        labels: np.ndarray | None = None,
        classes: list[str] | None = None,
        dropped: list[str] | None = None,
    ):
        """`labels` [len(encoded)] int64 by row, -1 where a row has none."""
        if len(order) == 0:
            raise UserError(f"{name} holds no images. Name a data set that does.")
        self.name, self.encoded, self.order, self.classes = name, encoded, order, classes
        self._row_labels = labels
        self._labels = None if labels is None else labels[order]
        self.dropped = dropped or []
        self._reasons: dict[int, str] = {}
        self._fingerprint: str | None = None
        self._state = _shared_bytes(len(order))

    def __len__(self) -> int:
        return len(self.order)

    def labels(self) -> np.ndarray | None:
        """[n] int64 indices into `classes`, -1 for an item without one; None for a source without labels."""
        return self._labels

    def fingerprint(self) -> str:
        """16 hexadecimal digits of content, order and labels; the same when the data is moved or copied elsewhere."""
        if self._fingerprint is None:
            labels = None if self._labels is None else sha256(self._labels.tobytes()).hexdigest()
            order = sha256(self.order.astype("<i8").tobytes()).hexdigest()
            content = self.encoded.fingerprint(self.order)
            self._fingerprint = sha256_json({"content": content, "order": order, "labels": labels, "classes": self.classes})[
                :16
            ]
        return self._fingerprint

    def image(self, index: int, shorter_side: int | None = None) -> Image.Image:
        """Item `index` as RGB, or its stand-in (see the class). `shorter_side` as in `decode`.

        Raises:
            UserError: more than half of the first 100 images tried are bad, or none is good.
        """
        try:
            return self._decode(index, shorter_side)
        except BadImage:
            pass
        for other in self._stand_ins(index):
            try:
                return self._decode(int(other), shorter_side)
            except BadImage:
                continue
        raise self._hopeless("none of its images can be read")

    def probe(self) -> None:
        """Try the first 100 items, so that hopeless data is a sentence before the work starts (and before workers are forked).

        Raises:
            UserError: as `image`.
        """
        for i in range(min(PROBED, len(self))):
            try:
                self._decode(i, shorter_side=32)
            except BadImage:
                continue

    @property
    def skipped(self) -> dict[int, str]:
        """Bad items met so far, by this process and those forked from it: index -> "where: reason"."""
        for i in np.flatnonzero(self._state == BAD).tolist():
            if i not in self._reasons:  # another process met it
                self._reasons[i] = (
                    self._reason(i) or f"{self.encoded.where(int(self.order[i]))}: could not be read when it was tried"
                )
        return dict(sorted(self._reasons.items()))

    def skipped_summary(self) -> str:
        """One line for the log; empty when nothing was skipped."""
        lines = []
        for verb, reasons in (("left out", self.dropped), ("skipped", list(self.skipped.values()))):
            if reasons:
                total = len(self) + len(self.dropped)
                shown = "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")
                lines.append(f"{len(reasons):,} of {total:,} images of {self.name} were {verb} ({shown})")
        return ". ".join(lines)

    def checked(self, progress: Progress | None = None) -> "ImageSource":
        """This source without its bad items and, where others have a label, without unlabelled ones: the one to evaluate on.

        Every image is decoded once, in threads; the outcome is remembered by fingerprint for the life of the process.

        Raises:
            UserError: as `image`.
        """
        key = self.fingerprint()
        if key not in _CHECKED:
            _CHECKED[key] = self._check(progress or Progress("quiet"))
        reasons = _CHECKED[key]
        if not reasons:
            return self
        kept = np.setdiff1d(np.arange(len(self)), np.fromiter(reasons, np.int64))
        if len(kept) == 0:
            raise self._hopeless("none of its images can be used", next(iter(reasons.values())))
        dropped = [*self.dropped, *reasons.values()]
        return ImageSource(self.name, self.encoded, self.order[kept], self._row_labels, self.classes, dropped)

    def _check(self, progress: Progress) -> dict[int, str]:
        reasons = {}
        with ThreadPoolExecutor(os.cpu_count()) as pool, progress.task(f"check {self.name}", len(self), unit="img") as task:
            for i, reason in enumerate(pool.map(self._reason, range(len(self)))):
                task.advance()
                if reason:
                    reasons[i] = reason
                    if i < PROBED and len(reasons) > min(PROBED, len(self)) / 2:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise self._hopeless(f"{len(reasons)} of the first {i + 1} images cannot be read", reason)
        if self._labels is not None:
            for i in np.flatnonzero(self._labels < 0).tolist():
                reasons.setdefault(i, f"{self.encoded.where(int(self.order[i]))}: no label")
        return dict(sorted(reasons.items()))

    def _reason(self, index: int) -> str | None:
        row = int(self.order[index])
        try:
            decode(self.encoded[row])
        except BadImage as e:
            return f"{self.encoded.where(row)}: {e.reason}"
        return None

    def _decode(self, index: int, shorter_side: int | None) -> Image.Image:
        if self._state[index] == BAD:
            raise BadImage("known to be bad")
        row = int(self.order[index])
        try:
            image = decode(self.encoded[row], shorter_side)
        except BadImage as e:
            self._state[index] = BAD
            self._reasons[index] = f"{self.encoded.where(row)}: {e.reason}"
            self._give_up_if_hopeless()
            raise
        self._state[index] = GOOD
        return image

    def _stand_ins(self, index: int) -> np.ndarray:
        """Every other item in the order in which it may take the place of a bad one: a function of the data alone."""
        after = np.arange(index + 1, index + len(self)) % len(self)
        if self._labels is None:
            return after
        same = self._labels[after] == self._labels[index]
        return np.concatenate([after[same], after[~same]])

    def _give_up_if_hopeless(self) -> None:
        tried, bad = np.count_nonzero(self._state), np.count_nonzero(self._state == BAD)
        if tried <= PROBED and bad > min(PROBED, len(self)) / 2:
            raise self._hopeless(f"{bad} of the first {tried} images tried cannot be read")

    def _hopeless(self, what: str, example: str | None = None) -> UserError:
        example = example or next(iter(self.skipped.values()))
        return UserError(f"{self.name}: {what} ({example}). Repair the data or name another set.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_state": self._state.copy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        self._state = _shared_bytes(len(self.order), state["_state"])


_CHECKED: dict[str, dict[int, str]] = {}  # fingerprint -> bad items, for this process


def _shared_bytes(n: int, values: np.ndarray | None = None) -> np.ndarray:
    """[n] uint8 that this process and those it forks all see: what a data worker finds bad, the parent reports."""
    shared = np.frombuffer(mmap.mmap(-1, n), np.uint8)
    if values is not None:
        shared[:] = values
    return shared


def seeded_order(n: int, limit: int | None) -> np.ndarray:
    """[min(n, limit)] int64: the first of a fixed shuffle, so a subset mixes the classes and is a prefix of any larger one."""
    return np.random.default_rng(0).permutation(n)[:limit].astype(np.int64)
