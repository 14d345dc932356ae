"""Images with a map beside each: class ids of the pixels, or their depth. What dense evaluations are judged by.

A map comes as a single-channel file of the image's own size: 8 or 16 bit PNG, a palette PNG (its indices), TIFF, BMP or .npy. Colours are
never converted, and lossy formats are refused: either would change the numbers.

Shape legend: H W pixels of an image.
"""

import os
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from PIL import Image
from pydantic import Field

from distill.config import Config
from distill.data.encoded import Encoded, ImageSource, seeded_order
from distill.data.folders import FolderImages, image_files
from distill.data.hub import load_parquet
from distill.data.images import MAX_PIXELS, BadImage, decode
from distill.data.parquet_files import filled_files, parquet_files
from distill.data.paths import content_hash, missing
from distill.data.scenes import SHAPES, ScenesConfig, ScenesSource
from distill.data.sources import Source
from distill.data.tables import ArrowImages, image_column, label_column
from distill.errors import UserError
from distill.files import sha256_json
from distill.progress import Progress

IGNORED = -1  # in a map of class ids: the pixel does not count
UNKNOWN = 0.0  # in a map of depth: not measured there
MOST_CLASSES = 1000  # an id above is a depth, an instance or a colour taken for a class
SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".npy")
FORMATS = ("PNG", "TIFF", "BMP")


class MapSource(Source, Protocol):
    """A Source whose items have a map each. `labels()` and `classes` are None: it is pixels that have classes here.

    Attributes:
        class_names: names of the class ids; None where they are not known, or the map is no map of classes.
    """

    @property
    def class_names(self) -> list[str] | None: ...

    def map(self, index: int) -> np.ndarray:
        """[H, W] int64 class ids, IGNORED where a pixel does not count; or float32 metres, UNKNOWN where there is no depth."""


def decode_map(data: bytes | Path) -> np.ndarray:
    """Encoded map, or a file of one -> [H, W] as stored: whole numbers or fractions, unconverted.

    Raises:
        BadImage: empty, corrupt, missing, lossy, of several channels, or of more than 100 million pixels.
    """
    try:
        data = data.read_bytes() if isinstance(data, Path) else data
    except FileNotFoundError as e:
        raise BadImage("missing map") from e
    except OSError as e:
        raise BadImage(f"map cannot be read ({e.strerror})") from e
    try:
        values = np.load(BytesIO(data), allow_pickle=False) if data.startswith(b"\x93NUMPY") else _pixels(data)
    except (BadImage, MemoryError):
        raise
    except Exception as e:  # Pillow's plugins and numpy raise nearly anything on hostile bytes
        raise BadImage(f"map cannot be read ({type(e).__name__})") from e
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        raise BadImage(f"a map has one number a pixel, this one is {list(values.shape)} of {values.dtype}")
    return values


def _pixels(data: bytes) -> np.ndarray:
    try:
        with Image.open(BytesIO(data)) as image:
            if image.format not in FORMATS:
                raise BadImage(f"a {image.format} map: store it as PNG, which loses nothing")
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width} x {image.height} is more than {MAX_PIXELS / 1e6:.0f} million pixels")
            if len(image.getbands()) > 1:
                raise BadImage(f"a map of colours ({image.mode}): it must hold one number a pixel, or a palette's indices")
            return np.asarray(image)
    except Image.UnidentifiedImageError as e:
        raise BadImage("map of no known format") from e


class EncodedMaps(ImageSource):
    """A MapSource of encoded images and encoded maps: row r of one store belongs to row r of the other.

    There are no stand-ins: an item whose image or map cannot be read is a UserError, and `checked()` leaves it out.

    Args:
        ignore: numbers, as stored, that do not count.
        scale: metres of one unit of a depth map; None for a map of class ids.
    """

    def __init__(
        self,
        name: str,
        encoded: Encoded,
        maps: Encoded,
        order: np.ndarray,
        *,
        ignore: tuple[int, ...] = (),
        scale: float | None = None,
        class_names: list[str] | None = None,
        dropped: list[str] | None = None,
    ):
        super().__init__(name, encoded, order, dropped=dropped)
        self.maps, self.ignore, self.scale, self.class_names = maps, ignore, scale, class_names

    def image(self, index: int, shorter_side: int | None = None) -> Image.Image:
        """Item `index` as RGB. Raises: UserError: it cannot be read (see `checked`)."""
        try:
            return self._decode(index, shorter_side)
        except BadImage as e:
            raise UserError(f"{self.name}: {self._where(index)}: {e.reason}. Repair the image or leave it out.") from e

    def map(self, index: int) -> np.ndarray:
        """As in MapSource. Raises: UserError: the map cannot be read, or holds a number that is no class id."""
        try:
            return self._metres(index) if self.scale is not None else self._ids(index)
        except BadImage as e:
            raise UserError(f"{self.name}: {self._where(index)}: {e.reason}. Repair the map or leave it out.") from e

    def fingerprint(self) -> str:
        """As for every source; maps and how they are read belong to it."""
        if self._fingerprint is None:
            maps = {"maps": self.maps.fingerprint(self.order), "ignore": list(self.ignore), "scale": self.scale}
            images = super().fingerprint()
            self._fingerprint = sha256_json({"images": images, **maps, "class_names": self.class_names})[:16]
        return self._fingerprint

    def checked(self, progress: Progress | None = None) -> "EncodedMaps":
        """Without the items whose image or map cannot be read; every one is decoded once.

        Raises:
            UserError: a map of another size than its image, an id that is no class, or more than half of the first 100 are bad.
        """
        found = super().checked(progress)
        if found is self:
            return self
        return EncodedMaps(
            self.name,
            self.encoded,
            self.maps,
            found.order,
            ignore=self.ignore,
            scale=self.scale,
            class_names=self.class_names,
            dropped=found.dropped,
        )

    def _reason(self, index: int) -> str | None:
        try:
            size = decode(self.encoded[int(self.order[index])]).size
            height, width = (self._metres(index) if self.scale is not None else self._ids(index)).shape
        except BadImage as e:
            return f"{self._where(index)}: {e.reason}"
        if (width, height) != size:
            raise UserError(
                f"{self.name}: the map of {self._where(index)} is {width} x {height} pixels, its image {size[0]} x {size[1]}. "
                "Bring both to one size."
            )
        return None

    def _where(self, index: int) -> str:
        return self.encoded.where(int(self.order[index]))

    def _stored(self, index: int) -> np.ndarray:
        return decode_map(self.maps[int(self.order[index])])

    def _ids(self, index: int) -> np.ndarray:
        stored = self._stored(index)
        if stored.dtype.kind == "f":
            raise BadImage("the map holds fractions, not class ids; set `scale` if it is a depth map")
        ids = stored.astype(np.int64)
        ids[np.isin(ids, self.ignore)] = IGNORED
        known = MOST_CLASSES if self.class_names is None else len(self.class_names)
        low, high = ids.min(initial=0), ids.max(initial=0)
        if high >= known or low < IGNORED:
            raise UserError(
                f"{self.name}: the map of {self._where(index)} holds {high if high >= known else low}, which is not one of "
                f"{known} classes. Add it to `ignore`"
                + (", or set `scale` if this is a depth map." if self.class_names is None else ", or name all `classes`.")
            )
        return ids

    def _metres(self, index: int) -> np.ndarray:
        stored = self._stored(index)
        metres = stored.astype(np.float32) * np.float32(self.scale)
        metres[np.isin(stored, self.ignore) | ~(np.isfinite(metres) & (metres > 0))] = UNKNOWN
        return metres


class _Maps(Config):
    """Attributes:
    ignore: number or numbers, as stored, that do not count: "unlabelled", "no depth". 0 m and less never counts in a depth map.
    classes: names of the class ids 0, 1, ...
    scale: metres of one unit of a depth map (0.001 for millimetres); without it the map holds class ids.
    limit: the first so many of a fixed shuffle.
    """

    path: str | list[str]
    ignore: int | list[int] = Field(default_factory=list)
    classes: list[str] | None = None
    scale: float | None = None
    limit: int | None = None

    def problems(self) -> list[str]:
        found = [] if self.path and (not isinstance(self.path, str) or self.path.strip()) else ["path is empty"]
        if self.limit is not None and self.limit < 1:
            found.append(f"limit must be at least 1, got {self.limit}")
        if self.scale is not None and not 0 < self.scale < float("inf"):
            found.append(f"scale must be above 0, got {self.scale}")
        if self.scale is not None and self.classes is not None:
            found.append("classes are of a map of class ids, scale is of a depth map: set one of them")
        return found

    def source(self, name: str, images: Encoded, maps: Encoded, names: list[str] | None) -> EncodedMaps:
        """`names`: of the classes, where the data tell them and the recipe does not."""
        ignore = (self.ignore,) if isinstance(self.ignore, int) else tuple(self.ignore)
        names = None if self.scale is not None else self.classes or names
        order = seeded_order(len(images), self.limit)
        return EncodedMaps(name, images, maps, order, ignore=ignore, scale=self.scale, class_names=names)


class ParquetMapsConfig(_Maps):
    """Local parquet files with a column of encoded images and one of encoded maps.

    Attributes:
        path: a file, a folder of parquet files, a pattern, or a list of files.
        map: column of the maps, e.g. `mask` or `depth`.
        image: column of the images; found by type and name where not given.
    """

    kind: Literal["parquet"] = "parquet"
    map: str = "mask"
    image: str | None = None

    def problems(self) -> list[str]:
        return super().problems() + ([f"image and map are both {self.map!r}"] if self.image == self.map else [])

    def build(self) -> EncodedMaps:
        """Raises: UserError: no such file, not parquet, or no such column."""
        files, names = filled_files(parquet_files(self.path))
        what = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
        table = load_parquet(what, files)
        image, column = image_column(what, table.features, self.image), image_column(what, table.features, self.map)
        if image == column:
            raise UserError(f"The column {column!r} of {what} holds the images. Set `map` to the column of the maps.")
        if label_column(what, table.features, None) is not None:
            names = None  # they are the names of whole images' labels
        name = f"{files[0].parent.name}/{files[0].stem}" if len(files) == 1 else files[0].parent.name
        content = {"files": [content_hash(f) for f in files]}
        return self.source(name, ArrowImages(table, image, content), ArrowImages(table, column, content), names)


class FolderMapsConfig(_Maps):
    """Two folders of equal names: street/one.jpg in the images' has its map in street/one.png or street/one.npy of the maps'.

    Attributes:
        path: the folder that holds both.
        images, maps: names of the two folders in it.
    """

    kind: Literal["folder"] = "folder"
    path: str
    images: str = "images"
    maps: str = "masks"

    def build(self) -> EncodedMaps:
        """Raises: UserError: no such folder, no images in it, an image without a map, or two files of one name in a folder."""
        root = Path(self.path).expanduser().absolute()
        images, maps = root / self.images, root / self.maps
        for folder in (images, maps):
            if not os.path.isdir(folder):
                raise missing(folder)
        paths = list(image_files(str(images)))
        if not paths:
            raise UserError(f"{images} holds no images, nor do its sub-folders. Name another.")
        images_of = _by_name(paths)
        maps_of = _by_name(f.relative_to(maps).as_posix() for f in sorted(maps.rglob("*")) if f.suffix.lower() in SUFFIXES)
        for of, folder, what, other in ((images_of, images, "images", "map"), (maps_of, maps, "maps", "image")):
            if twice := [files for name, files in of.items() if len(files) > 1 and name in images_of]:
                raise UserError(
                    f"{' and '.join(twice[0])} in {folder} are {what} of one name, so that it is open which has the {other} of that name. "
                    f"Rename or remove all but one ({len(twice):,} such names)."
                )
        partners = [maps_of.get(os.path.splitext(p)[0]) for p in paths]
        alone = [p for p, partner in zip(paths, partners, strict=True) if partner is None]
        if alone:
            kinds = " ".join(s[1:] for s in SUFFIXES)
            raise UserError(
                f"{len(alone):,} of {len(paths):,} images in {images} have no map of the same name in {maps} ({kinds}), such as "
                f"{alone[0]}. Add the maps or take these images out."
            )
        found = [p[0] for p in partners if p is not None]
        return self.source(root.name, FolderImages(images, paths), FolderImages(maps, found), None)


def _by_name(paths: Iterable[str]) -> dict[str, list[str]]:
    """Relative paths by what they are without their suffix."""
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(os.path.splitext(path)[0], []).append(path)
    return found


class SceneMapsConfig(ScenesConfig):
    """The rendered scenes with what they show: shape ids (mask) or metres (depth).

    Attributes:
        map: which of the two.
    """

    map: Literal["mask", "depth"] = "mask"

    def build(self) -> "SceneMaps":
        return SceneMaps(self)


class SceneMaps(ScenesSource):
    """Rendered scenes as a MapSource."""

    def __init__(self, config: SceneMapsConfig):
        super().__init__(config)
        self.which = config.map
        self.classes = None
        self.class_names = list(SHAPES) if config.map == "mask" else None

    def labels(self) -> Any:
        """None: it is the pixels that have classes."""
        return None

    def map(self, index: int) -> np.ndarray:
        scene = self.scene(index)
        return scene.mask.astype(np.int64) if self.which == "mask" else scene.depth


MAP_KINDS: dict[str, type[Config]] = {"parquet": ParquetMapsConfig, "folder": FolderMapsConfig, "scenes": SceneMapsConfig}
MapsConfig = Annotated[ParquetMapsConfig | FolderMapsConfig | SceneMapsConfig, Field(discriminator="kind")]
