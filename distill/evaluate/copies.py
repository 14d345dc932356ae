"""Copy detection: are edited copies of an image more like it than anything else is?

Beside what retrieval tells query by query, copy detection asks for ONE threshold over all pairs: micro average precision, the area under
the precision-recall curve of all (query, item) pairs sorted together (as in the Image Similarity Challenge, arXiv 2106.09672). Pairs are
counted between 256 thresholds, quantiles of the copies' similarities, so that the score is a sum over queries and has an interval.

Shape legend: n images, T thresholds.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from distill.config import Config
from distill.data.sources import SourceConfig
from distill.evaluate.retrieval import clean, rank, similarities
from distill.evaluate.scores import THRESHOLDS, Score
from distill.evaluate.task import Reader, Unfit
from distill.progress import Progress


class CopyDetectionTask(Config):
    """Images in groups of copies, searched among each other and, if given, among distractors.

    Attributes:
        data: a labelled set; images of one label are copies of each other.
        distractors: further images that are copies of nothing.
        features: `cls`, or `cls+mean_patch`: both normalised, one after the other. DINO's copy detection (arXiv 2104.14294) has GeM pooling
            (p = 4) of the patches and whitening instead: here it is their plain mean, not whitened.
        ks: of recall at k.
    """

    kind: Literal["copy_detection"] = "copy_detection"
    data: str | SourceConfig
    distractors: str | SourceConfig | None = None
    features: Literal["cls", "cls+mean_patch"] = "cls+mean_patch"
    ks: list[int] = Field(default_factory=lambda: [1])

    def problems(self) -> list[str]:
        good = self.ks and min(self.ks) >= 1 and len(set(self.ks)) == len(self.ks)
        return [] if good else [f"ks must be one or more different numbers of at least 1, got {self.ks}"]

    def sources(self) -> dict[str, Any]:
        return {"data": self.data} | ({} if self.distractors is None else {"distractors": self.distractors})

    def metrics(self) -> tuple[str, ...]:
        return "map", "recall_at_k", "micro_ap"

    def judge(self, reader: Reader, sources: dict[str, Any], progress: Progress) -> list[Score]:
        labels = sources["data"].labels()
        if labels is None or len(np.unique(labels[labels >= 0])) in (0, np.count_nonzero(labels >= 0)):
            raise Unfit(f"{sources['data'].name} has no two images of one label, and copies are images of one label.")
        known = np.flatnonzero(labels >= 0)
        groups = torch.from_numpy(labels[known].astype(np.int64))
        queries = self._read(reader, sources["data"])[known]
        database, of = queries, groups
        if "distractors" in sources:
            more = self._read(reader, sources["distractors"])
            database, of = torch.cat([queries, more]), torch.cat([groups, groups.new_full((len(more),), -1)])
        about = {"features": self.features, "pooling": "mean, not whitened" if "mean_patch" in self.features else "none"}
        found = rank(queries, database, groups, of, torch.arange(len(queries))).scores(self.ks, **about)
        pairs = pair_counts(queries, database, groups, of)
        return [*found, Score("micro_ap", "micro_ap", pairs, {**about, "thresholds": THRESHOLDS})]

    def _read(self, reader: Reader, source: Any) -> Tensor:
        stored = reader.read(source)
        parts = [stored.cls[-1], stored.mean_patch[-1]] if self.features == "cls+mean_patch" else [stored.cls[-1]]
        return torch.cat([torch.nn.functional.normalize(clean(p), dim=1) for p in parts], 1)


def pair_counts(queries: Tensor, database: Tensor, groups: Tensor, of: Tensor) -> np.ndarray:
    """[n, 2 T] for every query: copies, then others, by the interval of similarity that they lie in, most similar first.

    The queries are the first n items of the database. Intervals end at quantiles of the copies' similarities; what is less similar than
    every copy is in none.
    """
    copies = torch.cat([sims[same] for sims, same, _ in _pairs(queries, database, groups, of)]).sort().values
    levels = copies[torch.linspace(0, len(copies) - 1, THRESHOLDS, dtype=torch.float64).round().long()].contiguous()
    counts = []
    for sims, same, others in _pairs(queries, database, groups, of):
        # Number of the first threshold that a similarity reaches, from the highest down; T for those that reach none.
        place = THRESHOLDS - torch.searchsorted(levels, sims.contiguous(), right=True)
        counts.append(torch.cat([_histogram(place, same), _histogram(place, others)], 1))
    return torch.cat(counts).numpy().astype(np.float64)


def _pairs(queries: Tensor, database: Tensor, groups: Tensor, of: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Slices of (similarities, copies of the query, other items), [q, M] each; the query itself is neither."""
    for sims, index in similarities(queries, database):
        same = of == groups[index][:, None]
        others = ~same
        same[torch.arange(len(index)), index] = False
        yield sims, same, others


def _histogram(place: Tensor, chosen: Tensor) -> Tensor:
    counts = torch.zeros(len(place), THRESHOLDS + 1)
    return counts.scatter_add(1, place, chosen.float())[:, :THRESHOLDS]
