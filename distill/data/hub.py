"""The `datasets` library: what it loads from here or from a hub, without a network too, its errors turned into sentences."""

import errno
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.data.folders import files_fingerprint
from distill.data.paths import content_hash, local_files, looks_like_path, missing
from distill.errors import DecantError, EnvironmentFailed, UserError

BUILDERS = ("parquet", "arrow", "imagefolder", "webdataset", "json", "csv")


def load_parquet(what: str, files: list[Path]) -> Any:
    """A `datasets.Dataset` of these files; `what` names them in messages."""
    datasets = datasets_library()
    with explained(what):
        return datasets.load_dataset("parquet", data_files=[str(f) for f in files], split="train")


def load_named(
    name: str,
    *,
    config: str | None,
    split: str,
    revision: str | None,
    data_files: str | list[str] | None,
    streaming: bool,
) -> tuple[Any, dict[str, Any]]:
    """A `datasets` (Iterable)Dataset, and what identifies its content."""
    datasets, path = datasets_library(), Path(name).expanduser()
    content: dict[str, Any] = {"config": config, "split": split, "revision": revision}
    files = data_files if data_files is None or isinstance(data_files, list) else [data_files]
    arguments = {"split": split, "revision": revision, "streaming": streaming}
    if os.path.isdir(path):
        inside = sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))
        content["files"] = files_fingerprint((os.fsencode(f.relative_to(path).as_posix()), f) for f in inside)
        with explained(str(path)):
            if kind := saved_kind(path):
                return _saved(name, split, streaming, kind, datasets.load_from_disk(str(path))), content
            return datasets.load_dataset(str(path), config, data_files=files, **arguments), content
    if looks_like_path(name):
        raise missing(path)
    content |= {"name": name, "data_files": files}
    if name in BUILDERS:
        local = [p for f in files or [] if "://" not in f for p in local_files(f)]
        remote = [f for f in files or [] if "://" in f]
        content["data_files"] = [content_hash(p) for p in local] + remote
        with explained(f"{name} data"):
            return datasets.load_dataset(name, config, data_files=[*map(str, local), *remote], **arguments), content
    unreachable = why_unreachable(name, revision)
    sentence = (
        f"The data set {name!r} cannot be reached ({unreachable or 'the connection broke off'}), no copy of "
        f"{f'its revision {revision}' if revision else 'it'} is known on this machine, and there is no folder of "
        "that name here. Connect to the network, or name a local folder or parquet file."
    )
    if unreachable and (streaming or revision):  # a copy does not say which revision it is of
        raise EnvironmentFailed(sentence)
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = bool(before or unreachable)  # straight to the local copy: no half minute of retries
    try:
        with explained(name, unreachable=sentence):
            return datasets.load_dataset(name, config, data_files=files, **arguments), content
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def saved_kind(path: Path) -> str | None:
    """Whether `save_to_disk` wrote this folder, and what: "dict" of splits or one "table"."""
    if (path / "dataset_dict.json").is_file():
        return "dict"
    return "table" if (path / "state.json").is_file() and (path / "dataset_info.json").is_file() else None


def _saved(name: str, split: str, streaming: bool, kind: str, saved: Any) -> Any:
    splits = list(saved) if kind == "dict" else [str(saved.split)] if saved.split is not None else [split]
    if split not in splits:
        raise UserError(f"{name} has no split {split!r} (it has {', '.join(splits)}). Set `split` to one of them.")
    table = saved[split] if kind == "dict" else saved
    return table.to_iterable_dataset() if streaming else table


def datasets_library() -> Any:
    """The `datasets` package, told to be quiet and to send no request of its own."""
    import datasets

    # Else every load, of local files too, sends a request that a machine without a network waits for.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what it would log, it raises too
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def why_unreachable(name: str, revision: str | None, seconds: float = 5.0) -> str | None:
    """Why the hub cannot be asked about this data set; None when it answers.

    Raises:
        UserError: it answers that there is no such set or revision.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi(endpoint=datasets_library().config.HF_ENDPOINT).dataset_info(name, revision=revision, timeout=seconds)
            outcome.append(None)
        except Exception as e:
            outcome.append(e)

    asking = threading.Thread(target=ask, daemon=True)  # name resolution has a time limit of its own, up to half a minute
    asking.start()
    asking.join(seconds)
    error = outcome[0] if outcome else TimeoutError("no answer")
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        raise UserError(
            f"There is no folder and no public data set called {name!r}. Correct the name, or log in if it is private."
        ) from error
    if isinstance(error, RevisionNotFoundError):
        raise UserError(f"The data set {name!r} has no revision {revision!r}. Name one that exists.") from error
    return None if error is None else first_line(error)


@contextmanager
def explained(what: str, unreachable: str | None = None) -> Iterator[None]:
    """Turn what `datasets` raises into one sentence."""
    try:
        yield
    except DecantError:
        raise
    except Exception as e:
        root = e
        while root.__cause__ is not None and isinstance(root.__cause__, Exception):
            root = root.__cause__
        if isinstance(root, OSError) and root.errno in (errno.ENOSPC, errno.EDQUOT):
            cache = datasets_library().config.HF_DATASETS_CACHE
            raise EnvironmentFailed(
                f"The disk is full while {what} is unpacked to {cache}. Free some space or set HF_HOME."
            ) from e
        if isinstance(root, PermissionError):
            raise EnvironmentFailed(
                f"{what} cannot be loaded: {first_line(root)}. Change the permissions, or set HF_HOME."
            ) from e
        client = type(root).__module__.split(".")[0] in ("aiohttp", "httpcore", "httpx", "httpx2", "requests", "urllib3")
        if unreachable and (client or isinstance(e, (ConnectionError, TimeoutError))):
            raise EnvironmentFailed(unreachable) from e
        raise UserError(
            f"{what} cannot be read by `datasets`: {first_line(root)}. Correct its name, split, config or files."
        ) from e


def first_line(error: Exception) -> str:
    """What an error says, as a part of a sentence."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
