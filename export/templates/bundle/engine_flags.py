"""The manifest's rebuild settings as options of trtexec, and what builders' messages mean. REBUILD.md is written by these too."""

import re

VERBOSITY = {"none": "NONE", "names": "LAYER_NAMES_ONLY", "detailed": "DETAILED"}
OPTIONS = {
    "VERSION_COMPATIBLE": "--versionCompatible",
    "EXCLUDE_LEAN_RUNTIME": "--excludeLeanRuntime",
    "REFIT": "--refit",
    "SPARSE_WEIGHTS": "--sparsity=enable",
    "WEIGHT_STREAMING": "--allowWeightStreaming",
}
LEVELS = {"ampere_plus": "ampere+", "same_compute_capability": "sameComputeCapability"}
# What builders, parsers and trtexec write -> what it means and what to do. The first that matches.
CAUSES = (
    (
        r"hw-specific datatypes: *fp8",
        "this GPU generation has no FP8 (it begins at compute capability 8.9); use an INT8 or FP16 file",
    ),
    (
        r"hw-specific datatypes|unsupported data ?type|int4.*not supported",
        "this GPU generation lacks one of the file's number types; use an INT8 or FP16 file",
    ),
    (
        r"shared librar|cannot open shared object|dll load failed",
        "a library of the runtime is missing; install TensorRT whole",
    ),
    (
        r"cuda initialization failure|no cuda-capable device|driver version is insufficient",
        "the NVIDIA driver or GPU does not answer, or is too old for this runtime; see nvidia-smi",
    ),
    (
        r"opset|no importer registered|plugin not found|unsupported operator",
        "this TensorRT is too old for the file's operators; update it, or use a file of another precision",
    ),
    (
        r"out ?of ?memory|insufficient workspace|workspace (size|memory|limit)|bad_alloc|amount of gpu memory",
        "memory ran out; close other programs, or lower export.engine.workspace_mb or export.max_batch in the recipe",
    ),
    (
        r"could not find any implementation",
        "no kernel fits; often there is too little workspace, or the GPU lacks a number type",
    ),
    (r"no space left|disk quota", "the disk is full; free some space and run it again"),
    (
        r"read-only file system|permission denied",
        "a file cannot be written here; name other places with --out or --timing-cache",
    ),
)


def trtexec_arguments(file, settings, onnx, engine, cache):
    """trtexec's options that compile `onnx` into `engine` as the Python packages would. REBUILD.md prints these too."""
    arguments = [f"--onnx={onnx}", f"--saveEngine={engine}", "--stronglyTyped", "--skipInference"]
    profiles = list(shapes_of(file))
    for i, shapes in enumerate(profiles):
        arguments += [f"--profile={i}"] if len(profiles) > 1 else []
        for kind, shape in zip(("min", "opt", "max"), shapes):  # noqa: B905 (Python 3.9)
            arguments.append(f"--{kind}Shapes={file['input']}:{'x'.join(map(str, shape))}")
    arguments.append(f"--timingCacheFile={cache}")
    if settings["workspace_mb"]:
        arguments.append(f"--memPoolSize=workspace:{settings['workspace_mb']}")
    arguments += [OPTIONS[flag] for flag in settings["flags"]]
    if not settings["tf32"]:
        arguments.append("--noTF32")
    if (level := settings["hardware_compatibility"]) != "none":
        arguments.append(f"--hardwareCompatibilityLevel={LEVELS[level]}")
    return [*arguments, f"--profilingVerbosity={VERBOSITY[settings['profiling']].lower()}"]


def shapes_of(file):
    """(smallest, most likely, largest) shape of each profile."""
    for batches in file["profiles"]:
        yield tuple((int(b), 3, file["resolution"], file["resolution"]) for b in batches)


def reason_in(log):
    """The first error in what trtexec printed."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "[E]" in line or "error" in line.lower()]
    return re.sub(r"^(\[[^\]]*\] *)+", "", (errors or lines or ["it printed nothing"])[0])


def explained(reason):
    """A builder's words, and what they mean where that is known."""
    meaning = next((text for pattern, text in CAUSES if re.search(pattern, reason.lower())), None)
    return f"{meaning} [{reason}]" if meaning else reason
