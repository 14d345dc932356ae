"""Where images come from: the Source that training and evaluation see, its kinds, and the shorthand that names one in a recipe.

A kind is a config class with a `build()` and one line in `KINDS`.
"""

import os
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
from PIL import Image
from pydantic import Field

from distill.config import Config
from distill.data.encoded import ImageSource, seeded_order
from distill.data.folders import SUFFIXES, FolderImages, image_files
from distill.data.hub import BUILDERS, load_named, load_parquet, saved_kind
from distill.data.parquet_files import filled_files, parquet_files
from distill.data.paths import SPLITS, content_hash, looks_like_path, missing
from distill.data.scenes import ScenesConfig
from distill.data.streams import StreamingSource, stream_source
from distill.data.tables import table_source
from distill.errors import UserError
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
    """The source to evaluate on: without items that cannot be read or, in a labelled set, lack a label. As the kind of source does it: what
    is rendered is always readable."""
    own = getattr(source, "checked", None)
    return source if own is None else own(progress)


def skipped_summary(source: "Source | StreamingSource") -> str:
    """One line on the images that a run could not read so far; empty when there are none."""
    return source.skipped_summary() if isinstance(source, ImageSource | StreamingSource) else ""


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
        files, names = filled_files(parquet_files(self.path))
        what = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
        table = load_parquet(what, files)
        name = f"{files[0].parent.name}/{files[0].stem}" if len(files) == 1 else files[0].parent.name
        content = {"files": [content_hash(f) for f in files]}
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
        table, content = load_named(
            self.name,
            config=self.config,
            split=self.split,
            revision=self.revision,
            data_files=self.data_files,
            streaming=self.streaming,
        )
        name = "/".join(p for p in (Path(self.name).name, self.config, self.split) if p)
        if not self.streaming:
            return table_source(name, name, table, content, self.image, self.label, self.limit, None)
        return stream_source(name, table, content, self.image, self.buffer, self.limit)


KINDS: dict[str, type[Config]] = {
    "folder": FolderConfig,
    "parquet": ParquetConfig,
    "datasets": DatasetsConfig,
    "scenes": ScenesConfig,
}
SourceConfig = Annotated[FolderConfig | ParquetConfig | DatasetsConfig | ScenesConfig, Field(discriminator="kind")]


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
    if saved_kind(path):
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


def _limit_problems(limit: int | None) -> list[str]:
    return [f"limit must be at least 1, got {limit}"] if limit is not None and limit < 1 else []


def _empty_problems(**values: str) -> list[str]:
    return [f"{key} is empty" for key, value in values.items() if not value.strip()]


def _same_column_problems(image: str | None, label: str | None) -> list[str]:
    return [f"image and label are both {image!r}"] if image is not None and image == label else []
