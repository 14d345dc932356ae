"""Videos: real files that the tests encode, their frames, and the task that judges them."""

import numpy as np
import pytest
import torch

from distill.data.sources import checked
from distill.data.videos import Frames, VideosConfig, count_frames, read_frames
from distill.errors import UserError
from distill.evaluate.split import shared_items
from distill.evaluate.task import Stored, Unfit, Unscored
from distill.evaluate.video import VideoTask
from distill.progress import Progress

av = pytest.importorskip("av")
QUIET = Progress("quiet")


def encode(path, values, size=64):
    """A clip whose frame t is grey of values[t]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = size
        for value in values:
            frame = av.VideoFrame.from_ndarray(np.full((size, size, 3), value, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture
def folder(tmp_path):
    for split, n in (("train", 8), ("test", 4)):
        for name, step in (("brighter", 20), ("darker", -20)):
            for i in range(n):
                i -= 10 * (split == "test")  # further from the other class, and no clip is in both
                start = 20 + i if step > 0 else 220 - i
                encode(tmp_path / split / name / f"{i}.mp4", [start + step * t for t in range(10)])
    return tmp_path


def test_frames_are_the_middles_of_equal_parts(tmp_path):
    encode(tmp_path / "a" / "clip.mp4", [20 * t for t in range(10)])
    frames = read_frames(tmp_path / "a" / "clip.mp4", 5)
    seen = [np.asarray(f).mean() for f in frames]
    np.testing.assert_allclose(seen, [20, 60, 100, 140, 180], atol=4)
    assert frames[0].mode == "RGB"


def test_a_clip_of_fewer_frames_repeats_some(tmp_path):
    encode(tmp_path / "a" / "clip.mp4", [50, 150])
    seen = [round(float(np.asarray(f).mean()), -1) for f in read_frames(tmp_path / "a" / "clip.mp4", 4)]
    assert seen == [50, 50, 150, 150]


def test_a_folder_gives_labelled_clips_and_frames_one_after_the_other(folder):
    videos = VideosConfig(path=str(folder / "train")).build().checked()
    assert videos.classes == ["brighter", "darker"]
    assert sorted(videos.labels().tolist()) == [0] * 8 + [1] * 8
    frames = videos.frames(3)
    assert len(frames) == 48
    clip = 5
    direct = read_frames(videos.files[clip], 3)
    assert [frames.image(clip * 3 + j).tobytes() for j in range(3)] == [f.tobytes() for f in direct]
    assert frames.fingerprint() != videos.frames(2).fingerprint()


def test_files_that_are_no_videos_are_left_out_by_name(folder):
    (folder / "train" / "darker" / "broken.mp4").write_bytes(b"not a video")
    videos = VideosConfig(path=str(folder / "train")).build()
    kept = videos.checked()
    assert (len(videos), len(kept)) == (17, 16)
    assert "darker/broken.mp4" in kept.dropped[0]
    assert kept.classes == videos.classes


def test_evaluation_leaves_broken_files_out(folder):
    (folder / "train" / "darker" / "broken.mp4").write_bytes(b"not a video")
    videos = VideosConfig(path=str(folder / "train")).build()
    assert len(checked(videos)) == 16
    with pytest.raises(UserError, match=r"train: darker/broken.mp4: .*Repair the video or leave it out"):
        videos.frames(2).image(2 * videos.files.index(folder / "train" / "darker" / "broken.mp4"))


def test_a_clip_that_begins_well_and_breaks_off_is_left_out(folder):
    """Coded in independent pictures so that the first can be decoded whatever follows."""
    path = folder / "train" / "darker" / "cut.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "rgb24"
        for picture in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    whole = path.read_bytes()
    assert count_frames(path) == 6
    third = [i for i in range(len(whole)) if whole.startswith(b"\x89PNG", i)][2]
    path.write_bytes(whole[:third] + bytes(len(whole[third:][:4000])) + whole[third + 4000 :])
    with av.open(str(path)) as container:
        next(container.decode(video=0))
    kept = checked(VideosConfig(path=str(folder / "train")).build())
    assert len(kept) == 16
    assert "darker/cut.mp4" in kept.dropped[0]


def test_clips_of_both_sets_are_a_sentence(folder):
    train, test = (VideosConfig(path=str(folder / name)).build() for name in ("train", "test"))
    (folder / "new" / "darker").mkdir(parents=True)
    encode(folder / "new" / "brighter" / "x.mp4", [3, 77, 3])
    (folder / "new" / "darker" / "copy.mp4").write_bytes(train.files[3].read_bytes())
    new = VideosConfig(path=str(folder / "new")).build()
    assert shared_items(train, new) == 1
    assert shared_items(train, test) == 0
    task = VideoTask(train=VideosConfig(path=str(folder / "train")), test=VideosConfig(path=str(folder / "new")))
    with pytest.raises(Unfit, match="1 of the 2 items of the test set new are also in train"):
        task.judge(BrightnessReader(), {"train": train, "test": new}, QUIET)


def test_bad_folders_are_sentences(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no videos"):
        VideosConfig(path=str(tmp_path / "empty")).build()
    encode(folder / "train" / "loose.mp4", [1, 2])
    with pytest.raises(UserError, match="in no folder of a class"):
        VideosConfig(path=str(folder / "train")).build()
    with pytest.raises(UserError):
        VideosConfig(path=str(tmp_path / "nowhere")).build()
    (tmp_path / "bad" / "x").mkdir(parents=True)
    (tmp_path / "bad" / "x" / "y.mp4").write_bytes(b"zzz")
    with pytest.raises(UserError, match="none of its videos"):
        VideosConfig(path=str(tmp_path / "bad")).build().checked()


class BrightnessReader:
    """Features are the frame's brightness and its square: enough to tell the classes by their mean only after averaging."""

    resolution, depth = 32, 1

    def read(self, source, *, patches=False, layers=1, fit="crop"):
        assert isinstance(source, Frames)
        values = torch.tensor([np.asarray(source.image(i)).mean() / 128 - 1 for i in range(len(source))]).float()
        x = torch.stack([values, values**2, torch.ones_like(values)], 1).numpy()[None]
        return Stored(x, x)


def test_the_task_judges_clips_by_the_mean_of_their_frames(folder):
    task = VideoTask(
        train=VideosConfig(path=str(folder / "train")), test=VideosConfig(path=str(folder / "test")), frames=4, ks=[3]
    )
    sources = {role: config.build().checked() for role, config in task.sources().items()}
    scores = {s.metric: s for s in task.judge(BrightnessReader(), sources, QUIET)}
    assert set(scores) == set(task.metrics())
    assert len(scores["video_top1"].stats) == 8
    about = {"gallery_size": 16, "classes": 2, "frames": 4, "seed": 0}
    assert all(about.items() <= s.conditions.items() and "test_left_out" not in s.conditions for s in scores.values())
    assert scores["video_knn_top1"].value() == 100


def test_what_one_classifier_cannot_do_the_other_still_does(folder):
    encode(folder / "test" / "still" / "0.mp4", [90] * 10)
    task = VideoTask(train=VideosConfig(path=str(folder / "train")), test=VideosConfig(path=str(folder / "test")), ks=[100])
    sources = {role: config.build() for role, config in task.sources().items()}
    nearest, probe = task.judge(BrightnessReader(), sources, QUIET)
    assert isinstance(nearest, Unscored)
    assert nearest.metric == "video_knn_top1"
    assert "16 videos to learn from, fewer than the smallest k (100)" in nearest.reason
    assert probe.metric == "video_top1"
    assert nearest.conditions["test_left_out"] == probe.conditions["test_left_out"] == 1  # no class of the training clips
    nearest, probe = task.model_copy(update={"ks": [3], "probe_lrs": [1e300]}).judge(BrightnessReader(), sources, QUIET)
    assert nearest.value() == 100
    assert isinstance(probe, Unscored)
    assert probe.metric == "video_top1"
    assert "learning rate" in probe.reason
    assert len(VideoTask(train=task.train, test=task.test, frames=0, probe_steps=0, seed=-1).problems()) == 3
