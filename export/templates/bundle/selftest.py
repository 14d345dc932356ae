#!/usr/bin/env python3
"""Does this bundle do here what it did where it was built? Needs numpy, Pillow and the runtimes of its artifacts; no torch.

    python selftest.py [--json] [--target onnx-int8] [--threads 2] [--seconds 0.5] [--engines DIR]

In this order: what the machine has, the hash of every file (before any of them is imported or opened), the preprocessing of the
golden images, the heads, then for each artifact the golden images from PNG to features against the expected ones, and a short
latency. Beside the cosine stands what a user would notice (agreement.py): whether the heads answer as expected, and of how many
patches the nearest patch is the expected one. These inform; only cosine and max abs are held to a tolerance.
--engines adds the engines that build_engine.py wrote to DIR.
Exit code 0: every artifact that can run here passes. 1: something failed. 3: this machine can run none of them.
A hash proves that the files belong to this manifest, not who wrote the manifest.
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import platform
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True  # the folder stays as it was verified
HERE = Path(__file__).resolve().parent
FORMAT = "decant-bundle-1"
PACKAGES = {"numpy": "numpy", "PIL": "pillow"}


def main():
    parser = argparse.ArgumentParser(description="Test this bundle on this machine.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--target", help="test this artifact only")
    parser.add_argument("--threads", type=int, default=0, help="0: the runtime decides")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for the latency of one file; 0: none")
    parser.add_argument("--engines", type=Path, metavar="DIR", help="test the engines that build_engine.py wrote there too")
    args = parser.parse_args()
    report = run(args)
    if args.json:
        print(json.dumps(report, indent=2, sort_keys=True, allow_nan=False))
    else:
        print(f"self-test of {report['student']} on {', '.join(f'{k} {v}' for k, v in report['machine'].items())}")
        for result in report["results"]:
            print(f"{result['status']}  {result['check']:<12}  {result['text']}")
        verdicts = {0: "every artifact that can run here passes", 1: "FAILED", 3: "nothing here can run"}
        print(f"{verdicts[report['exit_code']]} (exit code {report['exit_code']})")
    return report["exit_code"]


def run(args):
    """The whole test -> its report."""
    report = {"format": "decant-selftest-1", "student": "?", "machine": machine(), "results": []}
    results = report["results"]

    def finish(code):
        report["exit_code"] = code
        return report

    try:
        manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']!r} is not {FORMAT!r}")
        report["student"] = manifest["student"]
        artifacts = [a for a in manifest["artifacts"] if args.target in (None, a["target"])]
        if not artifacts:
            raise ValueError(
                f"there is no artifact {args.target}, only {', '.join(a['target'] for a in manifest['artifacts'])}"
            )
        problem, unlisted = check_files(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        results.append(result("files", "FAIL", f"manifest.json: {type(e).__name__}: {first_line(e)}"))
        return finish(1)
    if missing := [pip for module, pip in PACKAGES.items() if importlib.util.find_spec(module) is None]:
        results.append(result("machine", "SKIP", f"{' and '.join(missing)} missing; run: pip install numpy pillow onnxruntime"))
        return finish(3)
    results.append(result("machine", "PASS", "numpy and Pillow are installed"))
    if problem:
        results.append(result("files", "FAIL", problem))
        results.extend(result(a["target"], "SKIP", "not opened, because a file was changed") for a in artifacts)
        return finish(1)
    beside = f"; not part of the bundle: {', '.join(unlisted[:5])}" if unlisted else ""
    results.append(result("files", "PASS", f"{len(manifest['files'])} files, every hash as listed{beside}"))
    infer = load("infer")
    results.append(guarded("preprocess", lambda: check_preprocessing(infer, manifest["golden"])))
    heads = []
    for head in manifest.get("heads") or []:
        if args.target in (None, *head["artifacts"]):
            results.append(guarded(f"head {head['name']}", lambda h=head: check_head(infer, h, manifest["artifacts"], args)))
            heads += [head] * (results[-1]["status"] == "PASS")
    for artifact in artifacts:
        results.append(
            guarded(artifact["target"], lambda a=artifact: check_artifact(infer, a, manifest["golden"], args, heads))
        )
    engines = built_engines(manifest, args)
    for check, engine in engines:
        if isinstance(engine, str):
            results.append(result(check, "FAIL", engine))
        else:
            results.append(guarded(check, lambda a=engine: check_artifact(infer, a, manifest["golden"], args, heads)))
    if any(r["status"] == "FAIL" for r in results):
        return finish(1)
    tested = {a["target"] for a in artifacts} | {check for check, _ in engines}
    ran = {r["check"] for r in results if r["status"] == "PASS"} & tested
    return finish(0 if ran else 3)


def built_engines(manifest, args):
    """(check, artifact) of every engine in DIR, or (check, why it is refused)."""
    if not args.engines:
        return []
    if not manifest.get("rebuild"):
        return [("engines", "this bundle has no file that build_engine.py compiles")]
    return list(load("engine_files").engine_artifacts(manifest, args.engines, args.target))


def machine():
    """What a reader of the report needs to know about this machine."""
    found = {"python": platform.python_version(), "system": platform.system().lower(), "machine": platform.machine().lower()}
    for name in ("numpy", "PIL", "onnxruntime", "openvino", "tensorrt_rtx", "tensorrt"):
        if importlib.util.find_spec(name) is not None:
            try:
                found[name] = importlib.import_module(name).__version__
            except Exception as e:  # a package whose libraries do not load
                found[name] = f"broken ({first_line(e)})"
    return found


def check_files(files):
    """(what is wrong with the listed files or None, files beside them)."""
    for file in files:
        path = HERE / file["path"]
        if not path.is_file():
            return f"{file['path']} is missing", []
        if path.stat().st_size != file["bytes"]:
            return f"{file['path']} has {path.stat().st_size} bytes, not {file['bytes']}", []
        digest = hashlib.sha256()
        with open(path, "rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != file["sha256"]:
            return f"{file['path']} was changed: its sha256 is not the manifest's", []
    known = {f["path"] for f in files} | {"manifest.json", "signature.json"}
    there = (p.relative_to(HERE).as_posix() for p in sorted(HERE.rglob("*")) if p.is_file())
    return None, [name for name in there if name not in known]


def check_preprocessing(infer, golden):
    """Golden images from PNG to tensor, against the stored tensors. Pillow's resize may differ by a grey level elsewhere."""
    import numpy as np

    worst, least = 0.0, 1.0
    for stored in golden["inputs"]:
        expected = np.load(HERE / stored["path"], allow_pickle=False)
        cosine, largest = compare(
            expected.reshape(len(expected), -1), preprocessed(infer, golden, stored["resolution"]).reshape(len(expected), -1)
        )
        worst, least = max(worst, largest), min(least, cosine)
    numbers = {"cosine_min": least, "max_abs": worst}
    if not (least >= golden["cosine_min"] and worst <= golden["max_abs"]):
        wanted = f"cosine at least {golden['cosine_min']}, max abs at most {golden['max_abs']}"
        return result("preprocess", "FAIL", f"cosine {least:.6f}, max abs {worst:.4f}; expected {wanted}", **numbers)
    return result("preprocess", "PASS", f"{len(golden['images'])} golden images, max abs {worst:.2g}", **numbers)


def check_head(infer, head, artifacts, args):
    """A head by itself: the expected features of an artifact through it, against the answers where the bundle was built."""
    run = infer.load("head").opened(HERE, head, args.threads)
    if run is None:
        return result(f"head {head['name']}", "SKIP", "needs onnxruntime or openvino; run: pip install onnxruntime")
    source = next(a for a in artifacts if a["target"] == head["expected"]["source"])
    file = next(f for f in source["files"] if f["resolution"] == head["resolution"])
    tolerance = {name: head["expected"][name] for name in ("cosine_min", "max_abs")}
    found, problem = compare_outputs(head, run(expected_of(file)), tolerance)
    text = problem or f"{head['kind']} at {head['resolution']} px: max abs {found['max_abs']:.2g}"
    return result(f"head {head['name']}", "FAIL" if problem else "PASS", text, **found)


def check_artifact(infer, artifact, golden, args, heads=()):
    """One artifact at each of its resolutions: golden images, what stays the same of their use, then latency."""
    texts, details, failed = [], [], False
    for file in artifact["files"]:
        try:
            start = time.perf_counter()
            model = infer.Model(artifact, file, args.threads)
            load_s = time.perf_counter() - start
        except infer.Unavailable as e:
            return result(artifact["target"], "SKIP", str(e))
        if model.stand_in:  # another runtime than gave the expected outputs: other kernels
            file = {**file, "expected": {**file["expected"], **file["expected"]["stand_in"]}}
        tensor = preprocessed(infer, golden, file["resolution"])
        found, problem = check_outputs(model, file, golden, tensor)
        if not problem and file.get("with_preprocess"):
            found["with_preprocess"], problem = check_in_graph(infer, artifact, file, golden, args)
        if problem:
            failed = True
            texts.append(f"{file['resolution']} px: {problem}")
        else:
            source = artifact.get(
                "rebuilt_from", artifact["target"]
            )  # an engine's features are those of what it was built from
            mine = [h for h in heads if source in h["artifacts"] and h["resolution"] == file["resolution"]]
            agreement, clauses = agreements(infer, model, file, golden, mine, args)
            found.update(agreement, run_by=model.stand_in or artifact["runtime"], **latency(model, tensor[:1], args.seconds))
            time_text = f", {found['latency_p50_ms']:.2f} ms (median of {found['latency_n']})" if "latency_n" in found else ""
            clauses = [f"cosine {found['cosine_min']:.6f}", f"max abs {found['max_abs']:.2g}", *clauses]
            texts.append(f"{file['resolution']} px: {', '.join(clauses)}{time_text}")
        details.append({"resolution": file["resolution"], "load_s": load_s, **found})
    said = f"{model.run_by}; " if model.run_by else ""
    return result(artifact["target"], "FAIL" if failed else "PASS", said + "; ".join(texts), files=details)


def agreements(infer, model, file, golden, heads, args):
    """What the stored tensors' features are good for, against the expected ones -> (numbers, clauses). Nothing fails by it."""
    import numpy as np

    code, stored = infer.load("agreement"), next(g for g in golden["inputs"] if g["resolution"] == file["resolution"])
    got, expected = model.run(np.load(HERE / stored["path"], allow_pickle=False)), expected_of(file)
    found = {"neighbour_agreement": code.neighbour_agreement(expected["patches"], got["patches"]), "heads": {}}
    clauses = []
    for head in heads:
        run = infer.load("head").opened(HERE, head, args.threads)
        found["heads"][head["name"]], clause = code.head_agreement(head["kind"], run(expected), run(got))
        clauses.append(f"{head['name']} {clause}")
    return found, clauses or [f"nearest patches {found['neighbour_agreement']:.1%}"]


def expected_of(file):
    """Output -> its golden values."""
    import numpy as np

    with np.load(HERE / file["expected"]["path"], allow_pickle=False) as expected:
        return {name: expected[name] for name in expected.files}


def preprocessed(infer, golden, resolution):
    """[n, 3, S, S] float32 of the golden images, from their PNG files."""
    import numpy as np

    code = infer.load("preprocess")
    settings = infer.read_json("preprocess.json")["resolutions"][str(resolution)]
    preprocess = code.Preprocess.from_json(settings)
    return np.stack([preprocess(code.load_rgb(HERE / name)) for name in golden["images"]])


def check_outputs(model, file, golden, tensor):
    """Images and, where their tensors are not those stored, the stored tensors too -> (numbers, what is wrong or None).

    Another Pillow rounds a grey level otherwise, which moves a feature further than the artifact's own tolerance. So that
    tolerance judges the model by the stored tensors, and the images must only give features of nearly the same direction.
    """
    import numpy as np

    strict = {"cosine_min": file["expected"]["cosine_min"], "max_abs": file["expected"]["max_abs"]}
    stored = next(g for g in golden["inputs"] if g["resolution"] == file["resolution"])
    reference = np.load(HERE / stored["path"], allow_pickle=False)
    if tensor.shape == reference.shape and (tensor == reference).all():
        found, problem = compare_outputs(file, model.run(tensor), strict)
        return found, f"{problem}; the stored tensor gives the same: it is the model" if problem else None
    theirs, wrong_model = compare_outputs(file, model.run(reference), strict)
    found, problem = compare_outputs(file, model.run(tensor), loose(file, golden))
    if wrong_model:
        problem = f"{wrong_model}; the stored tensor gives this: it is the model"
    elif problem:
        problem = f"{problem}; the stored tensor passes: it is the preprocessing"
    return {**found, "stored_tensor": theirs}, problem


def check_in_graph(infer, artifact, file, golden, args):
    """Golden images as they are, through the graph that preprocesses them itself -> (numbers, what is wrong or None)."""
    import numpy as np

    model = infer.Model(artifact, {**file, **file["with_preprocess"]}, args.threads)
    code = infer.load("preprocess")
    parts = [model.run(np.asarray(code.load_rgb(HERE / name))[None]) for name in golden["images"]]
    got = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    found, problem = compare_outputs(file, got, loose(file, golden))
    return found, f"{problem}; this is the graph with the preprocessing inside" if problem else None


def loose(file, golden):
    """The tolerance of features whose preprocessing may differ by a grey level: only the direction counts."""
    return {"cosine_min": min(file["expected"]["cosine_min"], golden["cosine_min"]), "max_abs": {}}


def compare_outputs(file, got, tolerance):
    """Outputs against the expected ones -> (numbers, what is wrong or None)."""
    import numpy as np

    least, worst, problem = 1.0, 0.0, None
    with np.load(HERE / file["expected"]["path"], allow_pickle=False) as expected:
        for name in sorted(file["expected"]["max_abs"]):
            if got[name].shape != expected[name].shape:
                return {}, f"{name} has shape {list(got[name].shape)}, expected {list(expected[name].shape)}"
            if not np.isfinite(got[name]).all():
                return {}, f"{name} holds NaN or infinity"
            cosine, largest = compare(expected[name], got[name])
            least, worst = min(least, cosine), max(worst, largest)
            limit = tolerance["max_abs"].get(name, float("inf"))
            if cosine < tolerance["cosine_min"]:
                problem = problem or f"{name} has cosine {cosine:.6f}, expected at least {tolerance['cosine_min']}"
            elif largest > limit:
                problem = problem or f"{name} is off by {largest:.4g}, expected at most {limit:.4g}"
    numbers = {"cosine_min": least, "max_abs": worst, "tolerance": tolerance, "expected_from": file["expected"]["source"]}
    return numbers, problem


def compare(expected, got):
    """(least cosine of vectors along the last axis, largest absolute difference)."""
    import numpy as np

    a, b = expected.astype(np.float64), got.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    same = (a == b).all(-1)  # a zero vector has no direction, and equals itself
    cosine = np.where(same, 1.0, (a * b).sum(-1) / np.where(norms > 0, norms, np.inf))
    return float(cosine.min()), float(np.abs(a - b).max())


def latency(model, tensor, seconds):
    """Median and 90th percentile of calls with one image, tensor in and features out."""
    if seconds <= 0:
        return {}
    for _ in range(3):
        model.run(tensor)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 1000):
        start = time.perf_counter()
        model.run(tensor)
        times.append((time.perf_counter() - start) * 1000)
    times.sort()
    return {"latency_p50_ms": times[len(times) // 2], "latency_p90_ms": times[len(times) * 9 // 10], "latency_n": len(times)}


def guarded(check, work):
    try:
        return work()
    except Exception as e:  # whatever a runtime throws is this artifact's failure, and the others still get their turn
        return result(check, "FAIL", f"{type(e).__name__}: {first_line(e)}")


def result(check, status, text, **numbers):
    return {"check": check, "status": status, "text": text, **numbers}


def load(name):
    """A module of this bundle by its path: nothing else of that name can stand in for it."""
    spec = importlib.util.spec_from_file_location(f"bundle_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    sys.exit(main())
