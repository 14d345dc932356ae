"""What runs on a device for `decant device`: Python's standard library only, 3.9 or newer, one request a process.

It comes over ssh's stdin in front of the data, so nothing has to be installed. The request is JSON in argv[1]; the answer is the
last line of stdout: MARK and one JSON object. As long as a request works, stdin is its leash: when it ends, because the other side
stopped, died or lost the connection, whatever was started here is killed with all its children.

A connection can also be lost without a word, and then the leash holds for minutes. So every process of a run has a file in
`running`, locked as long as it or its script lives, and whoever takes the folder ends those that are left.
"""

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

MARK = "decant-device-answer-1 "
OWNER = ".decant-device"
SHA = re.compile(r"[0-9a-f]{64}")
UNFINISHED = re.compile(r"new-[a-z0-9_]{8}")  # as mkdtemp names it
PLACES = {
    "archives": re.compile(r"[0-9a-f]{64}\.(part|tar\.gz)"),
    "unpacked": re.compile(f"{SHA.pattern}|{UNFINISHED.pattern}"),
    "engines": SHA,
    "running": re.compile(r"process-[0-9]+-[0-9]+"),
}
NAME_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
CHUNK, PIECE = 1 << 20, 64 << 10  # the second is what a lost connection may cost
MOST_OUTPUT = 16 << 20
ENDS_WITHIN_S = 10.0  # a killed process


class Refused(Exception):
    """Why a request is not done, as one clause."""


class Busy(Refused):
    """The same, where asking again later helps."""


def main():
    try:
        request = json.loads(sys.argv[1])
        with listed(request):
            answer = {"ok": True, **globals()["do_" + request["do"]](request)}
    except Refused as e:
        answer = {"ok": False, "why": str(e), "again": isinstance(e, Busy)}
    except OSError as e:
        answer = {"ok": False, "why": f"{e.strerror or e}" + (f" ({e.filename})" if e.filename else "")}
    except Exception as e:  # whatever is odd on a device is said, not shown as a traceback
        answer = {"ok": False, "why": f"{type(e).__name__}: {e}"}
    say(answer)


def say(answer):
    sys.stdout.write("\n" + MARK + json.dumps(answer) + "\n")
    sys.stdout.flush()


def home(request):
    """The folder on the device; it is made if need be, and must be ours or empty."""
    folder = Path.home() / request["folder"]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / OWNER).is_file():
        if {p.name for p in folder.iterdir()} - {"lock"}:  # a `clean` may have gone through while somebody waited for the lock
            raise Refused(f"the folder {folder} holds other files; name a new one in the address")
        (folder / OWNER).write_text("made by decant device\n", encoding="ascii")
    for name in PLACES:
        (folder / name).mkdir(exist_ok=True)
    return folder


def opened_locked(path):
    """The file, made if need be and locked, or None if another process holds it. It is still the one of that name by then."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115  the lock lasts as long as it is open
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:  # whoever held it removed it
            pass
        except BlockingIOError:
            file.close()
            return None
        file.close()


@contextlib.contextmanager
def listed(request):
    """Be found in `running` by who takes the folder over; `request["record"]` is the open file. Requests without a run are not listed."""
    if "token" not in request or request["do"] == "hold":
        yield
        return
    folder = home(request)
    path = folder / "running" / f"process-{os.getpid()}-{time.time_ns()}"
    record = request["record"] = opened_locked(path)
    record.write(f"{os.uname().nodename} {os.getpid()}")
    record.flush()
    try:
        if (folder / "lock").read_text(encoding="utf-8").split()[:1] != [request["token"]]:
            raise Refused("its run has ended")
        if request["do"] in ("offer", "unpack"):  # the others read stdin themselves
            threading.Thread(target=leash, daemon=True).start()
        yield
    finally:
        path.unlink(missing_ok=True)
        record.close()


def end_left(folder):
    """End what earlier connections left at work, and remove what they left half done. The folder's lock is held."""
    for path in sorted((folder / "running").glob("process-*")):
        until = time.monotonic() + ENDS_WITHIN_S
        while (free := opened_locked(path)) is None:
            node, pid, group = (path.read_text(encoding="utf-8").split() + [""] * 3)[:3]
            for number, how in (
                ((pid, os.kill), (group, os.killpg)) if node == os.uname().nodename else ()
            ):  # a home may be shared
                if number:
                    kill(int(number), how)
            if time.monotonic() > until:
                raise Refused(f"process {pid} of an earlier run is still at work in {folder} on {node}; end it there")
            time.sleep(0.05)
        path.unlink()
        free.close()
    for path in (folder / "unpacked").glob("new-*"):
        if UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def do_hold(request):
    """Keep the folder's lock until the leash ends. What a lost connection of the same run left at work is killed."""
    folder, token = home(request), request["token"]
    end = time.monotonic() + request["wait"]
    while (lock := opened_locked(folder / "lock")) is None:
        held = (folder / "lock").read_text(encoding="utf-8").split()
        if len(held) == 2 and held[0] == token:
            kill(int(held[1]), os.kill)
        elif time.monotonic() > end:
            raise Refused(f"another `decant device` is at work in {folder}; wait for it, or name another folder")
        time.sleep(0.2)
    home(request)  # a `clean` may have removed it meanwhile
    end_left(folder)
    lock.truncate(0)
    lock.write(f"{token} {os.getpid()}")
    lock.flush()
    say({"ok": True})
    os.read(0, 1)  # returns when the leash ends
    return {}


def do_offer(request):
    """What is here of an archive: all of it, or how many bytes, and their hash."""
    folder, sha = home(request) / "archives", checked(request["sha256"])
    whole, part = folder / (sha + ".tar.gz"), folder / (sha + ".part")
    changed = whole.is_file() and hash_of(whole) != sha
    if changed:
        whole.unlink()
    if whole.is_file():
        return {"whole": True}
    if part.is_file() and part.stat().st_size > request["bytes"]:
        part.unlink()
    found = {"whole": False, "changed": changed, "bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    if part.is_file():
        found.update(bytes=part.stat().st_size, sha256=hash_of(part))
    free = shutil.disk_usage(folder).free
    if free < (need := request["bytes"] - found["bytes"] + request["unpacked"]):
        raise Refused(f"{free / 1e6:.0f} MB are free there and {need / 1e6:.0f} are needed")
    return found


def do_receive(request):
    """Append what comes on stdin to the part; when all is there, it becomes the archive if its hash is right."""
    folder, sha = home(request) / "archives", checked(request["sha256"])
    part = folder / (sha + ".part")
    with open(part, "r+b" if part.is_file() else "w+b") as file:
        locked_soon(file)
        file.truncate(request["from"])
        file.seek(request["from"])
        while piece := sys.stdin.buffer.read(PIECE):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    if size < request["bytes"]:
        return {"bytes": size}
    if hash_of(part) != sha:
        part.unlink()
        raise Refused("what arrived is not what was sent: its sha256 differs")
    os.replace(part, folder / (sha + ".tar.gz"))
    return {"bytes": size}


def locked_soon(file):
    """Lock a file that a killed process may not have left yet."""
    until = time.monotonic() + ENDS_WITHIN_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise Busy("another process still writes this archive") from None
            time.sleep(0.05)


def do_unpack(request):
    """Unpack the archive if its hash is the one asked for, and check every file by the manifest."""
    base, sha = home(request), checked(request["sha256"])
    target = base / "unpacked" / sha
    if target.is_dir() and problem(target, request["manifest_sha256"]) is None:
        return {"folder": str(target), "again": False}
    shutil.rmtree(target, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix="new-", dir=base / "unpacked"))
    try:
        with open(base / "archives" / (sha + ".tar.gz"), "rb") as file:
            if hash_of(file) != sha:
                raise Refused("the archive on the device was changed: its sha256 is not the verified one")
            file.seek(0)
            extract(file, work)
        if wrong := problem(work, request["manifest_sha256"]):
            raise Refused(wrong)
        try:
            os.replace(work, target)
        except OSError:  # another was quicker
            if problem(target, request["manifest_sha256"]) is not None:
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {"folder": str(target), "again": True}


def extract(file, folder):
    """Regular files with plain relative names, each once, and nothing else."""
    with gzip.open(file) as tar, tarfile.open(fileobj=tar, mode="r|") as archive:  # "r|gz" does not know gzip's extra field
        for member in archive:
            parts = member.name.split("/")
            if not member.isreg() or not all(NAME_PART.fullmatch(p) for p in parts):
                raise Refused(f"the archive holds {member.name[:80]!r}, which is no plain file")
            path = folder.joinpath(*parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            content = archive.extractfile(member)
            assert content is not None  # a regular file has one
            with open(path, "xb") as out:
                shutil.copyfileobj(content, out, CHUNK)


def problem(folder, manifest_sha256):
    """What of an unpacked bundle is not as verified, or None."""
    manifest = folder / "manifest.json"
    if not manifest.is_file() or hash_of(manifest) != manifest_sha256:
        return "manifest.json on the device is not the verified one"
    files = {f["path"]: f["sha256"] for f in json.loads(manifest.read_text(encoding="utf-8"))["files"]}
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}
    if strange := sorted(there - set(files) - {"manifest.json", "signature.json"}):
        return f"{strange[0]} on the device is not part of the bundle"
    for name, sha in files.items():
        if not (folder / name).is_file() or hash_of(folder / name) != sha:
            return f"{name} on the device is missing or was changed"
    return None


def do_work(request):
    """Run one of the bundle's scripts, after all of its files were checked again -> exit code, seconds, stdout; stderr passes through."""
    base, sha = home(request), checked(request["sha256"])
    folder = base / "unpacked" / sha
    if wrong := problem(folder, request["manifest_sha256"]):
        raise Refused(wrong)
    engines = base / "engines" / sha
    engines.mkdir(exist_ok=True)
    if not (folder / request["script"]).is_file():
        return {"absent": True}
    # Not isolated (-I): a device's runtimes often lie in the user's packages, or where PYTHONPATH of the device file says.
    arguments = [a.replace("{engines}", str(engines)) for a in request["arguments"]]
    command = [sys.executable, "-B", str(folder / request["script"]), *arguments]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **request["env"]}
    start, late = time.monotonic(), False
    record = request.get("record")
    with tempfile.TemporaryFile() as out:
        child = subprocess.Popen(
            command,
            cwd=str(base),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=sys.stderr,
            start_new_session=True,
            # It keeps its run's record locked, and is in it before it is the script: whoever takes over ends it, too.
            pass_fds=[record.fileno()] if record else [],
            preexec_fn=(lambda: os.write(record.fileno(), f" {os.getpid()}".encode())) if record else None,
        )
        threading.Thread(target=leash, args=(child.pid,), daemon=True).start()
        try:
            code = child.wait(timeout=request["limit"])
        except subprocess.TimeoutExpired:
            late, code = True, None
        if late:
            end(child.pid)
        kill(child.pid, os.killpg)  # what a script started and left behind, too
        child.wait()
        out.seek(0)
        text = out.read(MOST_OUTPUT + 1)
    if len(text) > MOST_OUTPUT:
        raise Refused("{} printed more than {} MB".format(request["script"], MOST_OUTPUT >> 20))
    found = {"code": code, "late": late, "seconds": time.monotonic() - start, "stdout": text.decode("utf-8", "replace")}
    return {**found, "has_engines": (engines / "engines.json").is_file()}


def leash(group=None):
    os.read(0, 1)  # not sys.stdin, whose lock would be held while Python ends
    if group is not None:
        end(group)
    os._exit(1)


def end(group):
    """Ask a script and all its children to end, then make them."""
    kill(group, os.killpg, signal.SIGTERM)
    time.sleep(1)
    kill(group, os.killpg)


def kill(number, how, sign=signal.SIGKILL):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        how(number, sign)


def do_about(request):
    """What is on this machine; the bundles' machine.py, which says it, was sent in front of this file."""
    near = Path.home() / request["folder"]
    while not near.exists():
        near = near.parent
    pillow = globals()["version"]("PIL")
    return {
        "about": {
            **globals()["machine"](),
            **({"pillow": pillow} if pillow else {}),
            "free_gb": round(shutil.disk_usage(near).free / 1e9, 1),
        }
    }


def do_clean(request):
    """Remove what was put here and nothing else -> bytes."""
    folder, freed = Path.home() / request["folder"], 0
    if not (folder / OWNER).is_file():
        return {"bytes": 0}
    lock = opened_locked(folder / "lock")
    if lock is None:
        raise Refused(f"another `decant device` is at work in {folder}; wait for it")
    with lock:
        end_left(folder)
        for place, pattern in PLACES.items():
            for path in sorted((folder / place).iterdir()) if (folder / place).is_dir() else []:
                if pattern.fullmatch(path.name):
                    freed += sum(p.lstat().st_size for p in [path, *path.rglob("*")] if not p.is_dir())
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            if (folder / place).is_dir() and not any((folder / place).iterdir()):
                (folder / place).rmdir()
        if {p.name for p in folder.iterdir()} <= {OWNER, "lock"}:
            for name in (OWNER, "lock"):
                (folder / name).unlink()
            with contextlib.suppress(OSError):  # somebody who waited for the lock begins anew
                folder.rmdir()
    return {"bytes": freed}


def checked(sha):
    if not SHA.fullmatch(sha):
        raise Refused("a bundle is named by its sha256")
    return sha


def hash_of(file):
    """sha256 of a path, or of an open file from where it stands."""
    if isinstance(file, Path):
        with open(file, "rb") as opened:
            return hash_of(opened)
    digest = hashlib.sha256()
    while piece := file.read(CHUNK):
        digest.update(piece)
    return digest.hexdigest()


main()
