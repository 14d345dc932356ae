"""Video files in folders of their classes, as a Source of evenly spaced frames. PyAV reads them: whatever FFmpeg does."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distill.config import Config
from distill.data.encoded import seeded_order
from distill.data.folders import same_files
from distill.data.paths import content_hash, missing
from distill.errors import EnvironmentFailed, UserError
from distill.files import sha256_json
from distill.progress import Progress

SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".gif")
KEPT = 8  # clips whose frames stay decoded: threads read a few at once


class BadVideo(Exception):
    """Why a file gives no frames."""


class VideosConfig(Config):
    """Video files, each in the folder of its class.

    Attributes:
        path: the folder of the classes' folders.
        limit: the first so many of a fixed shuffle.
    """

    path: str
    limit: int | None = None

    def problems(self) -> list[str]:
        found = [] if self.path.strip() else ["path is empty"]
        return found + ([f"limit must be at least 1, got {self.limit}"] if self.limit is not None and self.limit < 1 else [])

    def build(self) -> "Videos":
        """Raises: UserError: no such folder, or no videos in folders of their classes."""
        root = Path(self.path).expanduser().absolute()
        if not root.is_dir():
            raise (
                missing(root)
                if not os.path.exists(root)
                else UserError(f"{root} is a file where a folder of videos is needed.")
            )
        files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise UserError(
                f"{root} holds no videos ({' '.join(s[1:] for s in SUFFIXES)}), nor do its sub-folders. Name another."
            )
        if loose := [p for p in files if p.parent == root]:
            raise UserError(
                f"{root} has videos in no folder of a class (such as {loose[0].name}). Move each into its class's folder."
            )
        order = seeded_order(len(files), self.limit)
        return Videos(root.name, [files[i] for i in order], root)


class Videos:
    """Clips with labels.

    Attributes:
        name: for tables and messages. classes: the folders' names. files: of the clips.
        dropped: what `checked` left out, with reasons.
    """

    def __init__(
        self, name: str, files: list[Path], root: Path, dropped: list[str] | None = None, classes: list[str] | None = None
    ):
        self.name, self.files, self.root, self.dropped = name, files, root, dropped or []
        self.classes = classes or sorted({p.relative_to(root).parts[0] for p in files})

    def __len__(self) -> int:
        return len(self.files)

    def labels(self) -> np.ndarray:
        """[n] int64."""
        number = {name: i for i, name in enumerate(self.classes)}
        return np.array([number[p.relative_to(self.root).parts[0]] for p in self.files], np.int64)

    def fingerprint(self) -> str:
        parts = [[str(p.relative_to(self.root)), content_hash(p)] for p in self.files]
        return sha256_json({"videos": parts, "classes": self.classes})[:16]

    def checked(self, progress: Progress | None = None) -> "Videos":
        """Without the files that cannot be decoded from beginning to end.

        Raises:
            UserError: none can. EnvironmentFailed: PyAV is not installed.
        """
        pyav()
        reasons: dict[int, str] = {}
        shown = (progress or Progress("quiet")).task(f"check {self.name}", len(self), unit="videos")
        with ThreadPoolExecutor(os.cpu_count()) as pool, shown as task:
            for i, reason in enumerate(pool.map(_problem, self.files)):
                task.advance()
                if reason:
                    reasons[i] = f"{self.files[i].relative_to(self.root)}: {reason}"
        if not reasons:
            return self
        if len(reasons) == len(self.files):
            raise UserError(f"{self.name}: none of its videos can be read ({reasons[0]}). Repair the data or name another set.")
        left = [p for i, p in enumerate(self.files) if i not in reasons]
        if progress:
            progress.say(
                f"{len(reasons)} of {len(self)} videos of {self.name} were left out ({next(iter(reasons.values()))}).", True
            )
        return Videos(self.name, left, self.root, list(reasons.values()), self.classes)

    def shared_with(self, other: Any) -> int:
        """How many clips of `other` have the same content as one of these."""
        return same_files(self.files, other.files) if isinstance(other, Videos) else 0

    def frames(self, each: int) -> "Frames":
        return Frames(self, each)


class Frames:
    """`each` evenly spaced frames of every clip, clip after clip, as a Source: frame j of clip i is image i * each + j."""

    classes = None

    def __init__(self, videos: Videos, each: int):
        self.videos, self.each = videos, each
        self._clips: OrderedDict[int, list[Image.Image]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return f"{self.videos.name}, {self.each} frames a video"

    def __len__(self) -> int:
        return len(self.videos) * self.each

    def labels(self) -> None:
        return None

    def fingerprint(self) -> str:
        return sha256_json({"frames": self.each, "of": self.videos.fingerprint()})[:16]

    def image(self, index: int) -> Image.Image:
        """Raises: UserError: the clip cannot be decoded (see `Videos.checked`)."""
        clip, j = divmod(index, self.each)
        with self._lock:
            found = self._clips.get(clip)
        if found is None:
            file = self.videos.files[clip]
            try:
                found = read_frames(file, self.each)
            except BadVideo as e:
                where = file.relative_to(self.videos.root)
                raise UserError(f"{self.videos.name}: {where}: {e}. Repair the video or leave it out.") from e
            with self._lock:
                self._clips[clip] = found
                while len(self._clips) > KEPT:
                    self._clips.popitem(last=False)
        return found[j]


def read_frames(path: Path, n: int) -> list[Image.Image]:
    """n RGB frames, the middles of n equal parts of the clip; a clip of fewer frames repeats some.

    Two passes: the container's own count of frames is often wrong or absent, so frames are counted without being converted first.

    Raises:
        BadVideo: no frame can be decoded.
    """
    av, total = pyav(), count_frames(path)
    wanted = [int((j + 0.5) * total / n) for j in range(n)]
    with _explained(), av.open(str(path)) as container:
        found = {i: f.to_image().convert("RGB") for i, f in enumerate(container.decode(video=0)) if i in wanted}
        return [found[i] for i in wanted]


def count_frames(path: Path) -> int:
    """How many frames a clip has, by decoding all of them. Raises: BadVideo: none, or decoding stops on the way."""
    av = pyav()
    with _explained(), av.open(str(path)) as container:
        if total := sum(1 for _ in container.decode(video=0)):
            return total
    raise BadVideo("it holds no frame")


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (pyav().error.FFmpegError, IndexError, KeyError, ValueError, OSError) as e:
        raise BadVideo(str(e).splitlines()[0] if str(e) else type(e).__name__) from e


def _problem(path: Path) -> str | None:
    """Why a clip cannot be used; a file whose end is missing often begins well."""
    try:
        count_frames(path)
    except BadVideo as e:
        return str(e)
    return None


def pyav() -> Any:
    """The `av` package.

    Raises:
        EnvironmentFailed: it is not installed.
    """
    try:
        import av
    except ImportError as e:
        raise EnvironmentFailed("Videos are read with PyAV, which is not installed: pip install 'decant-vision[video]'.") from e
    return av
