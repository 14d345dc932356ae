"""Images read as they come, for training on a set that is too large to keep: no length, no index, any number of epochs."""

import itertools
import multiprocessing
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from distill.data.encoded import PROBED
from distill.data.hub import datasets_library, explained
from distill.data.images import BadImage, decode
from distill.data.tables import encoded_cell, image_column
from distill.errors import UserError
from distill.files import sha256_json


class StreamingSource:
    """An endless shuffled stream of images: no length, no index, no labels.

    Position p of the stream is an item, good or bad; the place of a bad one is taken by the next good one. So a position means
    the same whether or not the stream was interrupted, and skipping needs no decoding.

    Attributes:
        skipped: position -> reason, of the bad items that this process met.
        skipped_count: how often one was met, by this process and those forked from it (each epoch meets it again).
    """

    classes = None

    def __init__(self, name: str, stream: Any, column: str, buffer: int, limit: int | None, fingerprint: str):
        """`stream`: a `datasets.IterableDataset` whose `column` is not decoded."""
        self.name, self.stream, self.column, self.buffer, self.limit = name, stream, column, buffer, limit
        self.skipped: dict[int, str] = {}
        self._fingerprint = fingerprint
        self._epoch_length: int | None = None  # known once an epoch was passed
        self._bad = multiprocessing.Value("q", 0)

    def labels(self) -> None:
        return None

    def fingerprint(self) -> str:
        """Of name, config, split and revision, or of the local files' content."""
        return self._fingerprint

    def iterate(
        self, seed: int, positions: Iterable[int] | None = None, shorter_side: int | None = None
    ) -> Iterator[Image.Image]:
        """Images at these increasing positions (all of them: None) of the endless stream of `seed`; each epoch is shuffled anew.

        Processes that take each other's complement of the positions together give the one sequence. What lies between is read, not
        decoded; of the epochs before the first position only one is read, to learn how long an epoch is.

        Args:
            shorter_side: as in `decode`.

        Raises:
            UserError: the stream is empty, more than half of the first 100 images tried are bad, or an epoch has no good one.
        """
        places = iter(itertools.count() if positions is None else positions)
        wanted, tried, bad, bad_run = next(places, None), 0, 0, 0
        if wanted is None:
            return
        for position, cell in self._cells(seed, wanted):
            if position < wanted:
                continue
            tried += 1
            try:
                image = decode(encoded_cell(cell), shorter_side)
            except BadImage as e:
                bad, bad_run = bad + 1, bad_run + 1
                self._note(position, e.reason)
                if (tried <= PROBED and bad > PROBED / 2) or bad_run >= (self._epoch_length or sys.maxsize):
                    raise UserError(
                        f"{self.name}: {bad} of the first {tried} images tried cannot be read ({e.reason}). Name another set."
                    ) from e
                continue
            bad_run = 0
            while wanted <= position:
                following = next(places, None)
                yield image.copy() if following is not None and following <= position else image
                if following is None:
                    return
                wanted = following

    def skipped_summary(self) -> str:
        """One line for the log; empty when nothing was skipped."""
        examples = "; ".join(f"position {p}: {reason}" for p, reason in list(self.skipped.items())[:3])
        count = self._bad.value
        return f"{count:,} images of {self.name} were skipped" + (f" ({examples})" if examples else "") if count else ""

    @property
    def skipped_count(self) -> int:
        return self._bad.value

    def _note(self, position: int, reason: str) -> None:
        if position not in self.skipped:
            self.skipped[position] = reason
            with self._bad.get_lock():
                self._bad.value += 1

    def _cells(self, seed: int, start: int) -> Iterator[tuple[int, Any]]:
        """(position, cell) for ever, from the start of the epoch that holds `start` or before."""
        import fsspec.asyn

        fsspec.asyn.reset_lock()  # a forked worker must not wait for its parent's event loop
        epoch = position = 0
        while True:
            while self._epoch_length and start - position >= self._epoch_length:
                epoch, position = epoch + 1, position + self._epoch_length
            first = position
            for cell in self._shuffled(np.random.default_rng((seed, epoch))):
                yield position, cell
                position += 1
            if position == first:
                raise UserError(f"{self.name} is an empty stream. Name a data set that has rows.")
            epoch, self._epoch_length = epoch + 1, position - first

    def _shuffled(self, g: np.random.Generator) -> Iterator[Any]:
        """One epoch's cells: shards in random order through a buffer of which a random cell makes room for each new one.

        The library's own shuffle would do, but it reads ten shards in threads and then sleeps for seconds at each epoch's end.
        """
        held: list[Any] = []
        for cell in itertools.islice(self._cells_of_shards(g), self.limit):
            if len(held) < self.buffer:
                held.append(cell)
                continue
            i = int(g.integers(self.buffer))
            out, held[i] = held[i], cell
            yield out
        yield from (held[i] for i in g.permutation(len(held)).tolist())

    def _cells_of_shards(self, g: np.random.Generator) -> Iterator[Any]:
        n = self.stream.num_shards
        # With a limit the first shards come first, so that each epoch has the same images.
        shards = range(n) if self.limit is not None else g.permutation(n).tolist()
        for i in shards:
            # Not iter(shard): in a loader's worker that gives nothing but this worker's share.
            with explained(self.name, f"The stream {self.name} broke off. Run the same command again to go on from there."):
                for batch in self.stream.shard(num_shards=n, index=i).iter(batch_size=16):
                    yield from batch[self.column]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_bad"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bad = multiprocessing.Value("q", 0)


def stream_source(
    name: str, stream: Any, content: dict[str, Any], image: str | None, buffer: int, limit: int | None
) -> StreamingSource:
    """A StreamingSource over a `datasets.IterableDataset`; `content` identifies what it holds."""
    if stream.features is None:
        stream = stream._resolve_features()
    column = image_column(name, stream.features, image)
    encoded = stream.select_columns([column]).cast_column(column, datasets_library().Image(decode=False))
    fingerprint = sha256_json({**content, "image": column, "limit": limit, "buffer": buffer})[:16]
    return StreamingSource(name, encoded, column, buffer, limit, fingerprint)
