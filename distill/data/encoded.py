"""Sets of encoded images that bad ones cannot stop.

`Encoded` is a store of encoded images (files in folders.py, table cells in tables.py); `ImageSource` makes a map-style Source (see
sources.py) of any store.
"""

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from distill.data.images import BadImage, decode
from distill.errors import UserError
from distill.files import sha256_json
from distill.progress import Progress

PROBED = 100  # more than half bad among this many: the data is wrong, not an item of it


class Encoded(Protocol):
    """A store of encoded images by row: cheap in memory, picklable, safe to read from forked processes."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> bytes | Path:
        """Raises: BadImage, when the row holds nothing."""

    def where(self, row: int) -> str:
        """How a message names the row: a relative path or a row number."""

    def fingerprint(self, rows: np.ndarray) -> str:
        """Hash of the content of these rows, wherever it lies."""

    def shared(self, rows: np.ndarray, other: "Encoded", theirs: np.ndarray) -> int:
        """How many of `theirs`, rows of `other`, are also among `rows` of this store, as far as that is cheap to know."""


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

    def shared_with(self, other: Any) -> int:
        """How many images of `other` are images of this source too: of files by their content, of tables by row. 0 where one is of files
        and the other of a table, or tables hold different files: that would mean to read them all."""
        return self.encoded.shared(self.order, other.encoded, other.order) if isinstance(other, ImageSource) else 0

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
