"""Files of the rebuild kit: engines and their list, whole or absent, one build at a time. Used by build_engine.py and selftest.py."""

import contextlib
import hashlib
import importlib
import json
import os
import platform

INDEX, FORMAT = "engines.json", "decant-engines-1"
NEEDED = {
    *("path", "sha256", "bytes", "target", "onnx", "onnx_sha256"),
    *("runtime", "versions", "compute_capabilities", "system", "machine"),
}


class Failed(Exception):
    """Why an engine was not built, in one sentence."""


def read_index(folder):
    """The engines that DIR/engines.json lists; none where it is missing or not readable."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        known = [e for e in index["engines"] if set(e) >= NEEDED and isinstance(e["path"], str)]
        return known if index["format"] == FORMAT else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def up_to_date(folder, path, asked):
    """The entry of an engine that would come out the same, whose file is whole; None otherwise."""
    for entry in read_index(folder):
        if folder / entry["path"] == path and all(entry.get(k) == v for k, v in asked.items()):
            return entry if path.is_file() and sha256_file(path) == entry["sha256"] else None
    return None


def record(folder, engine):
    """Put an engine into DIR/engines.json, which is whole at any time."""
    engines = sorted([e for e in read_index(folder) if e["path"] != engine["path"]] + [engine], key=lambda e: e["path"])
    text = json.dumps({"format": FORMAT, "engines": engines}, indent=2, sort_keys=True) + "\n"
    with replacing(folder / INDEX) as part:
        part.write_text(text, encoding="utf-8")


def engine_artifacts(manifest, folder, target=None):
    """For selftest.py: engines of DIR -> (check, artifact as in the manifest) or (check, why it is refused).

    An engine counts only if it was built from the file that this manifest names and is the file that engines.json names.
    """
    if not read_index(folder):
        yield "engines", f"{folder} holds no {INDEX} that lists engines; run build_engine.py first"
    artifacts = {a["target"]: a for a in manifest["artifacts"]}
    sources = {f["path"]: f for f in manifest.get("rebuild", {}).get("files", [])}
    for engine in read_index(folder):
        if target not in (None, engine["target"]):
            continue
        check, source, path = f"engines/{engine['path']}", sources.get(engine["onnx"]), folder / engine["path"]
        if source is None or engine["onnx_sha256"] != source["sha256"]:
            yield check, "it was built from another ONNX file than this bundle's; run build_engine.py again"
        elif not inside(path, folder) or not path.is_file() or sha256_file(path) != engine["sha256"]:
            yield check, f"it is missing, or not the file that {INDEX} names; run build_engine.py again"
        else:
            artifact = artifacts[source["target"]]
            (like,) = (f for f in artifact["files"] if f["resolution"] == source["resolution"])
            tolerance = {k: source[k] for k in ("cosine_min", "max_abs")}
            file = {k: like[k] for k in ("resolution", "inputs", "outputs")}
            file.update(path=str(path.resolve()), sha256=engine["sha256"], expected={**like["expected"], **tolerance})
            runtime = engine["runtime"]
            needs = {"systems": [engine["system"]], "machines": [engine["machine"]], "built_with": engine["versions"]}
            needs.update(runtime=runtime, compute_capabilities=engine["compute_capabilities"])
            engine = {"runtime": runtime, "target": check, "files": [file], "compatibility": needs}
            yield check, {**artifact, **engine, "rebuilt_from": source["target"]}


@contextlib.contextmanager
def replacing(path, required=True):
    """A file beside `path` that takes its name when all went well and is gone when not."""
    part = path.with_name(f".part-{path.name}")
    part.unlink() if part.exists() else None
    try:
        yield part
        if required or part.is_file():
            with open(part, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(part, path)
    finally:
        if part.exists():
            part.unlink()


@contextlib.contextmanager
def locked(folder):
    """One build at a time in a folder; the lock ends with the process."""
    with open(folder / ".lock", "a+b") as f:
        try:
            if platform.system() == "Windows":
                importlib.import_module("msvcrt").locking(f.fileno(), 2, 1)  # 2: LK_NBLCK
            else:
                fcntl = importlib.import_module("fcntl")
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Failed(f"another build runs in {folder}; wait for it or name another --out") from None
        yield


def inside(path, folder):
    return folder.resolve() in path.resolve().parents


def sha256_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
