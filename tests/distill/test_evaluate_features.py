"""Images and features in memory: exactly the deployed preprocessing, read once."""

from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from distill.data.preprocess import Preprocess
from distill.encoder import Features, TorchEncoder
from distill.evaluate.features import Images, TooLarge, extract
from distill.models.backbone import Backbone, BackboneConfig
from distill.progress import Progress

QUIET = Progress("quiet")
P = Preprocess(size=32, resize=36, normalize="per_image")


class Plain:
    """The preprocessed pixels as they are, with their mean as the only patch."""

    target = "pixels"

    def __init__(self):
        self.conditions = {"runtime": "none"}

    def __call__(self, images: torch.Tensor) -> Features:
        return Features(images.flatten(1), images.mean((2, 3))[:, None])


class Noise:
    """A Source of random images of random sizes that counts how often each is read."""

    classes = ("a", "b", "c")

    def __init__(self, n: int, seed: int = 0):
        self.name, self.n, self.seed = "noise", n, seed
        self.reads = np.zeros(n, int)

    def __len__(self):
        return self.n

    def labels(self):
        return np.arange(self.n, dtype=np.int64) % 3

    def fingerprint(self):
        return f"noise-{self.n}-{self.seed}"

    def image(self, i):
        self.reads[i] += 1
        rng = np.random.default_rng((self.seed, i))
        return Image.fromarray(rng.integers(0, 256, (*rng.integers(20, 60, 2), 3), dtype=np.uint8))


@pytest.mark.parametrize("normalize", ["per_image", "imagenet", "none"])
@pytest.mark.parametrize("limit", [2**30, 0])
def test_batches_are_the_deployed_preprocessing_to_the_bit(normalize, limit):
    source, preprocess = Noise(23), replace(P, normalize=normalize)
    images = Images(source, preprocess, limit)
    expected = np.stack([preprocess(source.image(i)) for i in range(23)])
    for _ in range(2):
        assert np.array_equal(torch.cat(list(images.batches(5))).numpy(), expected)
    assert [len(b) for b in images.batches(5)] == [5, 5, 5, 5, 3]
    assert np.array_equal(torch.cat(list(images.batches(5, start=10))).numpy(), expected[10:])


def test_images_are_read_once_when_they_fit_and_again_when_not():
    for limit, reads in ((23 * 32 * 32 * 3, 1), (23 * 32 * 32 * 3 - 1, 2)):
        source = Noise(23)
        images = Images(source, P, limit)
        for _ in range(2):
            list(images.batches(4))
        assert (source.reads == reads).all()


def test_an_error_in_a_thread_reaches_the_caller_and_stops_the_rest():
    class Broken(Noise):
        def image(self, i):
            if i == 9:
                raise OSError("unreadable")
            return super().image(i)

    source = Broken(2000)
    with pytest.raises(OSError, match="unreadable"):
        list(Images(source, P).batches(4))
    assert source.reads.sum() < 200


def test_leaving_early_stops_the_threads():
    source = Noise(2000)
    for _ in Images(source, P).batches(4):
        break
    assert source.reads.sum() < 200


def test_extract():
    torch.manual_seed(0)
    config = BackboneConfig(dim=32, depth=2, heads=2, patch=8, image_size=32, layer_scale=1.0, init="fan_in")
    encoder = TorchEncoder(Backbone(config))
    source = Noise(11)
    found = extract(encoder, Images(source, P), 4, QUIET)
    one_by_one = [encoder(torch.from_numpy(P(source.image(i)))[None]) for i in range(11)]
    torch.testing.assert_close(found.cls, torch.cat([f.cls for f in one_by_one]))
    torch.testing.assert_close(found.mean_patch, torch.cat([f.patches.mean(1) for f in one_by_one]))
    assert found.labels.tolist() == source.labels().tolist()
    assert (found.name, found.fingerprint) == ("noise", "noise-11-0")
    assert found.cls.dtype == found.mean_patch.dtype == torch.float32


def test_raw_pixels_and_their_limit(monkeypatch):
    found = extract(Plain(), Images(Noise(6), P), 4, QUIET)
    assert found.cls.shape == (6, 3 * 32 * 32)
    assert found.mean_patch.shape == (6, 3)

    class Memory:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    with pytest.raises(TooLarge, match="lower resolution"):
        extract(Plain(), Images(Noise(6), P), 4, QUIET)


def test_at_gives_the_mean_patch_as_the_only_patch():
    found = extract(Plain(), Images(Noise(6), P), 4, QUIET)
    some = found.at(torch.tensor([4, 1]))
    assert isinstance(some, Features)
    assert torch.equal(some.cls, found.cls[[4, 1]])
    assert torch.equal(some.patches.mean(1), found.mean_patch[[4, 1]])
