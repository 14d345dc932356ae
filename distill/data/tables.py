"""Tables with a column of encoded images, and perhaps one of labels, as an ImageSource."""

import difflib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill.data.encoded import ImageSource, seeded_order
from distill.data.images import BadImage
from distill.errors import UserError
from distill.files import sha256_json


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

    def shared(self, rows: np.ndarray, other: Any, theirs: np.ndarray) -> int:
        """How many of another table's rows are among these rows: those of the same number, where both show the same files."""
        if not isinstance(other, ArrowImages) or len(self) != len(other):
            return 0
        return int(np.isin(theirs, rows).sum()) if self.fingerprint(rows) == other.fingerprint(theirs) else 0

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
