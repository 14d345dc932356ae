#!/usr/bin/env python3
"""Compile this bundle's ONNX files into engines for this machine's NVIDIA GPU: TensorRT 10.3 or newer, TensorRT for RTX, or trtexec.

    python build_engine.py                                    all files, with what is installed, into engines/
    python build_engine.py --target onnx-int8 --json          one artifact, a report for machines
    python build_engine.py --runtime tensorrt_rtx --compute-capability 8.6 8.9      for GPUs that are not here

The manifest's `rebuild` says which files and with which flags. Each file's hash is checked before anything native reads it. An engine
whose file, runtime, GPU and flags are still the same is not built again. DIR/engines.json says what was built;
`python selftest.py --engines DIR` tests it. Exit code 0: built, or up to date. 1: a build failed. 3: nothing here can build.
Python 3.9 or newer, no packages but the runtime.
"""

import argparse
import hashlib
import json
import platform
import re
import runpy
import signal
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True  # the folder stays as it was verified
HERE = Path(__file__).resolve().parent
makers = runpy.run_path(str(HERE / "infer.py"))["load"]("engine_makers")
files, flags = makers.files, makers.flags
REPORT = "decant-rebuild-1"


def main():
    parser = argparse.ArgumentParser(description="Compile this bundle's ONNX files for this machine's GPU.")
    parser.add_argument("--target", nargs="+", help="artifacts such as onnx-int8; default: all that TensorRT takes")
    parser.add_argument("--out", type=Path, default=HERE / "engines", help="default: engines beside this file")
    parser.add_argument("--runtime", choices=makers.RUNTIMES, help="default: the first of these that works here")
    parser.add_argument("--timing-cache", type=Path, help="file of measured kernels, kept and reused; default: one in --out")
    parser.add_argument(
        "--compute-capability", nargs="+", help="tensorrt_rtx: GPUs to compile for, such as 8.6; needs none here"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half written is removed
    results: list = []

    def say(check, status, text):
        results.append({"check": check, "status": status, "text": text})
        if not args.json:
            print(f"{status}  {check:<20}  {text}", flush=True)

    try:
        code = run(args, say)
    except KeyboardInterrupt:
        print("Stopped; engines that are ready are kept. Run it again to go on.", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps({"format": REPORT, "results": results, "exit_code": code}, indent=2, sort_keys=True))
    return code


def run(args, say):
    """Build what is wanted; `say(check, status, text)` takes each result -> exit code."""
    try:
        manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
        entries, settings = wanted(manifest, args.target), manifest["rebuild"]["settings"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        say("manifest", "FAIL", f"manifest.json: {files.first_line(e)}")
        return 1
    try:
        maker = makers.find_maker(args.runtime, args.compute_capability)
    except makers.Missing as e:
        say("machine", "SKIP", f"nothing here can build: {e}")
        return 3
    say("machine", "PASS", str(maker))
    counts = {"PASS": 0, "SKIP": 0, "FAIL": 0}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with files.locked(args.out):
            for file in entries:
                start = time.perf_counter()
                status, text = one(file, settings, maker, args)
                counts[status] += 1
                say(f"{file['target']} {file['resolution']} px", status, f"{text} ({time.perf_counter() - start:.1f} s)")
    except (OSError, files.Failed) as e:
        say("folder", "FAIL", flags.explained(files.first_line(e)))
        return 1
    return 1 if counts["FAIL"] else 0 if counts["PASS"] else 3


def wanted(manifest, targets):
    """The files of the manifest's `rebuild` for these targets."""
    entries = manifest.get("rebuild", {}).get("files", [])
    have = sorted({f["target"] for f in entries})
    if unknown := [t for t in targets or [] if t not in have]:
        raise ValueError(f"there is no {unknown[0]} to rebuild, only {', '.join(have) or 'nothing'}")
    if bad := [t for t in have if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", t)]:
        raise ValueError(f"{bad[0]!r} is no name for a folder")
    if not entries:
        raise ValueError("it lists no ONNX file that TensorRT takes")
    return [f for f in entries if not targets or f["target"] in targets]


def one(file, settings, maker, args):
    """Build one engine, or see that it is up to date -> (status, text). Never leaves half a file."""
    path = args.out / file["target"] / f"model_{file['resolution']}.engine"
    if reason := maker.unfit(file["precision"]):
        return "SKIP", reason
    asked = identity(file, settings, maker)
    if current := files.up_to_date(args.out, path, asked):
        return "PASS", f"up to date: {current['bytes'] / 1e6:.1f} MB"
    cache = args.timing_cache or args.out / maker.cache_name()
    start = time.perf_counter()
    try:
        data = (HERE / file["path"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != file["sha256"]:
            raise files.Failed(f"{file['path']} was changed: its sha256 is not the manifest's; unpack the bundle again")
        path.parent.mkdir(exist_ok=True)
        with files.replacing(path) as part:
            notes = maker.build(data, file, settings, part, cache)
            engine = {**asked, "sha256": files.sha256_file(part), "bytes": part.stat().st_size, "notes": notes}
        engine |= {"path": path.relative_to(args.out).as_posix(), "seconds": round(time.perf_counter() - start, 3)}
        files.record(args.out, engine)
    except (files.Failed, OSError) as e:
        return "FAIL", f"not built: {flags.explained(files.first_line(e))}"
    return "PASS", "; ".join([f"built: {engine['bytes'] / 1e6:.1f} MB", *notes])


def identity(file, settings, maker):
    """What makes an engine this one: the file, the flags, who compiled it, for what."""
    same = {k: file[k] for k in ("target", "precision", "resolution", "profiles")}
    where = {"system": platform.system().lower(), "machine": platform.machine().lower(), "gpu": maker.gpu}
    who = {"runtime": maker.runtime, "built_by": maker.name, "versions": {maker.runtime: maker.version}}
    source = {"source": file["target"], "onnx": file["path"], "onnx_sha256": file["sha256"]}
    return {**same, **source, **who, **where, "compute_capabilities": maker.capabilities, "settings": settings}


if __name__ == "__main__":
    sys.exit(main())
