"""Devices to test with: a fake `ssh` that runs the command here, and a real sshd on the loopback."""

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.progress import Progress
from export.devices.config import DeviceConfig

QUIET = Progress("quiet")
FAKE = """#!{python}
import json, os, shlex, subprocess, sys
host, command = sys.argv[sys.argv.index("--") + 1 :]
lab = {lab!r}
request = json.loads(shlex.split(command)[-1])
with open(lab + "/asked.jsonl", "a") as f:
    f.write(json.dumps(dict(request, host=host)) + chr(10))
if host == "dead":
    sys.exit(print("ssh: connect to host dead port 22: No route to host", file=sys.stderr) or 255)
if host == "nowhere":
    sys.exit(print("ssh: Could not resolve hostname nowhere: Name or service not known", file=sys.stderr) or 255)
if host == "locked":
    sys.exit(print("me@locked: Permission denied (publickey).", file=sys.stderr) or 255)
os.environ["HOME"] = lab + "/" + host
os.makedirs(os.environ["HOME"], exist_ok=True)
cut = lab + "/cut-" + request["do"]
if not os.path.exists(cut):
    sys.exit(subprocess.run(["sh", "-c", command]).returncode)  # no exec: killed as ssh is, the device's process goes on
left = int(open(cut).read())
os.remove(cut)
child = subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE)
while left > 0 and (piece := os.read(0, min(left, 4096))):
    child.stdin.write(piece)
    left -= len(piece)
child.stdin.close()
child.wait()
sys.exit(255)
"""


class Lab:
    """A folder with a fake ssh; each host has its home there.

    Writing a number to `cut-DO` breaks the next connection that does DO after so many bytes.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "ssh").write_text(FAKE.format(python=sys.executable, lab=str(folder)))
        (folder / "bin" / "ssh").chmod(0o755)

    def asked(self, do: str | None = None) -> list[dict]:
        path = self.folder / "asked.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [r for r in found if do in (None, r["do"])]

    def home(self, host: str) -> Path:
        return self.folder / host / "decant-device"


def device(host: str, **more) -> DeviceConfig:
    return DeviceConfig(name=host, on=f"ssh://{host}", **{"python": sys.executable, **more})


def beside_selftest(folder: Path, lines: str, script: str = "selftest.py") -> dict[str, str]:
    """Environment in which Python, before it runs a script of the bundle, runs `lines`."""
    folder.mkdir(exist_ok=True)
    body = "".join(f"    {line}\n" for line in lines.splitlines())
    text = f"import sys\nif any(a.endswith({script!r}) for a in sys.orig_argv):\n    import json, os, time\n{body}"
    (folder / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": str(folder)}


def without(folder: Path, *modules: str) -> dict[str, str]:
    """Environment in which Python finds no such modules."""
    folder.mkdir()
    found = f"None if name in {modules!r} else real(name, *more)"
    text = f"import importlib.util as u\nreal = u.find_spec\nu.find_spec = lambda name, *more: {found}\n"
    (folder / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": str(folder)}


def gone(pid: int, seconds: float = 15.0) -> bool:
    """Whether a process ends within some time; one that nobody waited for counts as ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def waited(path: Path, seconds: float = 30.0) -> str:
    """The text of a file that appears within some time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.is_file() and (text := path.read_text()):
            return text
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


class Sshd:
    """A real sshd on a free port of the loopback, with keys of its own.

    Attributes:
        config: for `ssh -F`: its key and known host. address: of a folder for a device.
    """

    def __init__(self, folder: Path):
        binary = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
        if binary is None or not all(map(shutil.which, ("ssh", "ssh-keygen"))):
            pytest.skip("there is no sshd here (Debian: openssh-server)")
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.user = folder, getpass.getuser()
        folder.mkdir(parents=True, mode=0o700)
        for name in ("host", "user", "stranger"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        shutil.copy(folder / "user.pub", folder / "authorized")
        settings = {
            "Port": self.port, "ListenAddress": "127.0.0.1", "HostKey": folder / "host", "AuthorizedKeysFile": folder / "authorized",
            "StrictModes": "no", "UsePAM": "no", "PasswordAuthentication": "no", "PidFile": folder / "pid", "MaxStartups": 100,
        }  # fmt: skip
        (folder / "sshd_config").write_text("".join(f"{k} {v}\n" for k, v in settings.items()))
        (folder / "known").write_text(f"[127.0.0.1]:{self.port} {(folder / 'host.pub').read_text()}")
        self.config = self.client("user")
        with open(folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                [binary, "-D", "-e", "-f", folder / "sshd_config"], stdin=subprocess.DEVNULL, stderr=log
            )
        end = time.monotonic() + 20
        while self.process.poll() is None and time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        self.stop()
        pytest.skip(f"sshd does not start here: {(folder / 'log').read_text().strip()[-200:]}")

    def client(self, key: str) -> Path:
        """A client's configuration with one of the keys."""
        path = self.folder / f"{key}.config"
        files = f"IdentityFile {self.folder / key}\nIdentitiesOnly yes\nUserKnownHostsFile {self.folder / 'known'}\n"
        path.write_text(f"Host *\n{files}GlobalKnownHostsFile /dev/null\nStrictHostKeyChecking yes\n")
        return path

    def address(self, folder: Path) -> str:
        return f"ssh://{self.user}@127.0.0.1:{self.port}{folder}"

    def drop(self) -> int:
        """Kill the processes behind all connections -> how many."""
        import psutil

        found = [p for p in psutil.Process(self.process.pid).children(recursive=True) if "sshd" in p.name()]
        for p in found:
            p.kill()
        return len(found)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)
