"""Maps beside images: numbers as they were stored, and a sentence for whatever does not fit."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import TypeAdapter

from distill.data.encoded import ImageSource
from distill.data.images import BadImage
from distill.data.maps import (
    MAP_KINDS,
    FolderMapsConfig,
    MapsConfig,
    ParquetMapsConfig,
    SceneMapsConfig,
    decode_map,
)
from distill.data.scenes import ScenesConfig
from distill.data.sources import checked, skipped_summary
from distill.errors import UserError

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 4, (6, 5, 8)).astype(np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The library's copies go to a folder of this session."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")


def encoded(image: Image.Image, kind: str = "PNG", **more) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **more)
    return out.getvalue()


def png(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values))


def npy(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def picture(i: int, w: int = 8, h: int = 5) -> bytes:
    return encoded(Image.new("RGB", (w, h), (i, 0, 7)))


def parquet(path, maps: list[bytes | None], column: str = "mask", note: dict | None = None, images=None, **more):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = images or [picture(i) for i in range(len(maps))]
    cells = {n: pa.array([{"bytes": b, "path": None} for b in v], kind) for n, v in {"image": images, column: maps}.items()}
    table = pa.table({**cells, **more})
    pq.write_table(table.replace_schema_metadata({"note": json.dumps(note)} if note else None), path)
    return path


def folder(root, maps: dict[str, bytes], images: dict[str, bytes] | None = None):
    images = images or {name.rsplit(".", 1)[0] + ".png": picture(i) for i, name in enumerate(maps)}
    for part, files in (("images", images), ("masks", maps)):
        for name, data in files.items():
            (root / part / name).parent.mkdir(parents=True, exist_ok=True)
            (root / part / name).write_bytes(data)
    return root


def number(source, i: int) -> int:
    return source.image(i).getpixel((0, 0))[0]


def assert_maps(source, expected) -> None:
    assert len(source) == len(expected)
    for i in range(len(source)):
        assert np.array_equal(source.map(i), expected[number(source, i)])


# ---- one map ----


def test_numbers_come_as_they_were_stored():
    deep = RNG.integers(0, 60000, (5, 8)).astype(np.uint16)
    palette = Image.fromarray(IDS[0], "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    assert np.array_equal(decode_map(png(IDS[0])), IDS[0])
    assert np.array_equal(decode_map(encoded(palette)), IDS[0])
    assert np.array_equal(decode_map(encoded(palette, transparency=0)), IDS[0])
    assert np.array_equal(decode_map(png(deep)), deep)
    assert np.array_equal(decode_map(encoded(Image.fromarray(deep), "TIFF")), deep)
    assert np.array_equal(decode_map(png(IDS[0] > 1)), IDS[0] > 1)
    halves = deep.astype(np.float32) / 2
    assert np.array_equal(decode_map(npy(halves)), halves)
    assert np.array_equal(decode_map(npy(deep.astype(np.int64) - 5)), deep.astype(np.int64) - 5)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no known format"),
        (b"\x93NUMPY broken", "cannot be read"),
        (png(IDS[0])[:50], "cannot be read"),
        (encoded(Image.fromarray(IDS[0]), "JPEG"), "JPEG map"),
        (picture(1), "colours"),
        (encoded(Image.fromarray(IDS[0]).convert("LA")), "colours"),
        (npy(np.zeros((4, 4, 3))), "one number a pixel"),
        (npy(np.array([["a"]])), "one number a pixel"),
        (npy(np.array([{}], dtype=object)), "cannot be read"),
    ],
    ids=["empty", "npy", "cut", "jpeg", "rgb", "alpha", "channels", "text", "pickle"],
)
def test_what_is_no_map_says_why(data, reason, tmp_path):
    with pytest.raises(BadImage, match=reason):
        decode_map(data)
    (tmp_path / "map").write_bytes(data)
    with pytest.raises(BadImage, match=reason):
        decode_map(tmp_path / "map")
    with pytest.raises(BadImage, match="missing map"):
        decode_map(tmp_path / "none")


# ---- sources ----


def test_parquet_gives_images_with_their_own_maps(tmp_path):
    path = parquet(tmp_path / "a.parquet", [png(m) for m in IDS], note={"classes": ["a", "b", "c", "d"]})
    source = ParquetMapsConfig(path=str(path)).build()
    assert_maps(source, IDS)
    assert source.map(0).dtype == np.int64
    assert source.class_names == ["a", "b", "c", "d"]
    assert source.labels() is None
    assert source.classes is None
    assert checked(source) is source
    few = ParquetMapsConfig(path=str(path), limit=2, ignore=[0, 3], classes=["w", "x", "y", "z"]).build()
    assert len(few) == 2
    assert few.class_names == ["w", "x", "y", "z"]
    for i in range(2):
        own = IDS[number(few, i)].astype(int)
        assert number(few, i) == number(source, i)
        assert np.array_equal(few.map(i), np.where((own == 0) | (own == 3), -1, own))


def test_depth_is_in_metres(tmp_path):
    stored = RNG.integers(1, 9000, (2, 5, 8)).astype(np.uint16)
    stored[:, 0, 0], stored[:, 0, 1] = 0, 65535
    path = parquet(tmp_path / "a.parquet", [png(m) for m in stored], "depth", note={"classes": ["a"]})
    source = ParquetMapsConfig(path=str(path), map="depth", scale=0.001, ignore=65535).build()
    for i in range(2):
        own = stored[number(source, i)].astype(np.float64) / 1000
        own[0, :2] = 0
        assert source.map(i).dtype == np.float32
        assert np.allclose(source.map(i), own, rtol=1e-6)
    assert source.class_names is None
    metres = np.array([[1.5, np.nan], [np.inf, -2]], np.float32)
    root = folder(tmp_path / "set", {"a.npy": npy(metres)}, {"a.png": picture(0, 2, 2)})
    assert FolderMapsConfig(path=str(root), scale=2.0).build().map(0).tolist() == [[3, 0], [0, 0]]


def test_names_of_whole_images_labels_are_not_those_of_pixels(tmp_path):
    maps = [png(m) for m in IDS]
    path = parquet(tmp_path / "a.parquet", maps, note={"classes": ["cat", "dog"]}, label=[0, 1, 0, 1, 0, 1])
    assert ParquetMapsConfig(path=str(path)).build().class_names is None


def test_folders_pair_by_name(tmp_path):
    names = [f"{'sub/' if i % 2 else ''}{i}.{'npy' if i == 3 else 'png'}" for i in range(6)]
    root = folder(tmp_path / "set", {n: (npy if n.endswith("npy") else png)(IDS[i]) for i, n in enumerate(names)})
    assert_maps(FolderMapsConfig(path=str(root)).build(), IDS)
    (root / "masks").rename(root / "labels")
    source = FolderMapsConfig(path=str(root), maps="labels", ignore=1).build()
    assert_maps(checked(source), np.where(IDS == 1, -1, IDS.astype(int)))
    assert source.name == "set"


def test_scenes_have_maps_without_files():
    masks, depths = SceneMapsConfig(count=3).build(), SceneMapsConfig(count=3, map="depth").build()
    plain = ScenesConfig(count=3).build()
    for i in range(3):
        assert np.array_equal(np.asarray(masks.image(i)), np.asarray(plain.image(i)))
        assert np.array_equal(masks.map(i), plain.scene(i).mask)
        assert np.array_equal(depths.map(i), plain.scene(i).depth)
        assert np.array_equal(np.unique(depths.map(i)[masks.map(i) > 0]), depths.map(i)[masks.map(i) > 0][:1])
    assert masks.labels() is None
    assert masks.class_names == ["wall", "disc", "square", "triangle"]
    assert depths.class_names is None
    assert len({masks.fingerprint(), depths.fingerprint(), plain.fingerprint()}) == 3


def test_the_fingerprint_is_of_images_maps_and_how_they_are_read(tmp_path):
    root = folder(tmp_path / "set", {f"{i}.png": png(IDS[i]) for i in range(6)})
    of = FolderMapsConfig(path=str(root)).build().fingerprint()
    shutil.copytree(root, tmp_path / "other")
    other = tmp_path / "other"
    assert FolderMapsConfig(path=str(other)).build().fingerprint() == of
    said = [
        FolderMapsConfig(path=str(other), **more).build().fingerprint()
        for more in ({"ignore": 1}, {"scale": 1.0}, {"limit": 3})
    ]
    (other / "masks" / "3.png").write_bytes(png(IDS[2]))
    said.append(FolderMapsConfig(path=str(other)).build().fingerprint())
    assert len({of, *said}) == 5


def test_what_cannot_be_read_is_left_out(tmp_path):
    maps = [png(m) for m in IDS]
    maps[1], maps[4] = maps[1][:50], None
    images = [picture(i) for i in range(6)]
    images[2] = images[2][:30]
    source = ParquetMapsConfig(path=str(parquet(tmp_path / "a.parquet", maps, images=images))).build()
    good = checked(source)
    assert isinstance(good, ImageSource)
    assert sorted(number(good, i) for i in range(len(good))) == [0, 3, 5]
    for i in range(3):
        assert np.array_equal(good.map(i), IDS[number(good, i)])
    assert skipped_summary(good).startswith("3 of 6 images")
    assert good.fingerprint() != source.fingerprint()
    row = source.order.tolist().index
    with pytest.raises(UserError, match=r"row 1: map cannot be read"):
        source.map(row(1))
    with pytest.raises(UserError, match=r"row 2: .* Repair the image"):
        source.image(row(2))  # no stand-in: its map would be another's


# ---- mistakes ----


def test_mistakes_in_parquet_are_sentences(tmp_path):
    path = str(parquet(tmp_path / "a.parquet", [png(m) for m in IDS], index=list(range(6))))
    for more, said in (
        ({"map": "maks"}, r"no column 'maks' \(it has image, mask, index\). Did you mean 'mask'\?"),
        ({"map": "index"}, "'index'"),
        ({"map": "image"}, "'image' of .* holds the images. Set `map`"),
    ):
        with pytest.raises(UserError, match=said):
            ParquetMapsConfig(path=path, **more).build()
    with pytest.raises(UserError, match="There is no"):
        ParquetMapsConfig(path=str(tmp_path / "b.parquet")).build()


def test_ids_that_are_no_classes_are_sentences(tmp_path):
    path = str(parquet(tmp_path / "a.parquet", [png(m) for m in IDS], note={"classes": ["a", "b", "c"]}))
    with pytest.raises(UserError, match=r"holds 3, which is not one of 3 classes. Add it to `ignore`, or name all"):
        checked(ParquetMapsConfig(path=path).build())
    assert len(checked(ParquetMapsConfig(path=path, ignore=3).build())) == 6
    deep = np.full((5, 8), 4000, np.uint16)
    with pytest.raises(UserError, match=r"holds 4000.*set `scale` if this is a depth map"):
        checked(FolderMapsConfig(path=str(folder(tmp_path / "deep", {"a.png": png(deep)}))).build())
    root = folder(tmp_path / "fractions", {"a.npy": npy(np.full((5, 8), 0.5))})
    with pytest.raises(UserError, match="fractions, not class ids"):
        checked(FolderMapsConfig(path=str(root)).build())
    root = folder(tmp_path / "negative", {"a.npy": npy(np.full((5, 8), -7))})
    with pytest.raises(UserError, match="holds -7"):
        checked(FolderMapsConfig(path=str(root)).build())


def test_a_map_of_another_size_is_a_sentence(tmp_path):
    root = folder(tmp_path / "set", {"a.png": png(IDS[0].T)})
    with pytest.raises(UserError, match=r"the map of a.png is 5 x 8 pixels, its image 8 x 5"):
        checked(FolderMapsConfig(path=str(root)).build())


def test_mistakes_in_folders_are_sentences(tmp_path):
    root = folder(tmp_path / "set", {"a.png": png(IDS[0]), "c.png": png(IDS[0])})
    (root / "images" / "b.png").write_bytes(picture(0))
    with pytest.raises(UserError, match=r"1 of 3 images .* have no map of the same name .*such as b.png"):
        FolderMapsConfig(path=str(root)).build()
    with pytest.raises(UserError, match=r"There is no .*mask. Did you mean .*masks"):
        FolderMapsConfig(path=str(root), maps="mask").build()
    (root / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        FolderMapsConfig(path=str(root), images="empty").build()


def test_two_files_of_one_name_are_a_sentence(tmp_path):
    root = folder(tmp_path / "maps", {"sub/a.png": png(IDS[0]), "b.png": png(IDS[1])})
    (root / "masks" / "c.npy").write_bytes(npy(IDS[2]))  # of no image
    (root / "masks" / "c.png").write_bytes(png(IDS[3]))
    assert len(FolderMapsConfig(path=str(root)).build()) == 2
    (root / "masks" / "sub" / "a.npy").write_bytes(npy(IDS[2]))
    with pytest.raises(UserError, match=r"sub/a.npy and sub/a.png in .*masks are maps of one name"):
        FolderMapsConfig(path=str(root)).build()
    root = folder(tmp_path / "images", {"a.png": png(IDS[0])}, {"a.png": picture(0), "a.jpg": picture(1)})
    with pytest.raises(UserError, match=r"a.jpg and a.png in .*images are images of one name"):
        FolderMapsConfig(path=str(root)).build()


def test_settings_are_checked():
    read = TypeAdapter(MapsConfig).validate_python
    assert {type(read({"kind": k, **({} if k == "scenes" else {"path": "x"})})) for k in MAP_KINDS} == set(MAP_KINDS.values())
    found = read({"kind": "folder", "path": " ", "limit": 0, "scale": 0.0, "classes": ["a"]}).problems()
    assert len(found) == 4
    assert read({"kind": "parquet", "path": [], "image": "m", "map": "m"}).problems() == [
        "path is empty",
        "image and map are both 'm'",
    ]


@pytest.mark.realdata
def test_camvid_and_nyu_are_read(real_data):
    camvid = ParquetMapsConfig(path=str(real_data / "camvid/val.parquet"), ignore=11, limit=4).build()
    assert camvid.class_names is not None
    assert camvid.class_names[3] == "Road"
    seen = np.unique(np.stack([camvid.map(i) for i in range(4)]))
    assert seen.min() == -1
    assert seen.max() <= 10
    assert 3 in seen
    assert checked(camvid) is camvid
    nyu = ParquetMapsConfig(path=str(real_data / "nyu_depth_v2/val.parquet"), map="depth", scale=0.001, limit=4).build()
    depth = np.stack([nyu.map(i) for i in range(4)])
    assert depth.shape == (4, 240, 320)
    assert depth.min() > 0.5
    assert depth.max() < 10.1
