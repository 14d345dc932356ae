"""A bundle on devices over a real sshd on the loopback."""

import contextlib
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from device_lab import QUIET, Sshd, beside_selftest, device, gone, waited
from tiny_bundle import tiny_artifacts, tiny_bundle

from distill.files import sha256_file
from export.bundle import BundleConfig
from export.bundling.verify import verify
from export.devices import ssh as ssh_module
from export.devices import transfer
from export.devices.fleet import DeviceRun, Job, run_fleet
from export.devices.ssh import Lost, Ssh

FAST = ("--seconds", "0.02", "--openings", "3", "--rounds", "2")


@pytest.fixture(scope="module")
def sshd(tmp_path_factory):
    server = Sshd(tmp_path_factory.mktemp("sshd") / "etc")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def job(sshd, tmp_path_factory) -> Job:
    folder = tmp_path_factory.mktemp("bundle")
    bundle = tiny_bundle(folder, tiny_artifacts(folder, ["onnx-fp32"]), BundleConfig(golden_images=2))
    return Job(verify(bundle), sha256_file(bundle), "students/small", FAST, sshd.config, backoff=0.01)


def there(sshd: Sshd, folder: Path, name: str = "one", **more):
    return device(name, **more).model_copy(update={"on": sshd.address(folder)})


def test_round_trip_beside_a_device_that_is_not_there(sshd, job, tmp_path):
    dead = device("dead").model_copy(update={"on": f"ssh://{sshd.user}@127.0.0.1:1/x"})
    good, lost = run_fleet(job, [there(sshd, tmp_path / "device"), dead], tmp_path / "out", QUIET)
    assert (good.status, good.reason) == ("done", None)
    assert lost.status == "unreachable"
    assert "refused" in str(lost.reason)
    assert any(r.metric == "latency_p50_ms" and r.status == "measured" for r in good.rows)


def test_an_interrupted_copy_goes_on_where_it_broke_off(sshd, job, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "PIECE", 4096)
    config = there(sshd, tmp_path / "device")
    ssh = Ssh(config.address(), config.python, job.config, tmp_path / "log", tmp_path)
    path, unpacked, sent = job.bundle.path, job.bundle.unpacked, []

    def cut(n: int) -> None:
        sent.append(n)
        if len(sent) == 80:
            for process in list(ssh.running):
                process.kill()

    task = type(
        "Task", (), {"__enter__": lambda self: self, "__exit__": lambda self, *e: None, "advance": lambda self, n: cut(n)}
    )
    progress = type("Progress", (), {"task": lambda self, *a: task(), "say": print})()
    with pytest.raises(Lost):
        transfer.copy(ssh, path, job.sha256, unpacked, progress, "one")
    size = path.stat().st_size
    assert 0 < transfer.copy(ssh, path, job.sha256, unpacked, progress, "one") < size
    assert transfer.copy(ssh, path, job.sha256, unpacked, progress, "one") == 0


def test_a_device_that_disappears_in_the_middle_ends_its_work_and_is_tried_again(sshd, job, tmp_path):
    pid_file = str(tmp_path / "pid")
    once = f"if not os.path.exists({pid_file!r}):\n    open({pid_file!r}, 'w').write(str(os.getpid()))\n    time.sleep(600)"
    config = there(sshd, tmp_path / "device", env=beside_selftest(tmp_path / "site", once))
    run = DeviceRun(job, config, tmp_path / "out", tmp_path, QUIET)
    thread = threading.Thread(target=run.run)
    thread.start()
    pid = int(waited(tmp_path / "pid"))
    assert sshd.drop() >= 1
    assert gone(pid)
    thread.join(60)
    assert (run.outcome.status, run.outcome.reason) == ("done", None)


class Stalling:
    """A way to an sshd that can fall silent: connections stay open and nothing passes any more, as when a cable is pulled."""

    def __init__(self, port: int):
        self.target, self.pairs, self.silent = port, [], set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def stall(self) -> None:
        """From here on nothing passes through the connections that there are."""
        self.silent.update(range(len(self.pairs)))

    def _serve(self) -> None:
        while True:
            near, far = self.listener.accept()[0], socket.create_connection(("127.0.0.1", self.target))
            self.pairs.append((near, far))
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(*pair, len(self.pairs) - 1), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(8192):
                if number in self.silent:
                    return
                sink.sendall(piece)
        if number not in self.silent:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


def test_a_connection_that_is_lost_without_a_word_leaves_nothing_beside_the_next(sshd, job, tmp_path, monkeypatch):
    monkeypatch.setattr(ssh_module, "ALIVE_S", 1)
    way, pid_file = Stalling(sshd.port), str(tmp_path / "pid")
    once = f"if not os.path.exists({pid_file!r}):\n    open({pid_file!r}, 'w').write(str(os.getpid()))\n    time.sleep(600)"
    client = tmp_path / "client"
    client.write_text(f"{sshd.config.read_text()}HostKeyAlias [127.0.0.1]:{sshd.port}\n")
    env = beside_selftest(tmp_path / "site", once, "bench.py")
    address = sshd.address(tmp_path / "device").replace(f":{sshd.port}/", f":{way.port}/")
    run = DeviceRun(
        replace(job, config=client),
        device("one", env=env).model_copy(update={"on": address}),
        tmp_path / "out",
        tmp_path,
        QUIET,
    )
    thread = threading.Thread(target=run.run)
    thread.start()
    pid = int(waited(tmp_path / "pid"))
    way.stall()
    thread.join(120)
    assert (run.outcome.status, run.outcome.reason) == ("done", None)
    assert gone(pid, 0.5)


def test_stopping_here_ends_the_work_there(sshd, job, tmp_path):
    lines = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    config = there(sshd, tmp_path / "device", env=beside_selftest(tmp_path / "site", lines))
    run = DeviceRun(job, config, tmp_path / "out", tmp_path, QUIET)
    thread = threading.Thread(target=run.run)
    thread.start()
    pid = int(waited(tmp_path / "pid"))
    run.ssh.stop()
    thread.join(20)
    assert run.outcome.status == "stopped"
    assert gone(pid)


def test_a_key_that_is_not_known_there_is_said_at_once(sshd, job, tmp_path):
    stranger = Job(job.bundle, job.sha256, job.subject, FAST, sshd.client("stranger"), backoff=60.0)
    (outcome,) = run_fleet(stranger, [there(sshd, tmp_path / "device")], tmp_path / "out", QUIET)
    assert outcome.status == "unreachable"
    assert "Permission denied" in str(outcome.reason)


def test_a_host_with_another_key_is_not_spoken_to(sshd, job, tmp_path):
    other = sshd.folder / "other.config"
    other.write_text(sshd.config.read_text().replace(str(sshd.folder / "known"), str(sshd.folder / "unknown")))
    changed = Job(job.bundle, job.sha256, job.subject, FAST, other, backoff=60.0)
    (outcome,) = run_fleet(changed, [there(sshd, tmp_path / "device")], tmp_path / "out", QUIET)
    assert "Host key verification failed" in str(outcome.reason)
    assert not (tmp_path / "device").exists()
