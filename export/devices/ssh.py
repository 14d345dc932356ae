"""Requests to a device through the system's own `ssh`: keys, agents, jump hosts and aliases are those that `ssh HOST` uses.

Every request sends the stand-alone script of export/templates/device/remote.py over stdin and runs it with the device's Python; stdin
stays open as the leash on which the work hangs. Nothing is ever asked for at the terminal.
"""

import contextlib
import json
import os
import shlex
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from export.bundling.archive import shown
from export.devices.address import Address
from export.devices.answers import read_answer

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"
REMOTE, MACHINE = TEMPLATES / "device" / "remote.py", TEMPLATES / "bundle" / "machine.py"
MARK = b"decant-device-answer-1 "
CONNECT_S, ALIVE_S, ALIVE_COUNT = 10, 5, 3
GRACE_S = 30.0  # what a request may take beyond its own limit, which the device keeps
MOST_ANSWER = 64 << 20
MOST_ERRORS, TAIL = 4 << 20, 64 << 10  # bytes of a request's stderr that are logged, and of its end that are looked at
LOST = 255  # ssh's own exit code for whatever is wrong with the connection
HOPELESS = ("permission denied", "host key verification failed", "bad configuration option", "too many authentication failures")


class DeviceFailed(Exception):
    """Why a device does not do what it was asked, as a clause. Asking again does not help.

    told: the same for reports; None: what telling.py leaves of it.
    """

    def __init__(self, why: str, told: str | None = None):
        super().__init__(why)
        self.told = told


class Unreachable(DeviceFailed):
    """No connection, and no prospect of one."""


class Lost(Exception):
    """The connection broke, or was not made this time."""


class Stopped(Exception):
    """The user wants it to end."""


class Ssh:
    """One device's connection.

    Args:
        python: its Python, a name or a path there.
        config: a configuration file for ssh in place of the user's.
        log: gets what the device writes to stderr.
        sockets: a short-named folder for the shared connection.
    """

    def __init__(self, address: Address, python: str, config: Path | None, log: Path, sockets: Path):
        self.address, self.python, self.config, self.log = address, python, config, log
        self.token: str | None = None  # of the run that holds the device's folder
        self.answered = False  # so far
        self.socket = sockets / uuid.uuid4().hex[:8]
        self.stopped = threading.Event()
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen] = set()
        self.log.parent.mkdir(parents=True, exist_ok=True)

    def command(self, request: dict[str, Any], master: bool, script: bytes) -> list[str]:
        """The whole ssh command of a request."""
        a = self.address
        options = {
            "BatchMode": "yes",
            "ConnectTimeout": CONNECT_S,
            "ServerAliveInterval": ALIVE_S,
            "ServerAliveCountMax": ALIVE_COUNT,
            "ControlMaster": "yes" if master else "no",  # who cannot share the master's connection makes its own
            "ControlPath": '"{}"'.format(str(self.socket).replace("%", "%%")),  # read as a line of ssh's configuration
            "ControlPersist": "no",  # with the master ends everything, on the device too
            "ClearAllForwardings": "yes",
            "ForwardAgent": "no",
            "ForwardX11": "no",
            "PermitLocalCommand": "no",
            "RequestTTY": "no",
        }
        command = ["ssh", "-T", *(["-F", str(self.config)] if self.config else [])]
        command += [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        command += ["-l", a.user] if a.user else []
        command += ["-p", str(a.port)] if a.port else []
        start = f"import sys;sys.path[:]=filter(None,sys.path);exec(compile(sys.stdin.buffer.read({len(script)}),'remote.py','exec'))"
        isolated = [] if request["do"] == "about" else ["-I"]  # runtimes are often among the user's own packages
        env = [f"{k}={v}" for k, v in request.get("env", {}).items()] if request["do"] == "about" else []
        remote = [
            *(["env", *env] if env else []),
            self.python,
            *isolated,
            "-B",
            "-c",
            start,
            json.dumps(request | {"folder": a.folder}),
        ]
        return [*command, "--", a.host, shlex.join(remote)]

    def ask(self, do: str, timeout: float = 120.0, send: Callable[[Any], None] | None = None, **request: Any) -> dict:
        """Do one request -> its answer.

        Args:
            timeout: seconds until the connection counts as lost.
            send: writes the data that follow.

        Raises:
            DeviceFailed, Unreachable, Lost, Stopped.
        """
        run = {"token": self.token} if self.token else {}
        with self.started({"do": do, **run, **request}, master=False) as (process, errors):
            assert process.stdin is not None
            timer = threading.Timer(timeout, end, [process])
            timer.start()
            try:
                if send is not None:
                    with contextlib.suppress(
                        BrokenPipeError, ConnectionResetError, ValueError
                    ):  # the answer, or its absence, says why
                        send(process.stdin)
                        process.stdin.close()
                assert process.stdout is not None
                output = process.stdout.read(MOST_ANSWER + 1)
                if len(output) > MOST_ANSWER:
                    raise DeviceFailed(f"it answers with more than {MOST_ANSWER >> 20} MB")
                process.wait()
            finally:
                timer.cancel()
            return self.answer(do, process.returncode, output, errors())

    @contextlib.contextmanager
    def held(self, token: str, wait: float = 10.0) -> Iterator[None]:
        """Hold the lock of the device's folder, and the connection that all requests inside share.

        token: names the run; what an earlier connection of the same run left at work there is ended.
        wait: seconds to wait for another run.
        """
        with self.started({"do": "hold", "token": token, "wait": wait}, master=True) as (process, errors):
            assert process.stdout is not None
            timer = threading.Timer(CONNECT_S + GRACE_S, end, [process])
            timer.start()
            line, read = b"", 0
            while not line.startswith(MARK) and read < MOST_ANSWER and (line := process.stdout.readline(1 << 16)):
                read += len(line)
            timer.cancel()
            if read >= MOST_ANSWER:
                raise DeviceFailed(f"it answers with more than {MOST_ANSWER >> 20} MB")
            self.answer("hold", 0 if line.startswith(MARK) else process.wait(), line, errors())
            self.token = token
            try:
                yield
            finally:
                self.token = None

    @contextlib.contextmanager
    def started(self, request: dict[str, Any], master: bool) -> Iterator[tuple[subprocess.Popen, Callable[[], str]]]:
        """ssh at work, the script already sent; it is ended, and with it the work on the device, when the context is left."""
        if self.stopped.is_set():
            raise Stopped
        script = REMOTE.read_bytes() if request["do"] != "about" else MACHINE.read_bytes() + b"\n" + REMOTE.read_bytes()
        try:
            process = subprocess.Popen(
                self.command(request, master, script),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise Unreachable(
                "there is no `ssh` on this machine; install OpenSSH's client", "it could not be reached"
            ) from None
        with self.lock:
            self.running.add(process)
        said = Errors(process, self.log)
        try:
            if self.stopped.is_set():
                raise Stopped
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                process.stdin.write(script)
                process.stdin.flush()
            yield process, said.tail
        finally:
            with self.lock:
                self.running.discard(process)
            process.kill()
            process.wait()
            said.tail()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()

    def stop(self) -> None:
        """End whatever runs, and let nothing begin. From any thread."""
        with self.lock:
            self.stopped.set()
            for process in self.running:
                end(process)

    def answer(self, do: str, code: int, output: bytes, errors: str) -> dict[str, Any]:
        """What came back, read."""
        if self.stopped.is_set():
            raise Stopped
        said = shown((errors.strip().splitlines() or [f"ssh ended with {code}"])[-1])
        marked = [line for line in output.split(b"\n") if line.startswith(MARK)]
        if marked and code == 0:
            self.answered = True
            try:
                found = read_answer(do, marked[-1][len(MARK) :])
            except ValueError as e:
                raise DeviceFailed(f"its answer to `{do}` is none that this version reads: {e}") from e
            if found["ok"]:
                return found
            why = shown(str(found.get("why")))
            raise Lost(why) if found.get("again") is True else DeviceFailed(why)
        if code == LOST and any(
            word in said.lower() for word in HOPELESS
        ):  # of the last line: what the device wrote is before it
            why = f"ssh cannot log in ({said}); `ssh {self.address.host}` must work without a question"
            raise Unreachable(why, "ssh could not log in")
        if (
            code == LOST and not self.answered and "could not resolve hostname" in said.lower()
        ):  # later it is a network's hiccup
            raise Unreachable(f"no host has its name ({said}); correct the address", "its name led to no host")
        if code in (126, 127):
            why = f"it has no {shown(self.python)} ({said}); name its Python with --python"
            raise DeviceFailed(why, "the Python that was named is not there")
        if code > 0 and code != LOST:
            why = f"its Python ended with {code} ({said}); 3.9 or newer is needed"
            raise DeviceFailed(why, f"its Python ended with {code}")
        raise Lost(said)


class Errors:
    """What an ssh writes to stderr goes to the log, up to a limit, and its end is kept.

    A thread reads it, for as long as anyone has it open: who inherits stderr may outlive the request, so nobody waits for that.
    """

    def __init__(self, process: subprocess.Popen, log: Path):
        self.process, self.log, self.end = process, log, b""
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        room = MOST_ERRORS
        with self.process.stderr as stderr, contextlib.suppress(OSError), open(self.log, "ab", buffering=0) as log:
            while piece := os.read(stderr.fileno(), 1 << 16):
                self.end = (self.end + piece)[-TAIL:]
                if room > 0:
                    log.write(piece[:room] if len(piece) <= room else piece[:room] + b"\n[and more]\n")
                room -= len(piece)

    def tail(self) -> str:
        """The last of it, once ssh has ended."""
        if self.process.poll() is not None:
            self.thread.join(1.0)
        return self.end.decode("utf-8", "replace")


def end(process: subprocess.Popen) -> None:
    """Kill an ssh, and drop the leash, whoever else holds the other end."""
    process.kill()
    with contextlib.suppress(OSError, ValueError):
        assert process.stdin is not None
        process.stdin.close()


@contextlib.contextmanager
def sockets() -> Iterator[Path]:
    """A folder for shared connections: its name is short, as a socket's path may have some 100 bytes."""
    with tempfile.TemporaryDirectory(prefix="dd-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
