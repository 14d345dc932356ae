"""Videos: real files that the tests encode, their frames, and the task that judges them."""

import numpy as np
import pytest
import torch

from distill.data.videos import Frames, VideosConfig, read_frames
from distill.errors import UserError
from distill.evaluate.task import Stored, Unfit
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
    assert scores["video_knn_top1"].value() == 100


def test_too_few_videos_are_a_reason(folder):
    task = VideoTask(train=VideosConfig(path=str(folder / "train")), test=VideosConfig(path=str(folder / "test")), ks=[100])
    sources = {role: config.build() for role, config in task.sources().items()}
    with pytest.raises(Unfit, match="fewer than the smallest k"):
        task.judge(BrightnessReader(), sources, QUIET)
    assert VideoTask(train=task.train, test=task.test, frames=0).problems()
