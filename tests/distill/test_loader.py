"""Batches: a pure function of (source, settings, seed, step), whoever makes them, from wherever they start, in slices or whole."""

import io
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from distill.data import loader, streams
from distill.data.crops import CropsConfig
from distill.data.images import decode
from distill.data.loader import Batch, LoaderSettings, MasksConfig, batches, normalize_batch, sample_index
from distill.data.preprocess import KINDS, normalize
from distill.data.scenes import ScenesConfig
from distill.data.sources import DatasetsConfig
from distill.data.streams import StreamingSource

torch.set_num_threads(1)  # small tensors: a second thread costs more than it does

CROPS = CropsConfig(global_size=32, local_size=16, local_count=3)
# The whole image, unflipped, its colours as they are: a crop tells which image it is of.
BARE = CropsConfig(
    global_size=8, local_size=8, local_count=1, global_scale=(1.0, 1.0), local_scale=(1.0, 1.0),
    flip=0.0, jitter_p=0.0, grey=0.0, blur=(0.0, 0.0, 0.0), solarise=0.0,
)  # fmt: skip


def settings(**changes) -> LoaderSettings:
    base: dict[str, Any] = {"crops": CROPS, "masks": MasksConfig(), "patch": 8, "normalize": "per_image", "batch": 6, "seed": 3}
    return LoaderSettings(**(base | changes))


def flat(value: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (value, value, value))


class Flat:
    """Image i has the value i everywhere."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def image(self, index: int) -> Image.Image:
        return flat(index)


class Endless:
    """A stream: position p has the value p (and the seed), and notes where reading began."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def iterate(self, seed: int, positions: Iterable[int]) -> Iterator[Image.Image]:
        for i, position in enumerate(positions):
            if i == 0:
                self.asked.append((seed, position))
            yield flat((position + seed) % 256)


def values(batch: Batch) -> list[int]:
    """Which images the first global crops are of."""
    half = batch.global_crops.shape[0] // 2
    return (batch.global_crops[:half, 0, 0, 0] * 255).round().int().tolist()


def same(a: Batch, b: Batch) -> bool:
    """Bit for bit, whatever tensors they hold."""
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch)]
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


def joined(parts: list[Batch], s: LoaderSettings) -> Batch:
    """The batch whose images these parts hold in turn: each is split by crops, then the images are put together."""
    counts = {"global_crops": 2, "local_crops": s.crops.local_count, "masks": 2, "teacher_crops": 2}

    def join(name: str) -> Any:
        tensors = [getattr(p, name) for p in parts]
        if tensors[0] is None:
            return None
        return torch.cat([t.reshape(counts[name], -1, *t.shape[1:]) for t in tensors], 1).flatten(0, 1)

    return Batch(*(join(f.name) for f in fields(Batch)))


SOURCE = ScenesConfig(count=20, size=32).build()


def test_shapes_and_types():
    batch = next(batches(SOURCE, settings(), 0, 1, 0))
    assert batch.global_crops.shape == (12, 3, 32, 32)
    assert batch.local_crops.shape == (18, 3, 16, 16)
    assert batch.masks.shape == (12, 16)
    assert batch.global_crops.dtype == batch.local_crops.dtype == torch.float32
    assert batch.masks.dtype == torch.bool
    moved = batch.to(torch.device("cpu"))
    assert same(batch, moved)


def test_crops_are_crop_major():
    batch = next(batches(Flat(50), settings(crops=BARE, normalize="none"), 0, 1, 0))
    first, second = batch.global_crops[:6], batch.global_crops[6:]
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, batch.local_crops)
    assert len(set(values(batch))) == 6


def test_masks():
    masked = next(batches(SOURCE, settings(), 0, 1, 0)).masks
    assert int(masked.any(1).sum()) <= 6
    assert masked.any()
    for none in (None, MasksConfig(probability=0.0)):
        assert not next(batches(SOURCE, settings(masks=none), 0, 1, 0)).masks.any()
    steps = [b.masks for b in batches(SOURCE, settings(), 0, 4, 0)]
    assert not torch.equal(steps[0], steps[1])


def test_masking_changes_no_pixel():
    with_masks, without = (next(batches(SOURCE, settings(masks=m), 2, 3, 0)) for m in (MasksConfig(), None))
    assert torch.equal(with_masks.global_crops, without.global_crops)
    assert torch.equal(with_masks.local_crops, without.local_crops)


def test_no_local_crops():
    batch = next(batches(SOURCE, settings(crops=CROPS.model_copy(update={"local_count": 0})), 0, 1, 0))
    assert batch.local_crops.shape[0] == 0
    assert batch.global_crops.shape == (12, 3, 32, 32)


@pytest.mark.parametrize("n", [1, 7, 20])
def test_every_epoch_is_a_fresh_permutation(n):
    epochs = [[sample_index(3, e * n + i, n) for i in range(n)] for e in range(6)]
    assert all(sorted(e) == list(range(n)) for e in epochs)
    if n > 1:
        assert len({tuple(e) for e in epochs}) > 3
    if n > 5:
        assert [sample_index(4, i, n) for i in range(n)] != epochs[0]


def test_batches_follow_the_permutation_across_epochs():
    s = settings(crops=BARE, normalize="none", batch=6)
    seen = [v for b in batches(Flat(20), s, 0, 10, 0) for v in values(b)]
    assert seen == [sample_index(3, p, 20) for p in range(60)]
    for epoch in range(3):
        assert sorted(seen[20 * epoch : 20 * (epoch + 1)]) == list(range(20))


def test_a_batch_depends_on_seed_and_step_alone():
    whole = list(batches(SOURCE, settings(), 0, 6, 0))
    assert len(whole) == 6
    assert all(same(a, b) for a, b in zip(whole[3:], batches(SOURCE, settings(), 3, 6, 0), strict=True))
    assert all(same(a, b) for a, b in zip(whole, batches(SOURCE, settings(), 0, 6, 2), strict=True))
    assert list(batches(SOURCE, settings(), 6, 6, 0)) == []
    assert not any(same(a, b) for i, a in enumerate(whole) for b in whole[:i])
    other = next(batches(SOURCE, settings(seed=4), 0, 1, 0))
    assert not torch.equal(other.global_crops, whole[0].global_crops)


def test_the_same_image_gets_other_crops_each_time():
    one = ScenesConfig(count=1, size=32).build()
    batch = torch.cat([b.global_crops for b in batches(one, settings(batch=3), 0, 3, 0)])
    assert batch.shape[0] == 18
    assert all(not torch.equal(a, b) for i, a in enumerate(batch) for b in batch[:i])


# ---- several processes ----


def sharded(folder: Path, files: int = 4, each: int = 11) -> StreamingSource:
    """A stream of several parquet files through a shuffle buffer; one image is broken."""
    paths = []
    for f in range(files):
        cells = []
        for i in range(each):
            out = io.BytesIO()
            SOURCE.image((f * each + i) % len(SOURCE)).resize((30 + f, 26 + i)).save(out, "PNG")
            cells.append({"bytes": b"broken" if (f, i) == (1, 5) else out.getvalue(), "path": None})
        paths.append(str(folder / f"{f}.parquet"))
        pq.write_table(pa.table({"image": pa.array(cells)}), paths[-1], row_group_size=4)
    source = DatasetsConfig(name="parquet", data_files=paths, streaming=True, buffer=10).build()
    assert isinstance(source, StreamingSource)
    return source


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Iterator[dict[str, Any]]:
    import datasets

    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("cache")
    yield {"scenes": SOURCE, "stream": sharded(tmp_path_factory.mktemp("shards"))}
    datasets.config.HF_DATASETS_CACHE = before


def fresh(source: Any) -> Any:
    """As another process would open it: nothing learnt."""
    return pickle.loads(pickle.dumps(source)) if isinstance(source, StreamingSource) else source


@pytest.mark.parametrize("kind", ["scenes", "stream"])
@pytest.mark.parametrize(("batch", "world"), [(8, 1), (8, 2), (8, 4), (7, 3), (5, 5)])
def test_the_ranks_together_make_the_batch_of_one_process(sources, kind, batch, world):
    """Crops, colours and masks, bit for bit; whoever divides the images, unevenly too."""
    s = settings(batch=batch, teacher_normalize="imagenet")
    whole = list(batches(fresh(sources[kind]), s, 0, 4, 0))
    ranks = [list(batches(fresh(sources[kind]), replace(s, share=(r, world)), 0, 4, 0)) for r in range(world)]
    for step, one in enumerate(whole):
        assert same(joined([made[step] for made in ranks], s), one), step
        assert one.masks.any()


@pytest.mark.parametrize("kind", ["scenes", "stream"])
def test_resuming_on_another_number_of_processes(sources, kind):
    """One process, killed in mid-epoch and in mid-shard; two go on, then four, each with nothing but the step's number."""
    s = settings(batch=8)
    whole = list(batches(fresh(sources[kind]), s, 0, 9, 0))  # 72 images of 20 or 44: into the second epoch and beyond
    for start, world in ((2, 2), (3, 2), (6, 4), (7, 1)):
        ranks = [list(batches(fresh(sources[kind]), replace(s, share=(r, world)), start, 9, 1)) for r in range(world)]
        for i, one in enumerate(whole[start:]):
            assert same(joined([made[i] for made in ranks], s), one), (start, world, i)


def test_other_ranks_images_and_skipped_ones_are_not_decoded(sources, monkeypatch):
    decoded = []

    def counted(data: Any, side: int | None) -> Image.Image:
        decoded.append(data)
        return decode(data, side)

    monkeypatch.setattr(streams, "decode", counted)
    list(batches(fresh(sources["stream"]), settings(batch=8, share=(1, 2)), 4, 5, 0))
    assert 4 <= len(decoded) <= 5  # one more where the broken one is met


@pytest.mark.parametrize(("batch", "world"), [(6, 2), (6, 3), (5, 5)])
def test_the_ranks_share_a_stream_and_decode_nothing_twice(batch, world):
    bare = {"crops": BARE, "normalize": "none", "batch": batch, "masks": None}
    for start in (0, 2):
        ranks = [[values(b) for b in batches(Endless(), settings(**bare, share=(r, world)), start, 5, 0)] for r in range(world)]
        for i, step in enumerate(range(start, 5)):
            together = [v for rank in ranks for v in rank[i]]
            assert together == [p + 3 for p in range(step * batch, (step + 1) * batch)]  # the seed is 3
            assert {len(rank[i]) for rank in ranks} == {batch // world}


# ---- replay, parts, teacher, devices ----


@pytest.mark.parametrize("kind", ["scenes", "stream"])
def test_replay_brings_the_same_batches_again(sources, kind):
    plain = list(batches(fresh(sources[kind]), settings(), 0, 3, 0))
    s = settings(replay=3)
    again = list(batches(fresh(sources[kind]), s, 0, 8, 1))
    assert len(again) == 8
    assert all(same(b, plain[step % 3]) for step, b in enumerate(again))
    late = list(batches(fresh(sources[kind]), s, 4, 8, 0))
    assert all(same(a, b) for a, b in zip(late, again[4:], strict=True))
    assert list(batches(fresh(sources[kind]), s, 8, 8, 0)) == []


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_parts_are_slices_by_image(n):
    s = settings(teacher_normalize="imagenet")
    whole = next(batches(SOURCE, s, 0, 1, 0))
    parts = whole.parts(n)
    assert [len(p.masks) for p in parts] == [12 // n] * n
    assert same(joined(parts, s), whole)
    one = parts[-1]  # what a rank with the last images would have made
    assert same(one, next(batches(SOURCE, replace(s, share=(n - 1, n)), 0, 1, 0)))


def test_parts_of_odd_batches_without_local_crops_or_teacher():
    s = settings(batch=5, crops=CROPS.model_copy(update={"local_count": 0}))
    whole = next(batches(SOURCE, s, 0, 1, 0))
    parts = whole.parts(2)
    assert [p.global_crops.shape[0] for p in parts] == [4, 6]
    assert all(p.local_crops.shape[0] == 0 and p.teacher_crops is None for p in parts)
    both = torch.cat([p.masks.view(2, -1, 16) for p in parts], 1).flatten(0, 1)
    assert torch.equal(both, whole.masks)
    with pytest.raises(AssertionError):
        whole.parts(6)


def test_the_teacher_sees_the_same_pixels_in_its_own_units():
    raw = next(batches(SOURCE, settings(normalize="none"), 0, 1, 0))
    both = next(batches(SOURCE, settings(teacher_normalize="imagenet"), 0, 1, 0))
    assert both.teacher_crops is not None
    torch.testing.assert_close(both.teacher_crops, normalize_batch(raw.global_crops, "imagenet"))
    torch.testing.assert_close(both.global_crops, normalize_batch(raw.global_crops, "per_image"))
    for equal in (None, "per_image"):
        assert next(batches(SOURCE, settings(teacher_normalize=equal), 0, 1, 0)).teacher_crops is None


def test_another_device_gets_bytes_and_finishes_there():
    """The meta device computes shapes alone, and refuses a tensor that was left on the CPU."""
    s = settings(teacher_normalize="clip", batch=9)
    want = next(batches(SOURCE, s, 0, 1, 0))
    for workers in (0, 1):
        made = next(batches(SOURCE, replace(s, device=torch.device("meta")), 0, 1, workers))
        for f in fields(Batch):
            got = getattr(made, f.name)
            assert got.device.type == "meta"
            assert (got.shape, got.dtype) == (getattr(want, f.name).shape, getattr(want, f.name).dtype)


def test_finishing_all_at_once_as_a_gpu_does_gives_the_same(monkeypatch):
    crops = CROPS.model_copy(update={"global_size": 96, "blur": (0.5, 0.5, 0.5)})
    s = settings(crops=crops, batch=12)
    in_parts = next(batches(SOURCE, s, 0, 1, 0))
    monkeypatch.setattr(loader, "CACHED_PIXELS", 2**40)
    at_once = next(batches(SOURCE, s, 0, 1, 0))
    torch.testing.assert_close(at_once.global_crops, in_parts.global_crops, rtol=0, atol=2e-5)
    torch.testing.assert_close(at_once.local_crops, in_parts.local_crops, rtol=0, atol=2e-5)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_is_skipped_into_place(workers):
    s = settings(crops=BARE, normalize="none", batch=5, seed=2)
    whole = [values(b) for b in batches(Endless(), s, 0, 8, workers)]
    assert whole == [[(p + 2) % 256 for p in range(5 * i, 5 * i + 5)] for i in range(8)]
    source = Endless()
    late = [values(b) for b in batches(source, s, 3, 8, workers)]
    assert late == whole[3:]
    if workers == 0:
        assert source.asked == [(2, 15)]


def test_a_resumed_stream_gives_the_same_crops():
    s = settings()
    whole = list(batches(Endless(), s, 0, 5, 0))
    assert all(same(a, b) for a, b in zip(whole[2:], batches(Endless(), s, 2, 5, 0), strict=True))


def test_a_stream_is_not_read_before_it_is_needed():
    source = Endless()
    made = batches(source, settings(crops=BARE), 0, 100, 0)
    assert source.asked == []
    list(islice(made, 2))
    assert len(source.asked) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_normalisation_is_that_of_the_preprocessing(kind):
    torch.manual_seed(0)
    x = torch.rand(5, 3, 12, 9)
    x[1] = 0.25  # flat
    x[2, 1] = 1.0  # one flat channel
    want = np.stack([normalize(image.numpy(), kind) for image in x])
    np.testing.assert_allclose(normalize_batch(x, kind).numpy(), want, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(normalize_batch(x, kind, x).numpy(), want, rtol=1e-4, atol=2e-5)  # in place


def test_an_unknown_normalisation_is_an_error():
    with pytest.raises(ValueError, match="must be one of imagenet"):
        normalize_batch(torch.rand(1, 3, 2, 2), "imagnet")


def test_crops_are_normalised():
    raw = next(batches(SOURCE, settings(normalize="none"), 0, 1, 0)).local_crops
    assert raw.min() >= -1e-6
    assert raw.max() <= 1 + 1e-6
    for kind in ("imagenet", "per_image"):
        made = next(batches(SOURCE, settings(normalize=kind), 0, 1, 0)).local_crops
        torch.testing.assert_close(made, normalize_batch(raw, kind))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"probability": 1.1}, "probability must be"),
        ({"ratio": (0.5, 0.1)}, "ratio must be"),
        ({"ratio": (-0.1, 0.1)}, "ratio must be"),
        ({"min_block": 0}, "min_block must be"),
    ],
)
def test_problems_of_masks(changes, said):
    found = MasksConfig(**changes).problems()
    assert len(found) == 1
    assert said in found[0]
    assert MasksConfig().problems() == []
