"""Action recognition from the mean of frozen frame features (DINOv2, section 7.2: a linear classifier on averaged features)."""

from typing import Any, Literal

import numpy as np
from torch import Tensor

from distill.config import Config
from distill.data.videos import VideosConfig
from distill.encoder import Features
from distill.evaluate import knn, linear
from distill.evaluate.retrieval import clean
from distill.evaluate.scores import Score, percent_right
from distill.evaluate.split import Split, align
from distill.evaluate.task import Reader, Unfit, Unscored
from distill.progress import Progress


class VideoTask(Config):
    """Videos in folders of their classes: kNN and a linear probe on the mean of the frames' features.

    Attributes:
        train, test: folders of videos. frames: evenly spaced, of each video.
        ks, temperature: of kNN; k is chosen on a held-out fifth of `train`.
        probe_lrs, probe_steps: of the linear probe; see `linear.ProbeSettings`.
        seed: of every random choice.
    """

    kind: Literal["video"] = "video"
    train: VideosConfig
    test: VideosConfig
    frames: int = 8
    ks: list[int] = [5, 10, 20]  # noqa: RUF012  pydantic copies it
    temperature: float = 0.07
    probe_lrs: list[float] = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0]  # noqa: RUF012
    probe_steps: int = 500
    seed: int = 0

    def problems(self) -> list[str]:
        found = []
        if self.frames < 1:
            found.append(f"frames must be at least 1, got {self.frames}")
        if not self.ks or min(self.ks) < 1 or len(set(self.ks)) < len(self.ks):
            found.append(f"ks must be one or more different numbers of at least 1, got {self.ks}")
        if not self.probe_lrs or not all(0 < lr < float("inf") for lr in self.probe_lrs):
            found.append(f"probe_lrs must be one or more numbers above 0, got {self.probe_lrs}")
        if not 0 < self.temperature < float("inf"):
            found.append(f"temperature must be above 0, got {self.temperature}")
        if self.probe_steps < 1:
            found.append(f"probe_steps must be at least 1, got {self.probe_steps}")
        if self.seed < 0:
            found.append(f"seed must be at least 0, got {self.seed}")
        return found

    def sources(self) -> dict[str, Any]:
        return {"train": self.train, "test": self.test}

    def metrics(self) -> tuple[str, ...]:
        return "video_knn_top1", "video_top1"

    def judge(self, reader: Reader, sources: dict[str, Any], progress: Progress) -> list[Score | Unscored]:
        """Raises: Unfit: labels are missing, or clips are in both sets."""
        split = align(sources["train"], sources["test"])
        if isinstance(split, str):
            raise Unfit(split)
        (train, train_patch), (test, test_patch) = (self._clips(reader, sources[role]) for role in ("train", "test"))
        gallery = Features(train[split.gallery], train_patch[split.gallery][:, None])
        asked = Features(test[split.test], test_patch[split.test][:, None])
        about = split.conditions() | {"frames": self.frames, "seed": self.seed}
        return [self._knn(gallery, asked, split, about), self._probe(gallery, asked, split, about)]

    def _knn(self, gallery: Features, asked: Features, split: Split, about: dict[str, Any]) -> Score | Unscored:
        labels = split.gallery_labels
        fit = [k for k in self.ks if k <= len(labels)]
        if not fit:
            reason = f"There are {len(labels)} videos to learn from, fewer than the smallest k ({min(self.ks)})."
            return Unscored("video_knn_top1", reason, about)
        kept, held = knn.hold_out(labels, self.seed)
        k = knn.choose_k(gallery.cls, labels, kept, held, fit, self.temperature)
        said = knn.predict(gallery.cls, labels, asked.cls, [k], self.temperature)[k]
        return percent_right("video_knn_top1", (said == split.test_labels).numpy(), chosen_k=k, **about)

    def _probe(self, gallery: Features, asked: Features, split: Split, about: dict[str, Any]) -> Score | Unscored:
        settings = linear.ProbeSettings(tuple(self.probe_lrs), self.probe_steps, seed=self.seed)
        probe = linear.probe(gallery, split.gallery_labels, asked, settings)
        if isinstance(probe, str):
            return Unscored("video_top1", probe, about)
        right = (probe.predicted == split.test_labels).numpy()
        return percent_right("video_top1", right, lr=probe.lr, features=probe.features, **about)

    def _clips(self, reader: Reader, videos: Any) -> tuple[Tensor, Tensor]:
        """Mean over frames of CLS and of the mean patch, [clips, D] each."""
        stored = reader.read(videos.frames(self.frames))
        parts = (np.asarray(stored.cls[-1]), np.asarray(stored.mean_patch[-1]))
        cls, patch = (clean(p.reshape(len(videos), self.frames, -1).mean(1)) for p in parts)
        return cls, patch
