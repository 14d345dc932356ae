"""Retrieval by cosine similarity of frozen features: mean average precision and recall at k (as DINOv2's section 7.3 asks for instances).

Average precision of a query with R relevant items at the ranks r_1 < ... < r_R (1 is nearest) is mean_i(i / r_i): no interpolation, as
scikit-learn's. It is not that of Oxford and Paris, which is trapezoidal and leaves junk images out: their published numbers are no
yardstick here. Recall at k is the share of queries with at least one relevant item among the k nearest. Among equal similarities the lower
index comes first. Queries without a relevant item do not count.

Shape legend: Q queries, M database items, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from distill.config import Config
from distill.data.sources import SourceConfig
from distill.evaluate.scores import Score
from distill.evaluate.split import align
from distill.evaluate.task import Reader, Unfit
from distill.progress import Progress

CHUNK_ELEMENTS = 2**24  # similarities that are sorted at once


@dataclass(frozen=True)
class Ranking:
    """What a search gave, query by query.

    Attributes:
        average_precision: [Q] 0..1. first: [Q] int64, rank of the nearest relevant item, from 1. Both are 0 where there is none.
        relevant: [Q] int64, how many relevant items there are.
    """

    average_precision: np.ndarray
    first: np.ndarray
    relevant: np.ndarray

    def scores(self, ks: list[int], **about: Any) -> list[Score]:
        """Headlines `map` and, for the smallest k, `recall_at_k`; the other k are further rows. Percent. `about`: conditions of all."""
        counts = (self.relevant > 0).astype(np.float64)
        found = [Score("map", "percent", np.stack([self.average_precision, counts], 1), about)]
        for k in sorted(ks):
            hit = ((self.first > 0) & (self.first <= k)).astype(np.float64)
            found.append(Score("recall_at_k", "percent", np.stack([hit, counts], 1), {**about, "k": k}, headline=k == min(ks)))
        return found


def rank(queries: Tensor, database: Tensor, relevant_to: Tensor, labels: Tensor, itself: Tensor | None = None) -> Ranking:
    """Search every query in the database.

    Args:
        queries: [Q, D]; relevant_to: int64 [Q]. database: [M, D]; labels: int64 [M], relevant where equal.
        itself: int64 [Q], the database item that is the query and is left out; None: none is.
    """
    precision, first, relevant = [], [], []
    for sims, index in similarities(queries, database):
        if itself is not None:
            sims[torch.arange(len(index)), itself[index]] = -torch.inf
        order = sims.argsort(dim=1, descending=True, stable=True)
        hits = labels[order] == relevant_to[index][:, None]
        if itself is not None:
            hits[:, -1] = False  # the query, at -inf
        found = hits.cumsum(1)
        ranks = torch.arange(1, hits.shape[1] + 1)
        total = found[:, -1]
        precision.append(torch.where(hits, found / ranks, 0.0).sum(1, dtype=torch.float64) / total.clamp(min=1))
        first.append(torch.where(total > 0, hits.float().argmax(1) + 1, 0))
        relevant.append(total)
    return Ranking(*(torch.cat(part).numpy() for part in (precision, first, relevant)))


def similarities(queries: Tensor, database: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Slices of the cosine similarities [q, M] and the queries [q] that they are of; a feature of zeros is similar to none."""
    queries, database = (F.normalize(x.float(), dim=1, eps=1e-12) for x in (queries, database))
    for index in torch.arange(len(queries)).split(max(1, CHUNK_ELEMENTS // max(1, len(database)))):
        yield queries[index] @ database.T, index


def clean(features: Any) -> Tensor:
    """float32 features of which NaN and infinity became 0: such an item is found by nobody and finds nobody."""
    return torch.nan_to_num(torch.from_numpy(np.array(features, np.float32)), 0.0, 0.0, 0.0)


class RetrievalTask(Config):
    """Instance or category retrieval: relevant is what has the same label.

    Attributes:
        data: a labelled set that is searched in. queries: another set that asks; null: every item of `data` asks for the others.
        ks: of recall at k.
    """

    kind: Literal["retrieval"] = "retrieval"
    data: str | SourceConfig
    queries: str | SourceConfig | None = None
    ks: list[int] = Field(default_factory=lambda: [1, 5, 10])

    def problems(self) -> list[str]:
        good = self.ks and min(self.ks) >= 1 and len(set(self.ks)) == len(self.ks)
        return [] if good else [f"ks must be one or more different numbers of at least 1, got {self.ks}"]

    def sources(self) -> dict[str, Any]:
        return {"data": self.data} | ({} if self.queries is None else {"queries": self.queries})

    def metrics(self) -> tuple[str, ...]:
        return "map", "recall_at_k"

    def judge(self, reader: Reader, sources: dict[str, Any], progress: Progress) -> list[Score]:
        data = sources["data"]
        if "queries" in sources:
            split = align(data, sources["queries"])
            if isinstance(split, str):
                raise Unfit(split)
            database = clean(reader.read(data).cls[-1])[split.gallery]
            queries = clean(reader.read(sources["queries"]).cls[-1])[split.test]
            found = rank(queries, database, split.test_labels, split.gallery_labels)
            return found.scores(self.ks, **split.conditions())
        labels = data.labels()
        if labels is None or not (labels >= 0).any():
            raise Unfit(f"{data.name} has no labels, and retrieval needs to know what is relevant.")
        known = np.flatnonzero(labels >= 0)
        numbers = torch.from_numpy(labels[known].astype(np.int64))
        if len(numbers.unique()) == len(numbers):
            raise Unfit(f"No two images of {data.name} have the same label: there is nothing to retrieve.")
        features = clean(reader.read(data).cls[-1])[known]
        return rank(features, features, numbers, numbers, torch.arange(len(numbers))).scores(self.ks)
