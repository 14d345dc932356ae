"""Where images come from: the Source that training and evaluation see, its kinds, and the shorthand that names one in a recipe.

A kind is a config class with a `build()` and one line in `KINDS`.
"""

import difflib
import errno
import glob
import itertools
import json
import logging
import multiprocessing
import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from pydantic import Field

from distill.config import Config
from distill.data.images import (
    PROBED,
    SUFFIXES,
    BadImage,
    FolderImages,
    ImageSource,
    decode,
    files_fingerprint,
    image_files,
    seeded_order,
)
from distill.data.scenes import ScenesConfig
from distill.errors import DecantError, EnvironmentFailed, UserError
from distill.files import sha256_file, sha256_json
from distill.progress import Progress


class Source(Protocol):
    """A map-style set of images.

    Attributes:
        name: for tables and messages.
        classes: names that `labels()` are indices into; None for a set without labels.
    """

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> list[str] | None: ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """Image `index` as Pillow RGB, the same at every call."""

    def labels(self) -> np.ndarray | None:
        """[n] int64, -1 where an item has none; None for a set without labels."""

    def fingerprint(self) -> str:
        """Hash of what the set holds, independent of where it lies."""


def checked(source: Source, progress: Progress | None = None) -> Source:
    """The source to evaluate on: without items that cannot be read or, in a labelled set, lack a label."""
    return source.checked(progress) if isinstance(source, ImageSource) else source


def skipped_summary(source: "Source | StreamingSource") -> str:
    """One line on the images that a run could not read so far; empty when there are none."""
    return source.skipped_summary() if isinstance(source, ImageSource | StreamingSource) else ""


def labels_of(source: Source, classes: Sequence[str] | None = None) -> np.ndarray:
    """[n] int64 labels as indices into `classes` (default: the source's own): so sets whose class lists differ can be compared.

    Raises:
        UserError: the source has no labels, or a class that `classes` lacks.
    """
    labels = source.labels()
    if labels is None or source.classes is None:
        raise UserError(
            f"{source.name} has no labels. Name the label column, set labels: true for a folder, or use a labelled set."
        )
    if classes is None or list(classes) == source.classes:
        return labels
    index = {name: i for i, name in enumerate(classes)}
    used = [source.classes[i] for i in np.unique(labels[labels >= 0])]
    if unknown := [name for name in used if name not in index]:
        raise UserError(
            f"{source.name} has the class {unknown[0]!r}, which the set it is compared to lacks. Name sets of like classes."
        )
    table = np.array([index.get(name, -1) for name in source.classes] + [-1], np.int64)  # the last one is for label -1
    return table[labels]


class FolderConfig(Config):
    """Image files in a folder and its sub-folders.

    Attributes:
        path: the folder.
        labels: the first sub-folder's name is the class.
        limit: the first so many of a fixed shuffle.
    """

    kind: Literal["folder"] = "folder"
    path: str
    labels: bool = False
    limit: int | None = None

    def problems(self) -> list[str]:
        return _limit_problems(self.limit) + _empty_problems(path=self.path)

    def build(self) -> ImageSource:
        """Raises: UserError: no such folder, no images in it, or labels asked for and none there."""
        root = Path(self.path).expanduser().absolute()
        if not os.path.exists(root):
            raise missing(root)
        if not os.path.isdir(root):
            raise UserError(f"{root} is a file where a folder of images is needed. Name its folder.")
        paths = list(image_files(str(root)))
        if not paths:
            raise UserError(
                f"{root} holds no images ({' '.join(s[1:] for s in SUFFIXES)}), nor do its sub-folders. Name another."
            )
        labels, classes = _folder_labels(root, paths) if self.labels else (None, None)
        return ImageSource(root.name, FolderImages(root, paths), seeded_order(len(paths), self.limit), labels, classes)


def _folder_labels(root: Path, paths: list[str]) -> tuple[np.ndarray, list[str]]:
    loose = [p for p in paths if "/" not in p]
    if loose:
        raise UserError(
            f"{root} should give labels by sub-folder, but {len(loose):,} images lie in no sub-folder (such as {loose[0]}). "
            "Move each into the folder of its class, or set labels: false."
        )
    classes = sorted({p.split("/", 1)[0] for p in paths}, key=os.fsencode)
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[p.split("/", 1)[0]] for p in paths], np.int64), classes


class ParquetConfig(Config):
    """Local parquet files whose image column holds encoded files.

    Attributes:
        path: a file, a folder of parquet files, a pattern such as data/train-*.parquet, or a list of files.
        image, label: columns; found by type and name where not given.
        limit: the first so many of a fixed shuffle.
    """

    kind: Literal["parquet"] = "parquet"
    path: str | list[str]
    image: str | None = None
    label: str | None = None
    limit: int | None = None

    def problems(self) -> list[str]:
        found = _limit_problems(self.limit) + _same_column_problems(self.image, self.label)
        return found + (
            _empty_problems(path=self.path) if isinstance(self.path, str) else [] if self.path else ["path lists no file"]
        )

    def build(self) -> ImageSource:
        """Raises: UserError: no such file, not parquet, no image column, or no such label column."""
        files, names = _opened(parquet_files(self.path))
        datasets = _datasets()
        what = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
        with _explained(what):
            table = datasets.load_dataset("parquet", data_files=[str(f) for f in files], split="train")
        name = f"{files[0].parent.name}/{files[0].stem}" if len(files) == 1 else files[0].parent.name
        content = {"files": [_sha256(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]}
        return table_source(name, what, table, content, self.image, self.label, self.limit, names)


class DatasetsConfig(Config):
    """Anything that the `datasets` library loads: a set's name, or a local folder of one.

    Attributes:
        name: of the set; or a local folder (of `save_to_disk`, too); or a file format ("parquet", "webdataset", ...) of
            data_files.
        split, config, revision, data_files: as in `datasets.load_dataset`.
        streaming: read without a local copy: iteration only, for training.
        buffer: streaming: images in the shuffle buffer.
        image, label: columns; found by type and name where not given.
        limit: the first so many of a fixed shuffle; streaming: of the stream.
    """

    kind: Literal["datasets"] = "datasets"
    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | list[str] | None = None
    streaming: bool = False
    buffer: int = 1000
    image: str | None = None
    label: str | None = None
    limit: int | None = None

    def problems(self) -> list[str]:
        found = (
            _limit_problems(self.limit)
            + _empty_problems(name=self.name, split=self.split)
            + _same_column_problems(self.image, self.label)
        )
        if self.buffer < 1:
            found.append(f"buffer must be at least 1, got {self.buffer}")
        if self.buffer != 1000 and not self.streaming:
            found.append("buffer is used with streaming: true alone")
        if self.streaming and self.label is not None:
            found.append(f"label {self.label!r} cannot be read with streaming: true, which gives images alone")
        if self.name in BUILDERS and not self.data_files:
            found.append(f"name {self.name!r} is a file format: it needs data_files")
        return found

    def build(self) -> "ImageSource | StreamingSource":
        """Raises: UserError: no such set, split, config or column. EnvironmentFailed: the set is neither here nor reachable."""
        table, content = load_named(self)
        name = "/".join(p for p in (Path(self.name).name, self.config, self.split) if p)
        if not self.streaming:
            return table_source(name, name, table, content, self.image, self.label, self.limit, None)
        if table.features is None:
            table = table._resolve_features()
        column = image_column(name, table.features, self.image)
        stream = table.select_columns([column]).cast_column(column, _datasets().Image(decode=False))
        fingerprint = sha256_json({**content, "image": column, "limit": self.limit})[:16]
        return StreamingSource(name, stream, column, self.buffer, self.limit, fingerprint)


KINDS: dict[str, type[Config]] = {
    "folder": FolderConfig,
    "parquet": ParquetConfig,
    "datasets": DatasetsConfig,
    "scenes": ScenesConfig,
}
SourceConfig = Annotated[FolderConfig | ParquetConfig | DatasetsConfig | ScenesConfig, Field(discriminator="kind")]

BUILDERS = ("parquet", "arrow", "imagefolder", "webdataset", "json", "csv")
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def source_from(value: "str | SourceConfig") -> "SourceConfig":
    """The config that a shorthand stands for: parquet files, a folder of them alone, a folder of images, else a `datasets`
    name.

    `scenes` is the rendered scenes. A folder gives labels when all its images lie in at least two sub-folders.

    Raises:
        UserError: a path that does not exist, or a folder that holds several splits.
    """
    if not isinstance(value, str):
        return value
    path = Path(value).expanduser()
    if os.path.isdir(path):  # where pathlib would raise (no permission, name too long) os.path says no
        return _folder_kind(value, path)
    if value.lower().endswith(".parquet"):
        parquet_files(value)  # says so where there is none
        return ParquetConfig(path=value)
    if os.path.exists(path):
        raise UserError(
            f"{value} is neither a parquet file nor a folder. Name a folder of images, parquet files, or a data set."
        )
    if value == "scenes":
        return ScenesConfig()
    if looks_like_path(value):
        raise missing(path)
    return DatasetsConfig(name=value)


def _folder_kind(value: str, path: Path) -> "SourceConfig":
    if not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"{value} may not be read. Change its permissions or name another folder.")
    if _saved_kind(path):
        return DatasetsConfig(name=value)
    first_of = {
        e.name: next(image_files(str(e)), None) for e in sorted(path.iterdir()) if e.is_dir() and not e.name.startswith(".")
    }
    groups = [name for name, first in first_of.items() if first is not None]
    loose = any(f.suffix.lower() in SUFFIXES and not f.name.startswith(".") for f in path.iterdir() if f.is_file())
    if not groups and not loose and any(path.rglob("*.parquet")):
        return ParquetConfig(path=value)
    if not loose and len(groups) > 1 and all(name.lower() in SPLITS for name in groups):
        raise UserError(f"{value} holds the splits {' and '.join(groups)}. Name one of them, such as {path / groups[0]}.")
    return FolderConfig(path=value, labels=not loose and len(groups) > 1)


def looks_like_path(value: str) -> bool:
    """Whether a string that names nothing here was meant as a path, not as a `datasets` name (`cifar10`, `owner/name`)."""
    parent = Path(value).expanduser().parent
    return (
        value.startswith((".", "/", "~"))
        or value.count("/") > 1
        or "\\" in value
        or (parent != Path() and os.path.isdir(parent))
    )


def missing(path: Path) -> UserError:
    """The sentence for a path that does not exist, with the sibling that was probably meant."""
    path = path.expanduser().absolute()
    folder = path.parent
    while not os.path.isdir(folder):
        path, folder = folder, folder.parent
    try:
        near = difflib.get_close_matches(path.name, [p.name for p in folder.iterdir()], n=1)
    except OSError:
        near = []
    return UserError(
        f"There is no {path}. " + (f"Did you mean {folder / near[0]}?" if near else f"Name something that is in {folder}.")
    )


def parquet_files(path: str | list[str]) -> list[Path]:
    """The files that a file, folder, pattern or list of files names, in a stable order.

    Raises:
        UserError: one is missing or not parquet, or a folder holds several splits.
    """
    found: list[Path] = []
    for one in [path] if isinstance(path, str) else path:
        p = Path(one).expanduser().absolute()
        if os.path.isdir(p):
            inside = sorted(f for f in p.rglob("*.parquet") if not any(part.startswith(".") for part in f.relative_to(p).parts))
            splits = {SPLITS[word]: f for f in inside for word in re.findall("[a-z]+", f.stem.lower()) if word in SPLITS}
            if len(splits) > 1:
                raise UserError(
                    f"{p} holds the splits {' and '.join(sorted(splits))}. Name the files of one, e.g. {min(splits.values())}."
                )
            if not inside:
                raise UserError(f"{p} holds no parquet files. Name a folder that does.")
            found += inside
        elif os.path.exists(p):
            found.append(p)
        elif glob.has_magic(str(p)):
            matches = sorted(Path(m) for m in glob.glob(str(p), recursive=True))
            if not matches:
                raise UserError(f"No file matches {p}. Correct the pattern.")
            found += matches
        else:
            raise missing(p)
    return found


def _opened(files: list[Path]) -> tuple[list[Path], list[str] | None]:
    """The files that have rows, and the class names that schema metadata lists, directly or in a JSON note.

    Raises:
        UserError: one is not a whole parquet file.
    """
    filled, names = [], None
    for file in files:
        try:
            footer = pq.read_metadata(file)
        except (pa.ArrowInvalid, OSError) as e:
            raise UserError(f"{file} is not a whole parquet file ({_first_line(e)}). Fetch it again or leave it out.") from e
        filled += [file] if footer.num_rows else []
        for key, raw in (footer.metadata or {}).items():
            try:
                value = json.loads(raw)
            except ValueError:
                continue
            value = value.get("classes") if isinstance(value, dict) else value if key in (b"classes", b"class_names") else None
            if names is None and isinstance(value, list) and value and all(isinstance(v, str) for v in value):
                names = value
    if not filled:
        raise UserError(f"{files[0]} has no rows. Name a data set that has.")
    return filled, names


@cache
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    return sha256_file(Path(path))


# ---- tables ----


class ArrowImages:
    """An image column of a `datasets.Dataset`: memory-mapped cells, read at a tenth of what an item of it costs."""

    def __init__(self, table: Any, column: str, content: dict[str, Any]):
        self.table, self.column, self.content = table.select_columns([column]), column, content
        self._open()

    def _open(self) -> None:
        self._cells, self._rows = self.table.data.column(self.column), _rows(self.table)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> bytes | Path:
        return encoded_cell(self._cells[row if self._rows is None else int(self._rows[row])].as_py())

    def where(self, row: int) -> str:
        return f"row {row}"

    def fingerprint(self, rows: np.ndarray) -> str:
        return sha256_json({**self.content, "image": self.column})

    def __getstate__(self) -> dict[str, Any]:
        return {
            "table": self.table,
            "column": self.column,
            "content": self.content,
        }  # the cells would travel as data, the table as a path

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def encoded_cell(cell: Any) -> bytes | Path:
    """The encoded image of a cell: {bytes, path}, bytes, or a path. Raises: BadImage."""
    data, path = (
        (cell.get("bytes"), cell.get("path"))
        if isinstance(cell, dict)
        else (None, cell)
        if isinstance(cell, str)
        else (cell, None)
    )
    if data:
        return data
    if not path:
        raise BadImage("no image in this row" if data is None else "empty file")
    if "://" not in path:
        return Path(path)
    import fsspec

    try:
        with fsspec.open(path, "rb") as f:
            return f.read()
    except Exception as e:  # whatever the protocol's client raises
        raise BadImage(f"{path} cannot be fetched ({e})") from e


def table_source(
    name: str,
    what: str,
    table: Any,
    content: dict,
    image: str | None,
    label: str | None,
    limit: int | None,
    names: list[str] | None,
) -> ImageSource:
    """An ImageSource over a `datasets.Dataset`; `what` names it in messages, `names` are class names for integer labels."""
    column = image_column(what, table.features, image)
    labelled = label_column(what, table.features, label)
    if len(table) == 0:
        raise UserError(f"{what} has no rows. Name a data set that has.")
    labels, classes = table_labels(what, table, labelled, names) if labelled else (None, None)
    if label is not None and labels is None:
        raise UserError(f"The column {label!r} of {what} labels no row (all are -1 or null). Name another column.")
    return ImageSource(name, ArrowImages(table, column, content), seeded_order(len(table), limit), labels, classes)


def image_column(what: str, features: Any, wanted: str | None) -> str:
    """The column of encoded images: `wanted`, or the only one of that type, or the one that is called so."""
    found = [n for n, f in features.items() if type(f).__name__ == "Image" or (isinstance(f, dict) and "bytes" in f)]
    found = found or [n for n, f in features.items() if getattr(f, "dtype", None) in ("binary", "large_binary")]
    if wanted is not None:
        paths = [
            n for n, f in features.items() if getattr(f, "dtype", None) in ("string", "large_string", "binary", "large_binary")
        ]
        return _known_column(what, features, wanted, [*found, *paths], "image")
    named = [n for n in ("image", "img", "images", "jpg", "jpeg", "png", "webp", "picture", "photo") if n in found]
    if named or len(found) == 1:
        return (named or found)[0]
    if found:
        raise UserError(f"{what} has several image columns ({', '.join(found)}). Set `image` to one of them.")
    raise UserError(f"{what} has no image column (it has {', '.join(features)}). Name a set of encoded images, or set `image`.")


LABEL_TYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "string", "large_string")


def label_column(what: str, features: Any, wanted: str | None) -> str | None:
    """The column of class labels: `wanted`, or the only ClassLabel, or the one that is called so; None where there is none."""
    found = [n for n, f in features.items() if getattr(f, "dtype", None) in LABEL_TYPES]
    if wanted is not None:
        return _known_column(what, features, wanted, found, "label")
    typed = [n for n in found if type(features[n]).__name__ == "ClassLabel"]
    named = [n for n in ("label", "labels", "fine_label", "cls", "class", "target", "category") if n in (typed or found)]
    return named[0] if named else typed[0] if len(typed) == 1 else None


def _known_column(what: str, features: Any, wanted: str, fit: list[str], role: str) -> str:
    if wanted in fit:
        return wanted
    if wanted in features:
        raise UserError(
            f"The column {wanted!r} of {what} holds {features[wanted]}, which cannot be its {role}. Name another column."
        )
    near = difflib.get_close_matches(wanted, list(features), n=1)
    raise UserError(
        f"{what} has no column {wanted!r} (it has {', '.join(features)})." + (f" Did you mean {near[0]!r}?" if near else "")
    )


def table_labels(what: str, table: Any, column: str, names: list[str] | None) -> tuple[np.ndarray | None, list[str] | None]:
    """[rows] int64 labels (-1: none) and class names; both None when no row has a label.

    Names are those of the ClassLabel feature, else `names` where they suffice, else the values: text in sorted order,
    numbers as they are (so two files of one set agree).
    """
    values, rows, feature = table.data.column(column), _rows(table), table.features[column]
    classes = getattr(feature, "names", None)
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        classes = sorted(v for v in pc.unique(values).to_pylist() if v is not None)
        values = pc.index_in(values, value_set=pa.array(classes, values.type))
    labels = pc.fill_null(pc.cast(values, pa.int64()), -1).to_numpy()
    labels = labels if rows is None else labels[rows]
    low, high = int(labels.min()), int(labels.max())
    if high < 0 and low >= -1:
        return None, None
    if classes is None and names is not None and low >= -1 and high < len(names):
        classes = names
    if classes is None and (low < -1 or high >= 100_000):  # identifiers, not indices
        distinct, labels = np.unique(labels, return_inverse=True)
        return labels.astype(np.int64), [str(v) for v in distinct]
    classes = list(classes) if classes is not None else [str(i) for i in range(high + 1)]
    if low < -1 or high >= len(classes):
        raise UserError(
            f"{what} has the label {high if low >= -1 else low}, but {len(classes)} class names. Name another label column."
        )
    return labels, classes


def _rows(table: Any) -> np.ndarray | None:
    """The rows of the underlying Arrow table that a selected or shuffled Dataset shows, None for all of them."""
    return None if table._indices is None else table._indices.column(0).to_numpy()


# ---- streams ----


class StreamingSource:
    """An endless shuffled stream of images: no length, no index, no labels.

    Position p of the stream is an item, good or bad; the place of a bad one is taken by the next good one. So a position means
    the same whether or not the stream was interrupted, and skipping needs no decoding.

    Attributes:
        skipped: position -> reason, of the bad items that this process met.
        skipped_count: how often one was met, by this process and those forked from it (each epoch meets it again).
    """

    classes = None

    def __init__(self, name: str, stream: Any, column: str, buffer: int, limit: int | None, fingerprint: str):
        """`stream`: a `datasets.IterableDataset` whose `column` is not decoded."""
        self.name, self.stream, self.column, self.buffer, self.limit = name, stream, column, buffer, limit
        self.skipped: dict[int, str] = {}
        self._fingerprint = fingerprint
        self._epoch_length: int | None = None  # known once an epoch was passed
        self._bad = multiprocessing.Value("q", 0)

    def labels(self) -> None:
        return None

    def fingerprint(self) -> str:
        """Of name, config, split and revision, or of the local files' content."""
        return self._fingerprint

    def iterate(self, seed: int, skip: int = 0, step: int = 1) -> Iterator[Image.Image]:
        """Images at positions skip, skip + step, ... of the endless stream of `seed`; each epoch is shuffled anew.

        Worker w of W takes `iterate(seed, first + w, W)`: together they give the one sequence, in any number of processes.
        Skipped items are read, not decoded; epochs after the first are not even read.

        Raises:
            UserError: the stream is empty, more than half of the first 100 images tried are bad, or an epoch has no good one.
        """
        wanted, tried, bad, bad_run = skip, 0, 0, 0
        for position, cell in self._cells(seed, skip):
            if position < wanted:
                continue
            tried += 1
            try:
                image = decode(encoded_cell(cell))
            except BadImage as e:
                bad, bad_run = bad + 1, bad_run + 1
                self._note(position, e.reason)
                if (tried <= PROBED and bad > PROBED / 2) or bad_run >= (self._epoch_length or sys.maxsize):
                    raise UserError(
                        f"{self.name}: {bad} of the first {tried} images tried cannot be read ({e.reason}). Name another set."
                    ) from e
                continue
            bad_run = 0
            while wanted <= position:
                yield image.copy() if wanted < position else image
                wanted += step

    def skipped_summary(self) -> str:
        """One line for the log; empty when nothing was skipped."""
        examples = "; ".join(f"position {p}: {reason}" for p, reason in list(self.skipped.items())[:3])
        count = self._bad.value
        return f"{count:,} images of {self.name} were skipped" + (f" ({examples})" if examples else "") if count else ""

    @property
    def skipped_count(self) -> int:
        return self._bad.value

    def _note(self, position: int, reason: str) -> None:
        if position not in self.skipped:
            self.skipped[position] = reason
            with self._bad.get_lock():
                self._bad.value += 1

    def _cells(self, seed: int, start: int) -> Iterator[tuple[int, Any]]:
        """(position, cell) for ever, from the start of the epoch that holds `start` or before."""
        import fsspec.asyn

        fsspec.asyn.reset_lock()  # a forked worker must not wait for its parent's event loop
        epoch = position = 0
        while True:
            while self._epoch_length and start - position >= self._epoch_length:
                epoch, position = epoch + 1, position + self._epoch_length
            first = position
            for cell in self._shuffled(np.random.default_rng((seed, epoch))):
                yield position, cell
                position += 1
            if position == first:
                raise UserError(f"{self.name} is an empty stream. Name a data set that has rows.")
            epoch, self._epoch_length = epoch + 1, position - first

    def _shuffled(self, g: np.random.Generator) -> Iterator[Any]:
        """One epoch's cells: shards in random order through a buffer of which a random cell makes room for each new one.

        The library's own shuffle would do, but it reads ten shards in threads and then sleeps for seconds at each epoch's end.
        """
        held: list[Any] = []
        for cell in itertools.islice(self._cells_of_shards(g), self.limit):
            if len(held) < self.buffer:
                held.append(cell)
                continue
            i = int(g.integers(self.buffer))
            out, held[i] = held[i], cell
            yield out
        yield from (held[i] for i in g.permutation(len(held)).tolist())

    def _cells_of_shards(self, g: np.random.Generator) -> Iterator[Any]:
        n = self.stream.num_shards
        # With a limit the first shards come first, so that each epoch has the same images.
        shards = range(n) if self.limit is not None else g.permutation(n).tolist()
        for i in shards:
            # Not iter(shard): in a loader's worker that gives nothing but this worker's share.
            with _explained(self.name, f"The stream {self.name} broke off. Run the same command again to go on from there."):
                for batch in self.stream.shard(num_shards=n, index=i).iter(batch_size=1):
                    yield batch[self.column][0]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_bad"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bad = multiprocessing.Value("q", 0)


# ---- the datasets library ----


def load_named(config: DatasetsConfig) -> tuple[Any, dict[str, Any]]:
    """A `datasets` (Iterable)Dataset, and what identifies its content."""
    datasets, path = _datasets(), Path(config.name).expanduser()
    content: dict[str, Any] = {"config": config.config, "split": config.split, "revision": config.revision}
    files = config.data_files if config.data_files is None or isinstance(config.data_files, list) else [config.data_files]
    arguments = {"split": config.split, "revision": config.revision, "streaming": config.streaming}
    if os.path.isdir(path):
        inside = sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))
        content["files"] = files_fingerprint((os.fsencode(f.relative_to(path).as_posix()), f) for f in inside)
        with _explained(str(path)):
            if kind := _saved_kind(path):
                return _saved(config, kind, datasets.load_from_disk(str(path))), content
            return datasets.load_dataset(str(path), config.config, data_files=files, **arguments), content
    if looks_like_path(config.name):
        raise missing(path)
    content |= {"name": config.name, "data_files": files}
    if config.name in BUILDERS:
        local = [p for f in files or [] if "://" not in f for p in _local_files(f)]
        remote = [f for f in files or [] if "://" in f]
        content["data_files"] = [_sha256(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in local] + remote
        with _explained(f"{config.name} data"):
            return datasets.load_dataset(
                config.name, config.config, data_files=[*map(str, local), *remote], **arguments
            ), content
    unreachable = _unreachable(config.name, config.revision)
    sentence = (
        f"The data set {config.name!r} cannot be reached ({unreachable or 'the connection broke off'}), no copy of "
        f"{f'its revision {config.revision}' if config.revision else 'it'} is known on this machine, and there is no folder of "
        "that name here. Connect to the network, or name a local folder or parquet file."
    )
    if unreachable and (config.streaming or config.revision):  # a copy does not say which revision it is of
        raise EnvironmentFailed(sentence)
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = bool(before or unreachable)  # straight to the local copy: no half minute of retries
    try:
        with _explained(config.name, unreachable=sentence):
            return datasets.load_dataset(config.name, config.config, data_files=files, **arguments), content
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _saved_kind(path: Path) -> str | None:
    """Whether `save_to_disk` wrote this folder, and what: "dict" of splits or one "table"."""
    if (path / "dataset_dict.json").is_file():
        return "dict"
    return "table" if (path / "state.json").is_file() and (path / "dataset_info.json").is_file() else None


def _saved(config: DatasetsConfig, kind: str, saved: Any) -> Any:
    splits = list(saved) if kind == "dict" else [str(saved.split)] if saved.split is not None else [config.split]
    if config.split not in splits:
        raise UserError(
            f"{config.name} has no split {config.split!r} (it has {', '.join(splits)}). Set `split` to one of them."
        )
    table = saved[config.split] if kind == "dict" else saved
    return table.to_iterable_dataset() if config.streaming else table


def _local_files(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser().absolute()
    found = [path] if os.path.exists(path) else sorted(Path(m) for m in glob.glob(str(path), recursive=True))
    if not found:
        raise missing(path)
    return found


def _datasets() -> Any:
    import datasets

    # Else every load, of local files too, sends a request that a machine without a network waits for.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what it would log, it raises too
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _unreachable(name: str, revision: str | None, seconds: float = 5.0) -> str | None:
    """Why the hub cannot be asked about this data set; None when it answers.

    Raises:
        UserError: it answers that there is no such set or revision.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi(endpoint=_datasets().config.HF_ENDPOINT).dataset_info(name, revision=revision, timeout=seconds)
            outcome.append(None)
        except Exception as e:
            outcome.append(e)

    asking = threading.Thread(target=ask, daemon=True)  # name resolution has a time limit of its own, up to half a minute
    asking.start()
    asking.join(seconds)
    error = outcome[0] if outcome else TimeoutError("no answer")
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        raise UserError(
            f"There is no folder and no public data set called {name!r}. Correct the name, or log in if it is private."
        ) from error
    if isinstance(error, RevisionNotFoundError):
        raise UserError(f"The data set {name!r} has no revision {revision!r}. Name one that exists.") from error
    return None if error is None else _first_line(error)


@contextmanager
def _explained(what: str, unreachable: str | None = None) -> Iterator[None]:
    """Turn what `datasets` raises into one sentence."""
    try:
        yield
    except DecantError:
        raise
    except Exception as e:
        root = e
        while root.__cause__ is not None and isinstance(root.__cause__, Exception):
            root = root.__cause__
        if isinstance(root, OSError) and root.errno in (errno.ENOSPC, errno.EDQUOT):
            cache = _datasets().config.HF_DATASETS_CACHE
            raise EnvironmentFailed(
                f"The disk is full while {what} is unpacked to {cache}. Free some space or set HF_HOME."
            ) from e
        if isinstance(root, PermissionError):
            raise EnvironmentFailed(
                f"{what} cannot be loaded: {_first_line(root)}. Change the permissions, or set HF_HOME."
            ) from e
        client = type(root).__module__.split(".")[0] in ("aiohttp", "httpcore", "httpx", "httpx2", "requests", "urllib3")
        if unreachable and (client or isinstance(e, (ConnectionError, TimeoutError))):
            raise EnvironmentFailed(unreachable) from e
        raise UserError(
            f"{what} cannot be read by `datasets`: {_first_line(root)}. Correct its name, split, config or files."
        ) from e


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _limit_problems(limit: int | None) -> list[str]:
    return [f"limit must be at least 1, got {limit}"] if limit is not None and limit < 1 else []


def _empty_problems(**values: str) -> list[str]:
    return [f"{key} is empty" for key, value in values.items() if not value.strip()]


def _same_column_problems(image: str | None, label: str | None) -> list[str]:
    return [f"image and label are both {image!r}"] if image is not None and image == label else []
