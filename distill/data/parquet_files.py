"""Parquet files by path, pattern, folder or list, and what their footers say before anything is loaded."""

import glob
import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from distill.data.hub import first_line
from distill.data.paths import SPLITS, missing
from distill.errors import UserError


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


def filled_files(files: list[Path]) -> tuple[list[Path], list[str] | None]:
    """The files that have rows, and the class names that schema metadata lists, directly or in a JSON note.

    Raises:
        UserError: one is not a whole parquet file.
    """
    filled, names = [], None
    for file in files:
        try:
            footer = pq.read_metadata(file)
        except (pa.ArrowInvalid, OSError) as e:
            raise UserError(f"{file} is not a whole parquet file ({first_line(e)}). Fetch it again or leave it out.") from e
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
