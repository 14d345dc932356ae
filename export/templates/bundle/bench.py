#!/usr/bin/env python3
"""How fast is this bundle here? Needs numpy, Pillow and the runtimes of its artifacts; no torch.

    python bench.py [--json] [--target onnx-int8] [--batch 1 --batch 8] [--threads 2] [--seconds 2] [--engines DIR]

All artifacts are opened and take turns in short rounds, so that a machine that slows down slows all of them. Everything is opened
anew several times, as two openings of one file can differ by more than the rounds of one opening show: intervals (95 %, Student's,
on a logarithmic scale) are over openings. The 99th percentile is withheld below 1,000 calls. Model-only calls take tensors in host
memory; `end_to_end_p50_ms` is the same with the preprocessing, from a PNG file or from a decoded picture.

Run selftest.py first: it checks the files' hashes, this does not. Exit code 0: something was measured. 1: something failed.
3: this machine can run none of it.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import math
import runpy
import sys
import time
from functools import partial
from pathlib import Path

sys.dont_write_bytecode = True  # the folder stays as it was verified
HERE = Path(__file__).resolve().parent
plumbing = runpy.run_path(str(HERE / "infer.py"))
load, first_line = plumbing["load"], plumbing["first_line"]
FORMAT = "decant-device-bench-1"
PERCENTILE_99_NEEDS = 1000
STUDENT = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # 97.5 % by degrees of freedom
CPU = ("onnxruntime", "openvino")
TENSORS = "one call: float32 images in host memory to float32 features in host memory, preprocessing apart"


def main():
    parser = argparse.ArgumentParser(description="Time this bundle's artifacts on this machine.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--target", action="append", help="time this artifact only; may be repeated")
    parser.add_argument("--batch", type=int, action="append", help="images a call; may be repeated; default 1")
    parser.add_argument("--threads", type=int, default=0, help="0: the runtime decides")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed seconds of each artifact and batch")
    parser.add_argument("--rounds", type=int, default=6, help="turns in each opening")
    parser.add_argument("--openings", type=int, default=5, help="how often everything is opened, 1 to 10; intervals need 3")
    parser.add_argument("--engines", type=Path, help="time the engines of build_engine.py in this folder too")
    args = parser.parse_args()
    if not (1 <= args.openings <= 10 and args.rounds >= 1 and args.seconds > 0 and all(b >= 1 for b in args.batch or [])):
        parser.error("--openings must lie in 1..10, --rounds and --batch be at least 1 and --seconds above 0")
    report = run(args)
    if args.json:
        print(json.dumps(report, indent=2, sort_keys=True, allow_nan=False))
    else:
        for row in report["rows"]:
            print(line(row))
    return report["exit_code"]


def run(args):
    """The whole measurement -> its report."""
    report = {"format": FORMAT, "machine": load("machine").machine(), "rows": [], "exit_code": 3}
    if missing := [m for m in ("numpy", "PIL") if importlib.util.find_spec(m) is None]:
        report["rows"] = [unmeasured("latency_p50_ms", "all", f"{' and '.join(missing)} missing on the device")]
        return report
    infer = load("infer")
    before = load("machine").state()
    try:
        cases, rows = cases_of(infer, args)
    except (OSError, ValueError, KeyError, TypeError) as e:
        why = f"manifest.json cannot be read ({type(e).__name__}: {first_line(e)})"
        report["rows"], report["exit_code"] = [unmeasured("latency_p50_ms", "all", why, failed=True)], 1
        return report
    cases = alone(infer, cases, rows)
    failed = take_turns(cases, args, rows)
    after = load("machine").state()
    note = {f"{name}_{when}": value for when, found in (("before", before), ("after", after)) for name, value in found.items()}
    report["rows"] = rows + [row for case in cases for row in case_rows(case, note)]
    measured = any(r["status"] == "measured" for r in report["rows"])
    report["exit_code"] = 1 if failed else 0 if measured else 3
    return report


class Case:
    """One artifact at one resolution: how it is opened, and what was timed of it.

    `times` is (what, batch) -> opening -> round -> seconds of each call.
    """

    def __init__(self, artifact, file, opened, png, batches, known):
        self.artifact, self.file, self.opened, self.png, self.times = artifact, file, opened, png, {}
        self.run_by = artifact["runtime"]  # once it was opened: what ran it, perhaps a stand-in for that
        self.batches = [b for b in batches if b <= artifact["max_batch"]]
        self.known = known  # conditions that are known beforehand: the file's hash, threads

    def conditions(self):
        runtime = self.run_by
        return {
            "resolution": self.file["resolution"],
            "runtime": runtime,
            "runtime_version": load("machine").version(runtime),
            "stands_in_for": None if runtime == self.artifact["runtime"] else self.artifact["runtime"],
            "device": "cpu" if runtime in CPU else "gpu",
            **self.known,
            "path": None if Path(self.file["path"]).is_absolute() else self.file["path"],
            "built_on_device": Path(self.file["path"]).is_absolute() or None,
        }

    def calls(self, model):
        """(what, batch) -> a function without arguments."""
        import numpy as np

        side = self.file["resolution"]
        found = {}
        for batch in self.batches:
            images = np.random.default_rng(0).standard_normal((batch, 3, side, side)).astype(np.float32)
            found["tensor", batch] = partial(model.run, images)
        picture = model.preprocessing.load_rgb(self.png)
        found["PNG file", 1] = partial(model, [self.png])
        found["decoded picture", 1] = partial(model, [picture])
        return found


def cases_of(infer, args):
    """What is to be timed, and rows for what cannot be."""
    manifest = infer.read_json("manifest.json")
    png, batches, cases, rows = HERE / manifest["golden"]["images"][0], sorted(set(args.batch or [1])), [], []
    targets = [a["target"] for a in manifest["artifacts"]]
    hashes = {f["path"]: f["sha256"] for f in manifest["files"]}
    wanted = [a for a in manifest["artifacts"] if not args.target or a["target"] in args.target]
    for artifact in wanted:
        for file in artifact["files"]:
            known = {"artifact_sha256": hashes[file["path"]], "threads": threads_of(artifact, args.threads)}
            cases.append(Case(artifact, file, partial(infer.Model, artifact, file, args.threads), png, batches, known))
    for target in args.target or []:
        if target not in targets:
            rows.append(unmeasured("latency_p50_ms", target, f"there is no artifact {target}", failed=True))
    for check, artifact in engines_of(manifest, args.engines, args.target):
        if isinstance(artifact, str):
            rows.append(unmeasured("latency_p50_ms", check, artifact, failed=True))
            continue
        for file in artifact["files"]:
            known = {"artifact_sha256": file["sha256"], "threads": threads_of(artifact, args.threads)}
            cases.append(Case(artifact, file, partial(infer.Model, artifact, file, args.threads), png, batches, known))
    for case in cases:
        for batch in sorted(set(batches) - set(case.batches)):
            why = f"it takes at most {case.artifact['max_batch']} images a call"
            rows.append(unmeasured("latency_p50_ms", case.artifact["target"], why, batch=batch, **case.conditions()))
    return cases, rows


def threads_of(artifact, asked):
    """Threads of the CPU that a runtime may use: as many as were asked for, or as this process has; None on a GPU."""
    if artifact["runtime"] not in CPU:
        return None
    return asked or load("machine").machine()["threads"]


def engines_of(manifest, folder, targets):
    """(name, artifact as in the manifest or why it is refused) of what build_engine.py built of these targets, or of all.

    Hashes are checked before anything opens.
    """
    if folder is None:
        return []
    if not (HERE / "engine_files.py").is_file():
        return [("engines", "this bundle has no build_engine.py, so no engine can be of it")]
    listed = load("engine_files").engine_artifacts
    return [pair for target in targets or [None] for pair in listed(manifest, folder, target)]


def alone(infer, cases, rows):
    """Open each case by itself for its load time and peak memory -> the cases that run here."""
    able = []
    for case in {c.artifact["runtime"]: c for c in reversed(cases)}.values():
        with contextlib.suppress(Exception):  # what a runtime takes once, whichever file is opened first, is no file's own
            case.calls(case.opened())["PNG file", 1]()
    for case in cases:
        target, conditions = case.artifact["target"], case.conditions()
        gc.collect()
        resident, start = load("machine").reset_peak(), time.perf_counter()
        try:
            model = case.opened()
            load_s = time.perf_counter() - start
            case.run_by = model.stand_in or case.artifact["runtime"]
            conditions = case.conditions()
            call = case.calls(model)["tensor", 1] if 1 in case.batches else None
            if call:
                call()
        except infer.Unavailable as e:
            rows.append(unmeasured("latency_p50_ms", target, str(e), **conditions))
            continue
        except Exception as e:  # whatever a runtime throws: the others still get their turn
            rows.append(unmeasured("latency_p50_ms", target, f"{type(e).__name__}: {first_line(e)}", failed=True, **conditions))
            continue
        rows.append(row("load_s", target, load_s, 1, conditions))
        if resident is not None and call:
            what = "resident memory at its highest while opened alone and called once, above what the runtime had taken before"
            grown = max(0, load("machine").peak_bytes() - resident) / 1e6
            rows.append(row("peak_memory_mb", target, grown, 1, {**conditions, "batch": 1, "measures": what}))
        del model, call
        able.append(case)
    return able


def take_turns(cases, args, rows):
    """Time the cases in rounds, opened anew each time -> whether one failed; what fails leaves, with a row that says why."""
    out = set()

    def leaves(case, error):
        """A case that failed has no numbers: those of before could be of a runtime that was already failing."""
        out.add(case)
        why = f"{type(error).__name__}: {first_line(error)}"
        rows.append(unmeasured("latency_p50_ms", case.artifact["target"], why, failed=True, **case.conditions()))

    for opening in range(args.openings):
        calls = {}
        for case in cases:
            if case in out:
                continue
            try:
                own = {(case, *key): call for key, call in case.calls(case.opened()).items()}
                for call in own.values():
                    warm_up(call, args.seconds / args.openings / 2)
                calls.update(own)
            except Exception as e:  # whatever a runtime throws
                leaves(case, e)
        keys = list(calls)
        for number in range(args.rounds):
            shift = number % max(len(keys), 1)
            for case, what, batch in keys[shift:] + keys[:shift]:  # nobody always follows the same neighbour
                if case in out:
                    continue
                try:
                    spent = timed(calls[case, what, batch], args.seconds / args.openings / args.rounds)
                except Exception as e:
                    leaves(case, e)
                    continue
                case.times.setdefault((what, batch), {}).setdefault(opening, []).append(spent)
        calls.clear()
        gc.collect()
    cases[:] = [c for c in cases if c not in out]
    return bool(out) or any(r["conditions"].get("failed") for r in rows)


def warm_up(call, seconds):
    """Calls until two windows of five agree within 3 %, or the time is over."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 3:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
        if len(taken) >= 10 and len(taken) % 5 == 0:
            last, before = median(taken[-5:]), median(taken[-10:-5])
            if abs(last - before) <= 0.03 * before:
                return


def timed(call, seconds):
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken


def case_rows(case, note):
    """Latencies and throughput of one case, by batch; end to end apart."""
    rows, target = [], case.artifact["target"]
    for (what, batch), openings in case.times.items():
        every = sorted(t for rounds in openings.values() for taken in rounds for t in taken)
        n, mean = len(every), sum(every) / len(every)
        middles = [median([median(taken) for taken in rounds]) for rounds in openings.values()]
        conditions = {**case.conditions(), "batch": batch, "openings": len(openings), **note}
        conditions["rounds"] = sum(map(len, openings.values()))
        low, high = interval(middles, median(every))
        if what != "tensor":
            conditions["measures"] = f"from a {what} to float32 features in host memory, preprocessing included"
            rows.append(row("end_to_end_p50_ms", target, median(every) * 1e3, n, {**conditions, "from": what}, low, high, 1e3))
            continue
        conditions["measures"] = TENSORS
        rows.append(row("latency_p50_ms", target, median(every) * 1e3, n, conditions, low, high, 1e3))
        rows.append(row("latency_p90_ms", target, every[int(0.9 * (n - 1))] * 1e3, n, conditions))
        rows.append(row("latency_mean_ms", target, mean * 1e3, n, conditions))
        if n >= PERCENTILE_99_NEEDS:
            rows.append(row("latency_p99_ms", target, every[int(0.99 * (n - 1))] * 1e3, n, conditions))
        rows.append(row("images_per_s", target, batch / mean, n, conditions))
    return rows


def interval(values, centre):
    """95 % interval around `centre` by one value an opening; (None, None) below three openings."""
    n = len(values)
    if n < 3:
        return None, None
    logs = [math.log(v) for v in values]
    mean = sum(logs) / n
    half = STUDENT[n - 1] * math.sqrt(sum((v - mean) ** 2 for v in logs) / (n - 1) / n)
    return centre * math.exp(-half), centre * math.exp(half)


def median(values):
    ordered = sorted(values)
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def row(metric, target, value, n, conditions, low=None, high=None, scale=1.0):
    """A number with its conditions; `low` and `high` are multiplied by `scale`."""
    ends = {} if low is None else {"low": low * scale, "high": high * scale}
    found = {"metric": metric, "target": target, "value": value, "n": n, "status": "measured", **ends}
    return {**found, "conditions": {k: v for k, v in conditions.items() if v is not None}}


def unmeasured(metric, target, reason, **conditions):
    kept = {k: v for k, v in conditions.items() if v is not None}
    return {"metric": metric, "target": target, "status": "not measured", "reason": reason, "conditions": kept}


def line(row):
    at = " ".join(f"{k}={row['conditions'][k]}" for k in ("resolution", "batch", "from") if k in row["conditions"])
    if row["status"] != "measured":
        return f"{row['target']:<14} {row['metric']:<18} {at:<24} not measured: {row['reason']}"
    ends = f" ({row['low']:.4g} to {row['high']:.4g})" if "low" in row else ""
    return f"{row['target']:<14} {row['metric']:<18} {at:<24} {row['value']:.4g}{ends}, n = {row['n']}"


if __name__ == "__main__":
    sys.exit(main())
