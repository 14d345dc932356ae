"""Sources: what a recipe may name, what comes out of it, and what bad data gets."""

# mypy: disable-error-code="union-attr,arg-type,attr-defined,index,return-value,func-returns-value,assignment"

import io
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from distill.data.encoded import ImageSource
from distill.data.hub import why_unreachable
from distill.data.scenes import ScenesConfig
from distill.data.sources import (
    KINDS,
    DatasetsConfig,
    FolderConfig,
    ParquetConfig,
    SourceConfig,
    StreamingSource,
    checked,
    skipped_summary,
    source_from,
)
from distill.data.tables import table_source
from distill.errors import EnvironmentFailed, UserError
from distill.evaluate.split import shared_items

BROKEN = b"\xff\xd8\xff\xe0 this is no JPEG"


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """The library's copies go to a folder of this session."""
    import datasets

    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def png(value: int) -> bytes:
    """A 4 x 4 image that says which one it is."""
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (value % 256, value // 256, 7)).save(out, "PNG")
    return out.getvalue()


def number(image: Any) -> int:
    assert image.mode == "RGB"
    r, g, b = image.getpixel((0, 0))
    assert b == 7
    return r + 256 * g


def numbers(source) -> list[int]:
    return [number(source.image(i)) for i in range(len(source))]


def folder(root: Path, classes=("cat", "dog", "emu"), each: int = 10) -> Path:
    """classes x each images, numbered on; hundreds digit is the class."""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"{i:03}.png").write_bytes(png(100 * c + i))
    return root


def parquet(path: Path, images: list[bytes | None], metadata: dict | None = None, struct: bool = True, **columns) -> Path:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if struct else pa.binary()
    cells = pa.array([{"bytes": b, "path": None} for b in images] if struct else images, kind)
    table = pa.table({"image": cells, **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table.replace_schema_metadata({k: json.dumps(v) for k, v in (metadata or {}).items()}), path, row_group_size=7
    )
    return path


def features(**columns) -> dict:
    return {"huggingface": {"info": {"features": {"image": {"_type": "Image"}, **columns}}}}


# ---- folders ----


def test_folder_reads_everything_with_labels(tmp_path):
    source = FolderConfig(path=str(folder(tmp_path / "set")), labels=True).build()
    assert source.name == "set"
    assert source.classes == ["cat", "dog", "emu"]
    assert sorted(numbers(source)) == sorted(100 * c + i for c in range(3) for i in range(10))
    assert source.labels().dtype == np.int64
    assert [n // 100 for n in numbers(source)] == source.labels().tolist()
    plain = FolderConfig(path=str(tmp_path / "set")).build()
    assert plain.labels() is None
    assert plain.classes is None


def test_limits_are_prefixes_and_mix_classes(tmp_path):
    root = str(folder(tmp_path / "set"))
    full = numbers(FolderConfig(path=root).build())
    assert full != sorted(full)
    for limit in (1, 5, 30, 99):
        source = FolderConfig(path=root, labels=True, limit=limit).build()
        assert numbers(source) == full[:limit]
        assert source.classes == ["cat", "dog", "emu"]
    assert len({n // 100 for n in full[:9]}) == 3


def test_fingerprint_survives_moving_and_sees_changes(tmp_path):
    root = folder(tmp_path / "set")
    of = FolderConfig(path=str(root), labels=True).build().fingerprint()
    shutil.copytree(root, tmp_path / "elsewhere" / "other")
    other = tmp_path / "elsewhere" / "other"
    assert FolderConfig(path=str(other), labels=True).build().fingerprint() == of
    assert FolderConfig(path=str(other)).build().fingerprint() != of
    assert FolderConfig(path=str(other), labels=True, limit=5).build().fingerprint() != of
    assert FolderConfig(path=str(other), labels=True, limit=1000).build().fingerprint() == of
    (other / "cat" / "000.png").write_bytes(png(999))
    assert FolderConfig(path=str(other), labels=True).build().fingerprint() != of


def test_folder_errors_are_sentences(tmp_path):
    folder(tmp_path / "images")
    with pytest.raises(UserError, match=r"no .*imags. Did you mean .*/images\?"):
        FolderConfig(path=str(tmp_path / "imags")).build()
    with pytest.raises(UserError, match=r"images/catt?.*Did you mean .*/images/cat\?"):
        FolderConfig(path=str(tmp_path / "images" / "catt")).build()
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no images"):
        FolderConfig(path=str(tmp_path / "empty")).build()
    (tmp_path / "empty" / "sub" / "a.txt").write_text("x")
    with pytest.raises(UserError, match="holds no images"):
        FolderConfig(path=str(tmp_path / "empty")).build()
    with pytest.raises(UserError, match="is a file"):
        FolderConfig(path=str(tmp_path / "empty" / "sub" / "a.txt")).build()
    (tmp_path / "images" / "loose.png").write_bytes(png(1))
    with pytest.raises(UserError, match=r"no sub-folder.*loose.png"):
        FolderConfig(path=str(tmp_path / "images"), labels=True).build()


def test_relative_path_holds_when_the_process_moves(tmp_path, monkeypatch):
    folder(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    source = FolderConfig(path="set").build()
    monkeypatch.chdir("/")
    assert len(set(numbers(source))) == 30


def test_odd_names(tmp_path):
    for name in ["ein Bild [1].PNG", "日本.png", "a\nb.png"]:
        (tmp_path / name).write_bytes(png(3))
    with open(os.fsencode(tmp_path) + b"/\xff\xfe.png", "wb") as f:
        f.write(BROKEN)
    source = FolderConfig(path=str(tmp_path)).build()
    assert numbers(source) == [3] * 4
    assert len(source.fingerprint()) == 16
    source.skipped_summary().encode()


# ---- bad images in a run ----


def spoiled(root: Path, *which: str) -> Path:
    for name in which:
        (root / name).write_bytes(BROKEN)
    return root


def test_bad_items_are_replaced_within_their_class_and_counted(tmp_path):
    root = spoiled(folder(tmp_path / "set"), "cat/000.png", "dog/005.png", "emu/001.png")
    (root / "dog" / "006.png").write_bytes(b"")
    source = FolderConfig(path=str(root), labels=True).build()
    found = numbers(source)
    assert [n // 100 for n in found] == source.labels().tolist()
    assert len(source.skipped) == 4
    assert sorted(r.split(":")[0] for r in source.skipped.values()) == [
        "cat/000.png",
        "dog/005.png",
        "dog/006.png",
        "emu/001.png",
    ]
    assert source.skipped_summary().startswith("4 of 30 images of set were skipped (")
    assert "\n" not in source.skipped_summary()
    again = FolderConfig(path=str(root), labels=True).build()
    assert [number(again.image(i)) for i in reversed(range(30))] == found[::-1]  # whatever the order of access


def test_without_labels_the_next_good_item_stands_in(tmp_path):
    root = spoiled(folder(tmp_path / "set", ("a",), 9), "a/004.png")
    source = FolderConfig(path=str(root)).build()
    bad = source.order.tolist().index(4)
    assert number(source.image(bad)) == source.order[(bad + 1) % 9]
    assert source.skipped_summary().startswith("1 of 9 images")


def test_a_class_without_a_good_image_stops_no_run(tmp_path):
    root = spoiled(folder(tmp_path / "set", each=2), "cat/000.png", "cat/001.png")
    source = FolderConfig(path=str(root), labels=True).build()
    assert {n // 100 for n in numbers(source)} == {1, 2}


def test_hopeless_data_is_a_sentence(tmp_path):
    half = folder(tmp_path / "half", ("a",), 10)
    spoiled(half, *(f"a/{i:03}.png" for i in range(5)))
    FolderConfig(path=str(half)).build().probe()
    assert len(set(numbers(FolderConfig(path=str(half)).build()))) == 5
    spoiled(half, "a/005.png")
    with pytest.raises(UserError, match=r"half: 6 of the first \d+ images tried cannot be read \(a/00"):
        FolderConfig(path=str(half)).build().probe()
    with pytest.raises(UserError, match="cannot be read"):
        numbers(FolderConfig(path=str(half)).build())
    with pytest.raises(UserError, match="cannot be read"):
        FolderConfig(path=str(half)).build().checked()
    one = spoiled(folder(tmp_path / "one", ("a",), 1), "a/000.png")
    with pytest.raises(UserError, match="cannot be read"):
        FolderConfig(path=str(one)).build().image(0)


def test_a_good_start_and_a_bad_rest_goes_on(tmp_path):
    """The rule of the first 100 is about them alone; later damage is replaced and counted however much it is."""
    root = folder(tmp_path / "set", ("a",), 200)
    source = FolderConfig(path=str(root)).build()
    for i in range(110):
        source.image(i)
    for row in source.order[110:].tolist():
        (root / "a" / f"{row:03}.png").write_bytes(BROKEN)
    assert len(set(numbers(source))) == 110
    assert len(source.skipped) == 90


def test_checked_drops_bad_and_unlabelled_items(tmp_path):
    root = spoiled(folder(tmp_path / "set"), "cat/000.png", "dog/005.png")
    source = FolderConfig(path=str(root), labels=True).build()
    clean = checked(source)
    assert len(clean) == 28
    assert sorted(numbers(clean)) == sorted({c * 100 + i for c in range(3) for i in range(10)} - {0, 105})
    assert [n // 100 for n in numbers(clean)] == clean.labels().tolist()
    assert clean.classes == source.classes
    assert clean.skipped == {}
    assert clean.skipped_summary().startswith("2 of 30 images of set were left out (")
    assert clean.fingerprint() != source.fingerprint()
    assert source.checked().fingerprint() == clean.fingerprint()
    labels = pa.array([0, 1, None, -1, 1, 0])
    path = parquet(tmp_path / "t.parquet", [png(i) for i in range(6)], label=labels)
    table = ParquetConfig(path=str(path)).build()
    assert sorted(table.labels().tolist()) == [-1, -1, 0, 0, 1, 1]
    assert sorted(numbers(table.checked())) == [0, 1, 4, 5]
    assert table.checked().labels().min() == 0


def test_checking_is_remembered_and_a_clean_source_is_itself(tmp_path, monkeypatch):
    source = FolderConfig(path=str(folder(tmp_path / "set"))).build()
    assert source.checked() is source
    monkeypatch.setattr(ImageSource, "_check", lambda *_: pytest.fail("checked twice"))
    again = FolderConfig(path=str(tmp_path / "set")).build()
    assert again.checked() is again
    scenes = ScenesConfig(count=3).build()
    assert checked(scenes) is scenes
    assert skipped_summary(scenes) == ""


# ---- processes ----


def table_with(path: Path, values, limit=None):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    if not path.exists():
        pq.write_table(pa.table({"image": pa.array([{"bytes": png(v), "path": None} for v in values], kind)}), path)
    return ParquetConfig(path=str(path), limit=limit).build()


def test_images_of_both_sets_are_counted(tmp_path):
    one, other = folder(tmp_path / "one"), folder(tmp_path / "other", each=12)
    whole, few = FolderConfig(path=str(one)).build(), FolderConfig(path=str(one), limit=7).build()
    assert shared_items(whole, few) == shared_items(few, whole) == 7
    assert shared_items(whole, whole) == 30
    copies = FolderConfig(path=str(other)).build()
    assert shared_items(whole, copies) == 30  # by content: 6 of its 36 images are new
    assert shared_items(copies, whole) == 30
    assert shared_items(whole, FolderConfig(path=str(folder(tmp_path / "new", ("fox",)))).build()) == 10  # cat's, renamed
    assert shared_items(FolderConfig(path=str(one / "cat")).build(), FolderConfig(path=str(one / "dog")).build()) == 0


def test_files_that_are_alike_at_both_ends_are_not_the_same(tmp_path):
    for name, middle in (("a", 1), ("b", 2)):
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[32] = middle
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / f"{name}.bmp")
    a, b = (FolderConfig(path=str(tmp_path / name)).build() for name in "ab")
    assert shared_items(a, b) == 0
    shutil.copy(tmp_path / "a" / "a.bmp", tmp_path / "b" / "c.bmp")
    assert shared_items(a, FolderConfig(path=str(tmp_path / "b")).build()) == 1


def test_rows_of_both_sets_are_counted(tmp_path):
    path = tmp_path / "a.parquet"
    many, few = table_with(path, range(20), 12), table_with(path, range(20), 5)
    assert shared_items(many, few) == 5
    assert shared_items(few, many) == 5
    copy = table_with(tmp_path / "b.parquet", range(20))
    assert shared_items(many, copy) == 12
    assert shared_items(many, table_with(tmp_path / "c.parquet", range(100, 120))) == 0
    assert shared_items(many, FolderConfig(path=str(folder(tmp_path / "set"))).build()) == 0


def test_scenes_of_both_sets_are_counted():
    train, test = ScenesConfig(count=8).build(), ScenesConfig(count=5, split="test").build()
    assert shared_items(train, test) == 0
    assert shared_items(train, ScenesConfig(count=5, size=32).build()) == 5
    assert shared_items(train, ScenesConfig(count=5, seed=1).build()) == 0


class Loader(torch.utils.data.Dataset):
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        return number(self.source.image(i))


def both_sources(tmp_path: Path) -> list[ImageSource]:
    root = spoiled(folder(tmp_path / "set"), "cat/000.png")
    images = [png(i) for i in range(30)]
    images[3] = BROKEN
    return [FolderConfig(path=str(root)).build(), ParquetConfig(path=str(parquet(tmp_path / "t.parquet", images))).build()]


def test_forked_workers_read_the_same_and_their_bad_items_are_known_here(tmp_path):
    for source in both_sources(tmp_path):
        expected = numbers(pickle.loads(pickle.dumps(source)))
        loader = torch.utils.data.DataLoader(Loader(source), batch_size=4, num_workers=2, multiprocessing_context="fork")
        assert [n for batch in loader for n in batch.tolist()] == expected
        assert len(source.skipped) == 1  # read by the workers alone, reported here
        assert "Truncated" in source.skipped_summary()


def test_pickles_are_small(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    path = parquet(tmp_path / "t.parquet", [out.getvalue()] * 200)
    source = ParquetConfig(path=str(path)).build()
    assert path.stat().st_size < 200 * len(out.getvalue())
    assert len(pickle.dumps(source)) < 20_000
    assert pickle.loads(pickle.dumps(source)).image(5).tobytes() == source.image(5).tobytes()


# ---- parquet ----


def test_parquet_with_class_names(tmp_path):
    info = features(label={"names": ["x", "y"], "_type": "ClassLabel"})
    path = parquet(
        tmp_path / "set" / "train.parquet", [png(i) for i in range(20)], info, label=pa.array([i % 2 for i in range(20)])
    )
    source = ParquetConfig(path=str(path)).build()
    assert source.name == "set/train"
    assert source.classes == ["x", "y"]
    assert [n % 2 for n in numbers(source)] == source.labels().tolist()
    assert sorted(numbers(source)) == list(range(20))
    assert numbers(ParquetConfig(path=str(path), limit=6).build()) == numbers(source)[:6]


@pytest.mark.parametrize(
    ("labels", "metadata", "expected"),
    [
        (["b", "a", "b"], {}, ["a", "b"]),
        ([1, 0, 1], {"note": {"classes": ["p", "q"]}}, ["p", "q"]),
        ([1, 0, 1], {"classes": ["p", "q"]}, ["p", "q"]),
        ([2, 0, 2], {"note": {"classes": ["p", "q"]}}, ["0", "1", "2"]),
        ([1, 0, 1], {"note": {"classes": "sorted"}}, ["0", "1"]),
        ([9_000_001, 9_000_000, 9_000_001], {}, ["9000000", "9000001"]),
    ],
)
def test_class_names_without_a_class_label(tmp_path, labels, metadata, expected):
    path = parquet(tmp_path / "t.parquet", [png(i) for i in range(3)], metadata, label=pa.array(labels))
    source = ParquetConfig(path=str(path)).build()
    assert source.classes == expected
    by_image = dict(zip(numbers(source), source.labels().tolist(), strict=True))
    assert by_image[0] == by_image[2] == max(by_image.values())
    assert by_image[1] == min(by_image.values()) == 0


def test_columns_are_found_or_named(tmp_path):
    cells = pa.array([{"bytes": png(i + 50), "path": None} for i in range(4)])
    kept = {"mask": cells, "coarse": pa.array([0, 0, 1, 1]), "kind": pa.array(["u", "v", "u", "v"])}
    path = str(parquet(tmp_path / "t.parquet", [png(i) for i in range(4)], **kept))
    source = ParquetConfig(path=path).build()
    assert max(numbers(source)) == 3
    assert source.labels() is None
    other = ParquetConfig(path=path, image="mask", label="kind").build()
    assert min(numbers(other)) == 50
    assert other.classes == ["u", "v"]
    assert other.fingerprint() != source.fingerprint()
    with pytest.raises(UserError, match=r"no column 'masks'.*Did you mean 'mask'"):
        ParquetConfig(path=path, image="masks").build()
    with pytest.raises(UserError, match=r"'coarse'.*cannot be its image"):
        ParquetConfig(path=path, image="coarse").build()
    with pytest.raises(UserError, match=r"'mask'.*cannot be its label"):
        ParquetConfig(path=path, label="mask").build()
    with pytest.raises(UserError, match="no column 'lable'"):
        ParquetConfig(path=path, label="lable").build()


def test_plain_bytes_paths_and_nulls(tmp_path):
    path = parquet(tmp_path / "t.parquet", [png(1), None, png(3), b""], struct=False)
    source = ParquetConfig(path=str(path)).build()
    assert sorted(set(numbers(source))) == [1, 3]
    assert sorted(source.skipped_summary().split("(")[1].rstrip(")").split("; ")) == [
        "row 1: no image in this row",
        "row 3: empty file",
    ]
    (tmp_path / "7.png").write_bytes(png(7))
    cells = pa.array(
        [{"bytes": None, "path": str(tmp_path / "7.png")}] * 2, pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    pq.write_table(pa.table({"image": cells}), tmp_path / "p.parquet")
    assert numbers(ParquetConfig(path=str(tmp_path / "p.parquet")).build()) == [7, 7]


def test_several_files_and_their_fingerprint(tmp_path):
    for i in range(3):
        parquet(tmp_path / "set" / f"train-{i}.parquet", [png(10 * i + j) for j in range(5)])
    parquet(tmp_path / "set" / "train-3.parquet", [])  # an empty shard is no error
    whole = ParquetConfig(path=str(tmp_path / "set")).build()
    assert sorted(numbers(whole)) == [10 * i + j for i in range(3) for j in range(5)]
    pattern = ParquetConfig(path=str(tmp_path / "set" / "train-*.parquet")).build()
    listed = ParquetConfig(path=[str(tmp_path / "set" / f"train-{i}.parquet") for i in range(3)]).build()
    assert whole.fingerprint() == pattern.fingerprint() == listed.fingerprint()
    shutil.copytree(tmp_path / "set", tmp_path / "moved" / "away")
    assert ParquetConfig(path=str(tmp_path / "moved" / "away")).build().fingerprint() == whole.fingerprint()
    parquet(tmp_path / "moved" / "away" / "train-1.parquet", [png(99)] * 5)
    assert ParquetConfig(path=str(tmp_path / "moved" / "away")).build().fingerprint() != whole.fingerprint()


def test_parquet_errors_are_sentences(tmp_path):
    good = parquet(tmp_path / "good.parquet", [png(0)] * 3)
    (tmp_path / "bad.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:-50])
    for name in ("bad", "cut"):
        with pytest.raises(UserError, match=rf"{name}.parquet is not a whole parquet file"):
            ParquetConfig(path=[str(good), str(tmp_path / f"{name}.parquet")]).build()
    with pytest.raises(UserError, match=r"Did you mean .*/good.parquet\?"):
        ParquetConfig(path=str(tmp_path / "god.parquet")).build()
    with pytest.raises(UserError, match="No file matches"):
        ParquetConfig(path=str(tmp_path / "none-*.parquet")).build()
    pq.write_table(pa.table({"a": [1, 2], "label": [0, 1]}), tmp_path / "plain.parquet")
    with pytest.raises(UserError, match=r"no image column \(it has a, label\)"):
        ParquetConfig(path=str(tmp_path / "plain.parquet")).build()
    with pytest.raises(UserError, match="no rows"):
        ParquetConfig(path=str(parquet(tmp_path / "zero.parquet", []))).build()
    with pytest.raises(UserError) as e:
        ParquetConfig(path=[str(good), str(tmp_path / "plain.parquet")]).build()
    assert "\n" not in str(e.value)
    info = features(label={"names": ["x", "y"], "_type": "ClassLabel"})
    with pytest.raises(UserError, match="label 7, but 2 class names"):
        ParquetConfig(path=str(parquet(tmp_path / "l.parquet", [png(0)] * 2, info, label=pa.array([0, 7])))).build()
    with pytest.raises(UserError, match="labels no row"):
        ParquetConfig(path=str(parquet(tmp_path / "n.parquet", [png(0)] * 2, label=pa.array([-1, -1]))), label="label").build()
    cells = pa.array([{"bytes": png(0), "path": None}])
    pq.write_table(pa.table({"left": cells, "right": cells}), tmp_path / "two.parquet")
    with pytest.raises(UserError, match="several image columns"):
        ParquetConfig(path=str(tmp_path / "two.parquet")).build()
    parquet(tmp_path / "splits" / "train.parquet", [png(0)])
    parquet(tmp_path / "splits" / "val.parquet", [png(0)])
    with pytest.raises(UserError, match="splits train and val"):
        ParquetConfig(path=str(tmp_path / "splits")).build()


# ---- the datasets library ----


def saved(path: Path, n: int = 20, splits: bool = True, bad: tuple[int, ...] = ()):
    import datasets

    rows = {
        "image": [{"bytes": BROKEN if i in bad else png(i), "path": None} for i in range(n)],
        "label": [i % 2 for i in range(n)],
    }
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    table = datasets.Dataset.from_dict(rows, features=kinds)
    (datasets.DatasetDict({"train": table, "test": table.select(range(4))}) if splits else table).save_to_disk(str(path))
    return path


def test_saved_folders(tmp_path):
    path = str(saved(tmp_path / "kept"))
    source = DatasetsConfig(name=path).build()
    assert len(source) == 20
    assert source.classes == ["even", "odd"]
    assert [n % 2 for n in numbers(source)] == source.labels().tolist()
    test = DatasetsConfig(name=path, split="test").build()
    assert sorted(numbers(test)) == [0, 1, 2, 3]
    assert [n % 2 for n in numbers(test)] == test.labels().tolist()
    with pytest.raises(UserError, match=r"no split 'val' \(it has train, test\)"):
        DatasetsConfig(name=path, split="val").build()
    assert len(DatasetsConfig(name=str(saved(tmp_path / "single", splits=False))).build()) == 20
    shutil.copytree(path, tmp_path / "copy")
    assert DatasetsConfig(name=str(tmp_path / "copy")).build().fingerprint() == source.fingerprint() != test.fingerprint()


def test_a_selected_table_keeps_images_and_labels_together(tmp_path):
    import datasets

    table = datasets.load_from_disk(str(saved(tmp_path / "kept", splits=False))).select([7, 2, 9])
    source = table_source("s", "s", table, {}, None, None, None, None)
    assert sorted(numbers(source)) == [2, 7, 9]
    assert [n % 2 for n in numbers(source)] == source.labels().tolist()
    again = pickle.loads(pickle.dumps(source))
    assert numbers(again) == numbers(source)


def test_a_local_folder_of_images_through_the_library(tmp_path):
    source = DatasetsConfig(name=str(folder(tmp_path / "set", each=3))).build()
    assert source.classes == ["cat", "dog", "emu"]
    assert [n // 100 for n in numbers(source)] == source.labels().tolist()
    with pytest.raises(UserError, match="cannot be read by"):
        DatasetsConfig(name=str(tmp_path / "set"), split="nosuch").build()
    with pytest.raises(UserError, match="Did you mean"):
        DatasetsConfig(name=str(tmp_path / "sett")).build()


def test_a_builder_with_files(tmp_path):
    path = parquet(tmp_path / "t.parquet", [png(i) for i in range(5)])
    source = DatasetsConfig(name="parquet", data_files=str(path)).build()
    assert sorted(numbers(source)) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="Did you mean"):
        DatasetsConfig(name="parquet", data_files=str(tmp_path / "tt.parquet")).build()
    assert DatasetsConfig(name="parquet").problems() == ["name 'parquet' is a file format: it needs data_files"]


UNREACHABLE = """
import sys, time
from distill.data.sources import source_from
from distill.errors import EnvironmentFailed
for streaming in sys.argv[1:]:
    config = source_from("nosuch/thing").model_copy(update={"streaming": streaming == "True"})
    start = time.monotonic()
    try:
        config.build()
    except EnvironmentFailed as e:
        print(f"{time.monotonic() - start:.1f}", e)
"""


@pytest.mark.parametrize(("answer", "streaming"), [("refused", (False, True)), ("silent", (False,))], ids=["refused", "silent"])
def test_an_unreachable_name_is_one_sentence_within_seconds(tmp_path, answer, streaming):
    import socket

    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        if answer == "silent":
            hole.listen(20)  # accepts and never answers
        environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hole.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        environment = {k: v for k, v in environment.items() if "proxy" not in k.lower()}
        command = [sys.executable, "-c", UNREACHABLE, *map(str, streaming)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=environment, cwd=Path(__file__).parents[2]
        )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == len(streaming)
    for line in lines:
        seconds, sentence = line.split(" ", 1)
        assert "'nosuch/thing' cannot be reached" in sentence
        assert float(seconds) < 12


def test_an_unreachable_name_is_served_from_its_copy(tmp_path, monkeypatch):
    import datasets

    path = parquet(tmp_path / "t.parquet", [png(i) for i in range(5)])
    made = Path(datasets.load_dataset("parquet", data_files=str(path), split="train").cache_files[0]["filename"]).parent
    copy = tmp_path / "cache" / "some___thing" / "default" / "0.0.0" / "0123"
    shutil.copytree(made, copy)
    (copy / "parquet-train.arrow").rename(copy / "thing-train.arrow")
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps({**info, "dataset_name": "thing", "config_name": "default"}))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("distill.data.hub.why_unreachable", lambda *_: "no network")
    assert sorted(numbers(DatasetsConfig(name="some/thing").build())) == [0, 1, 2, 3, 4]
    assert datasets.config.HF_HUB_OFFLINE is False
    for config in (DatasetsConfig(name="some/other"), DatasetsConfig(name="some/thing", revision="v2")):
        with pytest.raises(
            EnvironmentFailed, match=r"cannot be reached \(no network\), no copy of (it|its revision v2) is known"
        ):
            config.build()


def test_name_resolution_that_hangs_is_not_waited_for(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: time.sleep(20))
    start = time.monotonic()
    assert why_unreachable("nosuch/thing", None, seconds=0.2) == "no answer"
    assert time.monotonic() - start < 5


# ---- streams ----


def stream(tmp_path: Path, files: int = 3, each: int = 10, bad: tuple[int, ...] = (), **settings) -> StreamingSource:
    paths = []
    for f in range(files):
        images = [BROKEN if f * each + i in bad else png(f * each + i) for i in range(each)]
        paths.append(str(parquet(tmp_path / f"s{f}.parquet", images)))
    return DatasetsConfig(name="parquet", data_files=paths, streaming=True, **settings).build()


def take(iterator, n: int) -> list[int]:
    return [number(next(iterator)) for _ in range(n)]


def test_stream_is_endless_seeded_and_shuffled_anew(tmp_path):
    source = stream(tmp_path, buffer=8)
    sequence = take(source.iterate(0), 90)
    for epoch in range(3):
        assert sorted(sequence[30 * epoch : 30 * epoch + 30]) == list(range(30))
    assert sequence[:30] != list(range(30))
    assert sequence[:30] != sequence[30:60]
    assert take(source.iterate(0), 90) == sequence
    assert take(source.iterate(1), 30) != sequence[:30]
    unbuffered = take(stream(tmp_path, buffer=1).iterate(0), 300)
    starts = {unbuffered[i] for i in range(0, 300, 30)}
    assert len(starts) > 1
    assert starts <= {0, 10, 20}  # whole files in random order
    assert not hasattr(source, "__len__")
    assert source.labels() is None


@pytest.mark.parametrize("bad", [(), (4, 5, 29)])
def test_stream_resumes_exactly(tmp_path, bad):
    sequence = take(stream(tmp_path, bad=bad, buffer=8).iterate(3), 100)
    for skip in (1, 7, 29, 30, 31, 60, 75):
        fresh = stream(tmp_path, bad=bad, buffer=8)
        assert take(fresh.iterate(3, itertools.count(skip)), 100 - skip) == sequence[skip:]
        assert (
            take(fresh.iterate(3, itertools.count(skip)), 100 - skip) == sequence[skip:]
        )  # now that it knows an epoch's length


def test_known_epochs_are_skipped_unread(tmp_path, monkeypatch):
    source = stream(tmp_path)
    later = take(source.iterate(0), 305)[-5:]
    read = []
    shuffled = StreamingSource._shuffled
    monkeypatch.setattr(StreamingSource, "_shuffled", lambda self, g: read.append(1) or shuffled(self, g))
    assert take(source.iterate(0, itertools.count(300)), 5) == later
    assert len(read) == 1


def test_stream_splits_among_workers(tmp_path):
    source = stream(tmp_path, bad=(4, 5, 29), buffer=8)
    sequence = take(source.iterate(3), 60)
    for workers in (2, 3):
        parts = [source.iterate(3, itertools.count(w, workers)) for w in range(workers)]
        assert [number(next(parts[i % workers])) for i in range(60)] == sequence


class Streamed(torch.utils.data.IterableDataset):
    def __init__(self, source):
        self.source = source

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        for image in self.source.iterate(3, itertools.count(info.id, info.num_workers)):
            yield number(image)


def test_stream_in_loader_workers(tmp_path):
    source = stream(tmp_path, bad=(4,), buffer=8)
    sequence = take(pickle.loads(pickle.dumps(source)).iterate(3), 40)
    assert source.skipped_count == 0
    loader = torch.utils.data.DataLoader(Streamed(source), batch_size=None, num_workers=2, multiprocessing_context="fork")
    workers = iter(loader)
    assert [int(next(workers)) for _ in range(40)] == sequence
    assert source.skipped_count > 0  # met by the workers alone, known here


def test_a_broken_file_in_a_stream_is_a_sentence(tmp_path):
    source = stream(tmp_path, buffer=1)
    whole = (tmp_path / "s1.parquet").read_bytes()
    (tmp_path / "s1.parquet").write_bytes(whole[:4] + bytes(len(whole) - 4))
    with pytest.raises(UserError, match=r"parquet/train cannot be read by `datasets`: .*\."):
        take(source.iterate(0), 30)


def test_stream_counts_bad_items(tmp_path):
    source = stream(tmp_path, bad=(4, 5), buffer=4)
    images = list(itertools.islice(source.iterate(0), 30))
    assert {number(image) for image in images} == set(range(30)) - {4, 5}
    assert len({id(image) for image in images}) == 30  # a stand-in is its own copy
    assert source.skipped_count == 2
    assert source.skipped_summary() == skipped_summary(source)
    assert source.skipped_summary().startswith("2 images of parquet/train were skipped (position")


def test_hopeless_streams_are_sentences(tmp_path):
    import datasets

    with pytest.raises(UserError, match="cannot be read"):
        take(stream(tmp_path / "a", files=1, each=5, bad=tuple(range(5))).iterate(0), 1)
    with pytest.raises(UserError, match="of the first"):
        take(stream(tmp_path / "b", files=1, each=90, bad=tuple(range(80)), buffer=1).iterate(0), 60)
    empty = datasets.IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(UserError, match="empty stream"):
        take(StreamingSource("c", empty, "image", 9, None, "").iterate(0), 1)


class Rotting:
    """A stream of one shard that is good in its first epoch alone."""

    num_shards = 1
    epochs = 0

    def shard(self, num_shards, index):
        return self

    def iter(self, batch_size):
        self.epochs += 1
        for i in range(120):
            yield {"image": [png(i) if self.epochs == 1 else BROKEN]}


def test_a_stream_that_turns_bad_ends(tmp_path):
    endless = StreamingSource("r", Rotting(), "image", 8, None, "").iterate(0)
    assert len(take(endless, 120)) == 120
    with pytest.raises(UserError, match="r: 120 of the first 240 images tried cannot be read"):
        next(endless)


def test_stream_of_local_folders_limits_and_fingerprints(tmp_path):
    path = str(saved(tmp_path / "kept"))
    source = DatasetsConfig(name=path, streaming=True, limit=6).build()
    assert sorted(take(source.iterate(0), 6)) == [0, 1, 2, 3, 4, 5]
    assert sorted(take(source.iterate(0, itertools.count(6)), 6)) == [0, 1, 2, 3, 4, 5]
    several = take(stream(tmp_path / "w", each=4, limit=6).iterate(0), 60)
    assert set(several) == {0, 1, 2, 3, 4, 5}
    images = DatasetsConfig(name=str(folder(tmp_path / "set", each=3)), streaming=True).build()
    assert sorted(take(images.iterate(0), 9)) == [0, 1, 2, 100, 101, 102, 200, 201, 202]
    first = stream(tmp_path / "x")
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    assert stream(tmp_path / "y").fingerprint() == first.fingerprint()
    assert stream(tmp_path / "z", bad=(3,)).fingerprint() != first.fingerprint()


# ---- naming ----


def test_shorthand(tmp_path, monkeypatch):
    labelled = folder(tmp_path / "labelled")
    assert source_from(str(labelled)) == FolderConfig(path=str(labelled), labels=True)
    single = folder(tmp_path / "single", ("a",))
    assert source_from(str(single)) == FolderConfig(path=str(single))
    (labelled / "loose.png").write_bytes(png(0))
    assert source_from(str(labelled)) == FolderConfig(path=str(labelled))
    file = parquet(tmp_path / "p" / "t.parquet", [png(0)])
    assert source_from(str(file)) == ParquetConfig(path=str(file))
    assert source_from(str(file.parent)) == ParquetConfig(path=str(file.parent))
    assert source_from(f"{file.parent}/*.parquet") == ParquetConfig(path=f"{file.parent}/*.parquet")
    kept = saved(tmp_path / "kept")
    assert source_from(str(kept)) == DatasetsConfig(name=str(kept))
    assert source_from("scenes") == ScenesConfig()
    assert source_from("cifar10") == DatasetsConfig(name="cifar10")
    assert source_from("owner/name") == DatasetsConfig(name="owner/name")
    config = FolderConfig(path="x")
    assert source_from(config) is config
    monkeypatch.chdir(tmp_path)
    assert source_from("single") == FolderConfig(path="single")


def test_shorthand_errors(tmp_path, monkeypatch):
    folder(tmp_path / "photos" / "all")
    monkeypatch.chdir(tmp_path)
    for value in (f"{tmp_path}/photoss", "./photoss", "photos/al", "photos/all/dgo"):
        with pytest.raises(UserError, match=r"There is no .* Did you mean"):
            source_from(value)
    parquet(tmp_path / "train.parquet", [png(0)])
    with pytest.raises(UserError, match=r"Did you mean .*/train.parquet\?"):
        source_from("trian.parquet")
    with pytest.raises(UserError, match=r"There is no .*/deeply. Name something that is in"):
        source_from("./deeply/nested/zzz")
    with pytest.raises(UserError, match="There is no"):
        source_from("/" + "x" * 300)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="neither"):
        source_from("notes.txt")
    folder(tmp_path / "imagenet" / "train")
    folder(tmp_path / "imagenet" / "val")
    with pytest.raises(UserError, match="splits train and val"):
        source_from("imagenet")


def test_configs_are_strict_and_tell_their_problems():
    adapter = TypeAdapter(SourceConfig)
    assert adapter.validate_python({"kind": "folder", "path": "x", "limit": 3}) == FolderConfig(path="x", limit=3)
    assert adapter.validate_python({"kind": "scenes", "count": 5}).count == 5
    assert {type(adapter.validate_python({"kind": k, **v})) for k, v in EXAMPLES.items()} == set(KINDS.values())
    for wrong in (
        {"kind": "folder", "path": "x", "lable": True},
        {"kind": "folder", "path": 3},
        {"kind": "nosuch"},
        {"path": "x"},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)
    assert FolderConfig(path="x", limit=0).problems() == ["limit must be at least 1, got 0"]
    assert FolderConfig(path=" ").problems() == ["path is empty"]
    assert ParquetConfig(path=[]).problems() == ["path lists no file"]
    assert ParquetConfig(path="x", image="a", label="a").problems() == ["image and label are both 'a'"]
    assert DatasetsConfig(name="x", buffer=9).problems() == ["buffer is used with streaming: true alone"]
    many = DatasetsConfig(name="", split="", streaming=True, label="l", buffer=0, limit=-1)
    assert len(many.problems()) == 5
    assert all(not c.problems() for c in [FolderConfig(path="x"), ParquetConfig(path="x"), DatasetsConfig(name="x")])


EXAMPLES: dict[str, dict] = {"folder": {"path": "x"}, "parquet": {"path": "x"}, "datasets": {"name": "x"}, "scenes": {}}


# ---- real files ----


@pytest.mark.realdata
def test_cifar10(real_data):
    source = ParquetConfig(path=str(real_data / "cifar10" / "val.parquet")).build()
    assert len(source) == 10_000
    assert source.classes[:2] == ["airplane", "automobile"]
    assert np.bincount(source.labels()).tolist() == [1000] * 10
    assert source.image(0).size == (32, 32)
    start = time.perf_counter()
    for i in range(2000):
        source.image(i)
    assert 2000 / (time.perf_counter() - start) > 1000  # images/s; about 9,000 on an idle core
    with pytest.raises(UserError, match="splits train and val"):
        source_from(str(real_data / "cifar10")).build()


@pytest.mark.realdata
def test_tiny_imagenet_holds_greyscale_images(real_data):
    source = ParquetConfig(path=str(real_data / "tiny_imagenet_100" / "val.parquet")).build()
    assert len(source.classes) == 100
    assert source.checked() is source
    modes = [Image.open(io.BytesIO(source.encoded[r])).mode for r in range(len(source))]
    grey = [int(np.flatnonzero(source.order == r)[0]) for r, mode in enumerate(modes) if mode == "L"]
    assert 20 < len(grey) < 300
    for i in grey:
        pixels = np.asarray(source.image(i))
        assert pixels.shape == (64, 64, 3)
        assert (pixels[..., 0] == pixels[..., 2]).all()


@pytest.mark.realdata
def test_real_files_with_masks_names_and_groups(real_data):
    camvid = source_from(str(real_data / "camvid" / "val.parquet")).build()
    assert len(camvid) == 101
    assert camvid.labels() is None
    assert camvid.image(0).size == (480, 360)
    thousand = ParquetConfig(path=str(real_data / "imagenet_1k_samples" / "val.parquet")).build()
    assert len(thousand.classes) == 1000
    assert sorted(thousand.labels().tolist()) == list(range(1000))
    groups = ParquetConfig(path=str(real_data / "near_dup_derived" / "val.parquet"), limit=50).build()
    assert len(groups) == 50
    assert len(groups.classes) == 150
