"""The store of features: nothing computed twice, nothing trusted that is not whole, and a kill costs one chunk."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from distill.data.preprocess import Preprocess
from distill.encoder import Features, TorchEncoder
from distill.errors import EnvironmentFailed
from distill.evaluate import store as module
from distill.evaluate.features import Images, TooLarge
from distill.evaluate.reader import ImageSets, Subject, SubjectReader
from distill.evaluate.store import FeatureStore, Wish, identity
from distill.evaluate.task import Unfit
from distill.files import read_json, write_json
from distill.models.backbone import Backbone, BackboneConfig
from distill.progress import Progress

QUIET = Progress("quiet")
P = Preprocess(size=32, resize=36, normalize="none")
N, BATCH = 23, 4


class Numbered:
    """Image i is flat of colour i, with a first column of white that the centre crop of a wide image loses."""

    classes = None

    def __init__(self, n: int = N, name: str = "numbered"):
        self.n, self.name = n, name

    def __len__(self):
        return self.n

    def labels(self):
        return None

    def fingerprint(self):
        return f"{self.name}-{self.n}"

    def image(self, i):
        image = Image.new("RGB", (72, 36), (i, 2 * i, 3 * i))
        image.paste((255, 255, 255), (0, 0, 8, 36))
        return image


class Layered:
    """Layer l of 3 sees l times the image; notes which images it is asked for, and stops before the one that it is told."""

    target = "torch-fp32"
    depth = 3

    def __init__(self, stop_at: int | None = None):
        self.conditions = {"runtime": "layered", "threads": 1}
        self.asked: list[int] = []
        self.stop_at = stop_at

    def layers(self, x: torch.Tensor, n: int) -> list[Features]:
        numbers = (x[:, 0, 16, 16] * 255).round().int().tolist()
        if self.stop_at in numbers:
            raise KeyboardInterrupt
        self.asked += numbers
        patches = x.unfold(2, 16, 16).unfold(3, 16, 16).mean((4, 5)).flatten(2).transpose(1, 2)  # [B, 4, 3]
        return [Features(layer * x.mean((2, 3)), layer * patches) for layer in range(4 - n, 4)]

    def __call__(self, x: torch.Tensor) -> Features:
        return self.layers(x, 1)[0]


class Exported:
    """A file: shows its last layer alone."""

    target = "onnx-int8"
    conditions = {"runtime": "ort"}  # noqa: RUF012

    def __call__(self, x: torch.Tensor) -> Features:
        return Features(x.mean((2, 3)), x.mean((2, 3))[:, None])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2 * BATCH)


def reader(folder, encoder, weights: str | None = "w") -> SubjectReader:
    subject = Subject("teacher", encoder.target, lambda: encoder, P, weights)
    return SubjectReader(subject, FeatureStore(folder), ImageSets(), BATCH, QUIET)


def test_values_and_shapes(tmp_path):
    encoder = Layered()
    found = reader(tmp_path, encoder).read(Numbered(), patches=True, layers=2)
    assert (found.cls.shape, found.mean_patch.shape, found.patches.shape) == ((2, N, 3), (2, N, 3), (2, N, 4, 3))
    assert (found.cls.dtype, found.mean_patch.dtype, found.patches.dtype) == (np.float32, np.float32, np.float16)
    inner = np.arange(N)[:, None] * np.array([1, 2, 3]) / 255
    for layer, factor in enumerate((2, 3)):
        np.testing.assert_allclose(found.cls[layer], factor * inner, rtol=1e-5)
        np.testing.assert_allclose(found.patches[layer].mean(1, dtype=np.float64), factor * inner, rtol=1e-3)
        np.testing.assert_allclose(found.mean_patch[layer], factor * inner, rtol=1e-5)
    assert encoder.asked == list(range(N))
    assert not found.cls.flags.writeable
    assert found.grid() == 2


@pytest.mark.parametrize("stop_at", [1, 13, 15, 22])
def test_a_killed_extraction_goes_on_from_the_last_finished_chunk(tmp_path, stop_at):
    first, second = Layered(stop_at), Layered()
    with pytest.raises(KeyboardInterrupt):
        reader(tmp_path / "a", first).read(Numbered(), patches=True)
    assert first.asked == list(range(stop_at // BATCH * BATCH))
    found = reader(tmp_path / "a", second).read(Numbered(), patches=True)
    assert second.asked == list(range(stop_at // (2 * BATCH) * 2 * BATCH, N))
    whole = reader(tmp_path / "b", Layered()).read(Numbered(), patches=True)
    for name in ("cls", "mean_patch", "patches"):
        assert np.array_equal(getattr(found, name), getattr(whole, name))


def test_what_another_version_began_is_not_continued(tmp_path):
    first, second = Layered(15), Layered()
    with pytest.raises(KeyboardInterrupt):
        reader(tmp_path, first).read(Numbered())
    second.conditions = second.conditions | {"runtime": "layered 2"}
    asking = reader(tmp_path, second)
    asking.read(Numbered())
    assert second.asked == list(range(N))
    assert asking.conditions["runtime"] == "layered 2"


def test_what_is_stored_is_read_without_opening_the_encoder(tmp_path):
    first = reader(tmp_path, Layered())
    one = first.read(Numbered(), layers=2)
    subject = replace(first.subject, open=lambda: pytest.fail("opened"))
    again = SubjectReader(subject, FeatureStore(tmp_path), ImageSets(), BATCH, QUIET)
    assert np.array_equal(again.read(Numbered(), layers=2).cls, one.cls)
    assert np.array_equal(again.read(Numbered()).cls, one.cls[-1:])  # less than is there
    assert again.depth == 3
    assert again.conditions == {"runtime": "layered", "threads": 1}


def test_a_larger_wish_computes_anew_and_is_kept(tmp_path):
    encoder = Layered()
    mine = reader(tmp_path, encoder)
    plain = mine.read(Numbered())
    for wish, asked in (
        ({}, N),
        ({"layers": 3}, 2 * N),
        ({"patches": True}, 3 * N),
        ({"layers": 2}, 3 * N),
        ({"layers": 2, "patches": True}, 4 * N),
        ({"layers": 3}, 4 * N),
        ({"patches": True}, 4 * N),
    ):
        found = mine.read(Numbered(), **wish)
        assert len(encoder.asked) == asked, wish
        assert len(found.cls) == wish.get("layers", 1)
        assert (found.patches is None) == ("patches" not in wish)
    assert np.array_equal(found.cls, plain.cls)  # the old map is still whole


def test_other_identities_are_other_features(tmp_path):
    encoder = Layered()
    mine = reader(tmp_path, encoder)
    mine.read(Numbered())
    squashed = mine.read(Numbered(), fit="squash")
    assert len(encoder.asked) == 2 * N
    assert squashed.cls[0, 0, 0] > 0.1  # the white border is in the picture
    mine.read(Numbered(name="other"))
    reader(tmp_path, encoder, "other weights").read(Numbered())
    assert len(encoder.asked) == 4 * N
    images = Images(Numbered(), P)
    plain = identity("w", "a", images, 4)
    assert all(other != plain for other in (identity("w", "b", images, 4), identity("w", "a", images, 8)))


def the_folder(folder):
    (home,) = (p.parent for p in folder.glob("*/identity.json"))
    return home


def truncate(home):
    path = home / "cls.npy"
    path.write_bytes(path.read_bytes()[:-40])


def foreign(home):
    about = read_json(home / "identity.json")
    about["identity"]["weights"] = "another"
    write_json(home / "identity.json", about)


def other_shape(home):
    np.save(home / "cls.npy", np.zeros((1, N, 5), np.float32))


@pytest.mark.parametrize(
    "harm",
    [
        truncate,
        foreign,
        other_shape,
        lambda home: (home / "identity.json").write_text("{"),
        lambda home: (home / "progress.json").unlink(),
        lambda home: (home / "mean_patch.npy").unlink(),
        lambda home: (home / "cls.npy").write_bytes(b"junk"),
    ],
)
def test_damaged_or_foreign_files_are_made_again(tmp_path, harm):
    right = np.array(reader(tmp_path, Layered()).read(Numbered()).cls)
    harm(the_folder(tmp_path))
    encoder = Layered()
    assert np.array_equal(reader(tmp_path, encoder).read(Numbered()).cls, right)
    assert len(encoder.asked) == N


def test_too_many_layers_and_no_images_are_sentences(tmp_path):
    with pytest.raises(Unfit, match="4 layers are asked for, and torch-fp32 shows 3 layers only"):
        reader(tmp_path, Layered()).read(Numbered(), layers=4)
    file = reader(tmp_path, Exported(), "file")
    assert file.depth == 1
    with pytest.raises(Unfit, match="its last layer only"):
        file.read(Numbered(), layers=2)
    with pytest.raises(Unfit, match="holds no image"):
        file.read(Numbered(0))


def test_room_is_looked_for_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(EnvironmentFailed, match=r"take 0\.0 GiB on disk, and 0\.0 GiB are free"):
        reader(tmp_path, Layered()).read(Numbered())
    monkeypatch.undo()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    with pytest.raises(TooLarge, match="free memory"):
        reader(tmp_path, Layered()).read(Numbered())


def test_without_weights_nothing_is_left(tmp_path):
    encoder = Layered()
    with reader(tmp_path, encoder, None) as mine:
        mine.read(Numbered())
        mine.read(Numbered())
        assert len(encoder.asked) == N
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
    (tmp_path / "temporary-left").mkdir()  # of a process that was killed
    FeatureStore(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_last_layer_of_several_is_the_plain_output(tmp_path):
    """So that a wish for one layer may be served from several without changing a result."""
    torch.manual_seed(0)
    config = BackboneConfig(dim=32, depth=3, heads=2, patch=8, image_size=32, layer_scale=1.0, init="fan_in")
    encoder = TorchEncoder(Backbone(config))
    images = Images(Numbered(), P)
    plain, deep = (
        FeatureStore(tmp_path / str(n)).features({"batch": BATCH}, Wish(n), images, lambda: encoder, QUIET, "t") for n in (1, 3)
    )
    assert np.array_equal(plain.stored.cls[0], deep.stored.cls[-1])
    assert np.array_equal(plain.stored.mean_patch[0], deep.stored.mean_patch[-1])
