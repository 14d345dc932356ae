"""A run of two real processes: the first does what is for one, both do what is for all."""

import os
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, sys
from pathlib import Path
import torch
from distill.files import write_text
from distill.progress import Progress
from recipes.run import Stage, execute

torch.set_num_threads(1)
run, rank = Path(sys.argv[1]), int(os.environ["RANK"])

def alone(folder, progress):
    print(f"{rank} alone", flush=True)
    write_text(folder / "a.txt", "a")

def together(folder, progress):
    assert (folder.parent / "alone/a.txt").exists()  # the first process has done what comes before
    one = torch.tensor([rank + 1.0])
    torch.distributed.all_reduce(one)
    print(f"{rank} together {one.item():g}", flush=True)
    if rank == 0:
        write_text(folder / "sum.txt", f"{one.item():g}")

first = Stage("alone", Path("alone"), {}, alone)
stages = [first, Stage("together", Path("together"), {}, together, ("alone",), together=True)]
for again in (False, True):
    execute(run, stages, Progress("quiet"), recipe="r", text="")
    print(f"{rank} end", flush=True)
"""


def test_two_processes_share_one_run(tmp_path: Path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "run")],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [p.communicate(timeout=100)[0].splitlines() for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    assert said[0] == ["0 alone", "0 together 3", "0 end", "0 end"]
    assert said[1] == ["1 together 3", "1 end", "1 end"]
    assert (tmp_path / "run/together/sum.txt").read_text() == "3"
