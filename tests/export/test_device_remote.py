"""The script that runs on a device, by itself: connections that were lost without a word, races, and what it removes."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from device_lab import beside_selftest, gone, waited
from tiny_bundle import tiny_artifacts, tiny_bundle

from distill.files import sha256_file
from export.bundle import BundleConfig
from export.bundling.verify import verify
from export.devices.ssh import MARK, REMOTE

START = "import sys;exec(compile(sys.stdin.buffer.read({}),'remote.py','exec'))"


class Request:
    """A request whose connection is in our hands: it lasts until `answer` closes it."""

    def __init__(self, home: Path, do: str, data: bytes = b"", **more):
        script = REMOTE.read_bytes()
        home.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-B", "-c", START.format(len(script)), json.dumps({"do": do, "folder": "decant-device", **more})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "HOME": str(home)},
        )  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(script + data)
        self.process.stdin.flush()

    def first(self) -> dict:
        """The first answer, of a request that goes on."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        raise AssertionError("it ended without an answer")

    def answer(self) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.close()
        found = self.first()
        self.process.wait(20)
        return found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    return tiny_bundle(folder, tiny_artifacts(folder, ["onnx-fp32"]), BundleConfig(golden_images=1))


@pytest.fixture
def verified(bundle) -> dict[str, str]:
    return {"sha256": sha256_file(bundle), "manifest_sha256": verify(bundle).manifest_sha256}


def received(home: Path, bundle: Path, **more) -> dict:
    data = bundle.read_bytes()
    about = {"sha256": sha256_file(bundle), "bytes": len(data), "from": 0, **more}
    return Request(home, "receive", data, **about).answer()


def test_a_receiver_of_a_stalled_connection_makes_room_for_the_next(bundle, tmp_path):
    data, home = bundle.read_bytes(), tmp_path / "home"
    about = {"sha256": sha256_file(bundle), "bytes": len(data), "from": 0, "token": "t"}
    first = Request(home, "hold", token="t", wait=5)
    assert first.first() == {"ok": True}
    stalled = Request(home, "receive", data[:200_000], **about)
    part = home / "decant-device/archives" / f"{about['sha256']}.part"
    while not part.is_file() or not part.stat().st_size:
        pass
    again = Request(home, "hold", token="t", wait=5)
    assert again.first() == {"ok": True}
    assert gone(first.process.pid)
    assert gone(stalled.process.pid)
    assert Request(home, "receive", data, **about).answer() == {"ok": True, "bytes": len(data)}
    assert [p.name for p in (home / "decant-device/running").iterdir()] == []
    again.answer()


def test_a_script_of_a_stalled_connection_is_ended_before_the_next_begins(bundle, verified, tmp_path):
    home = tmp_path / "home"
    assert received(home, bundle)["ok"]
    assert Request(home, "unpack", **verified).answer()["again"]
    lines = f"if not os.fork():\n    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    work = {"script": "bench.py", "arguments": [], "limit": 600, "env": beside_selftest(tmp_path / "site", lines, "bench.py")}
    first = Request(home, "hold", token="t", wait=5)
    first.first()
    stalled = Request(home, "work", token="t", **work, **verified)
    pid = int(waited(tmp_path / "pid"))
    again = Request(home, "hold", token="t", wait=5)
    assert again.first() == {"ok": True}
    assert gone(pid, 0.5)
    assert gone(stalled.process.pid, 0.5)
    late = Request(home, "work", token="another", **work, **verified).answer()
    assert (late["ok"], late["why"]) == (False, "its run has ended")
    again.answer()


def test_a_script_whose_parent_was_killed_is_ended_too(bundle, verified, tmp_path):
    home = tmp_path / "home"
    received(home, bundle)
    Request(home, "unpack", **verified).answer()
    lines = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    work = {"script": "bench.py", "arguments": [], "limit": 600, "env": beside_selftest(tmp_path / "site", lines, "bench.py")}
    hold = Request(home, "hold", token="t", wait=5)
    hold.first()
    request = Request(home, "work", token="t", **work, **verified)
    pid = int(waited(tmp_path / "pid"))
    request.process.kill()
    hold.answer()
    assert Request(home, "hold", token="u", wait=5).answer() == {"ok": True}
    assert gone(pid, 0.5)


def test_unpacking_twice_at_once(bundle, verified, tmp_path):
    home = tmp_path / "home"
    received(home, bundle)
    places = home / "decant-device/unpacked"
    slow = Request(home, "unpack", **verified)
    while not any(places.iterdir()):
        pass
    slow.process.send_signal(signal.SIGSTOP)
    assert Request(home, "unpack", **verified).answer()["ok"]
    slow.process.send_signal(signal.SIGCONT)
    assert slow.answer()["ok"]
    assert [p.name for p in places.iterdir()] == [verified["sha256"]]


def test_an_unpacking_that_loses_its_connection_ends_and_leaves_nothing_for_long(bundle, verified, tmp_path):
    home = tmp_path / "home"
    received(home, bundle)
    hold = Request(home, "hold", token="t", wait=5)
    hold.first()
    places = home / "decant-device/unpacked"
    (places / "new-abcdefgh").mkdir()
    (places / "new-of-mine").mkdir()
    lost = Request(home, "unpack", token="t", **verified)
    while len(list(places.iterdir())) < 3:
        pass
    lost.process.send_signal(signal.SIGSTOP)
    assert lost.process.stdin is not None
    lost.process.stdin.close()
    lost.process.send_signal(signal.SIGCONT)
    assert gone(lost.process.pid)
    hold.answer()
    assert Request(home, "hold", token="u", wait=5).answer() == {"ok": True}
    assert {p.name for p in places.iterdir()} - {verified["sha256"]} == {"new-of-mine"}


def test_a_lock_file_that_was_removed_is_no_lock(tmp_path):
    home = tmp_path / "home"
    first = Request(home, "hold", token="a", wait=0)
    first.first()
    waiting = Request(home, "hold", token="b", wait=20)
    waited(home / "decant-device/lock")
    waiting.process.send_signal(signal.SIGSTOP)
    first.answer()
    assert Request(home, "clean").answer()["ok"]
    assert not (home / "decant-device").exists()
    waiting.process.send_signal(signal.SIGCONT)
    assert waiting.first() == {"ok": True}
    third = Request(home, "hold", token="c", wait=0).answer()
    assert "another `decant device` is at work" in third["why"]
    assert waiting.answer() == {"ok": True}


def test_clean_removes_only_what_bears_our_names(tmp_path):
    home = tmp_path / "home"
    Request(home, "offer", sha256="0" * 64, bytes=1, unpacked=1).answer()
    ours = home / "decant-device"
    mine = [ours / "archives/new-abcdefgh", ours / "engines/new-abcdefgh", ours / "unpacked/new-thesis-2"]
    for path in [*mine, ours / "unpacked/new-abcdefgh", ours / "unpacked" / ("a" * 64)]:
        path.mkdir()
    assert Request(home, "clean").answer()["ok"]
    assert sorted(p for place in ("archives", "engines", "unpacked") for p in (ours / place).iterdir()) == sorted(mine)


def test_any_error_there_comes_home_as_a_clause(bundle, verified, tmp_path):
    home = tmp_path / "home"
    received(home, bundle)
    Request(home, "unpack", **verified).answer()
    manifest = home / "decant-device/unpacked" / verified["sha256"] / "manifest.json"
    manifest.write_text("{}")
    wrong = {**verified, "manifest_sha256": sha256_file(manifest)}
    found = Request(home, "work", script="bench.py", arguments=[], env={}, limit=1, **wrong).answer()
    assert (found["ok"], found["why"]) == (False, "KeyError: 'files'")
    damaged = tmp_path / "damaged.tar.gz"
    with tarfile.open(damaged, "w:gz") as tar:
        tar.add(bundle, "a")
    damaged.write_bytes(damaged.read_bytes()[:5000])
    received(home, damaged)
    found = Request(home, "unpack", sha256=sha256_file(damaged), manifest_sha256="0" * 64).answer()
    assert found["ok"] is False
    assert "Error" in found["why"]
