"""Who compiles engines: the Python packages tensorrt (10.3 or newer) and tensorrt_rtx, or trtexec. Used by build_engine.py."""

import contextlib
import importlib
import re
import runpy
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
infer = runpy.run_path(str(HERE / "infer.py"))
files, flags = infer["load"]("engine_files"), infer["load"]("engine_flags")
Failed, first_line = files.Failed, files.first_line
OLDEST = (10, 3)
RUNTIMES = ("tensorrt", "tensorrt_rtx", "trtexec")
TRTEXEC = "/usr/src/tensorrt/bin/trtexec"  # where JetPack and the Debian packages put it
LEAST = {"bf16": (8, 0), "fp8": (8, 9)}  # compute capability
MB = 1 << 20


class Missing(Exception):
    """What a way to build lacks here, in one clause."""


def find_maker(runtime, capabilities):
    """What builds: the one asked for, else the first that works here."""
    reasons = []
    for name in [runtime] if runtime else ["tensorrt_rtx"] if capabilities else RUNTIMES:
        try:
            return Trtexec() if name == "trtexec" else PythonRuntime(name, capabilities)
        except Missing as e:
            reasons.append(f"{name}: {e}")
    raise Missing("; ".join(reasons))


class Maker:
    """A runtime that compiles.

    Attributes:
        name: one of RUNTIMES. runtime: the Python package that runs its engines. gpu: its name; None where it compiles for absent ones.
    """

    name = runtime = version = ""
    gpu = None
    capabilities: list = []  # noqa: RUF012

    def __str__(self):
        return f"{self.name} {self.version} for {self.gpu or 'GPUs'} (compute capability {', '.join(self.capabilities)})"

    def ask_gpu(self):
        try:
            device = infer["Cuda"]()
        except (infer["Unavailable"], RuntimeError) as e:
            raise Missing(first_line(e)) from None
        self.gpu, self.capabilities = device.name, [device.capability]

    def check_version(self):
        if numbers(self.version)[:2] < OLDEST and self.runtime == "tensorrt":
            raise Missing(f"version {self.version} is older than 10.3, the first that reads these files; update it")

    def unfit(self, precision):
        """Why none of this precision can be compiled, or None."""
        least = LEAST.get(precision, (0, 0))
        if old := [c for c in self.capabilities if numbers(c) < least]:
            need = ".".join(map(str, least))
            return f"{precision.upper()} needs compute capability {need} or newer, this is for {old[0]}; use another file"
        return None

    def cache_name(self):
        gpu = re.sub(r"[^A-Za-z0-9]+", "-", self.gpu or "")
        return f"timing-{self.runtime}-{self.version}-{gpu}.cache"


class PythonRuntime(Maker):
    """TensorRT or TensorRT for RTX through their Python packages. What a version lacks is left out and noted."""

    def __init__(self, name, capabilities):
        self.name = self.runtime = name
        try:
            self.trt = importlib.import_module(name)
        except Exception as e:  # a package whose libraries do not load raises whatever they do
            raise Missing(f"it cannot be imported ({first_line(e)})") from None
        if not hasattr(self.trt, "Logger"):
            raise Missing("it is installed without its libraries")
        self.version = self.trt.__version__
        self.check_version()
        if capabilities and name == "tensorrt":
            raise Missing("it compiles only for the GPU that it finds; leave --compute-capability out")
        if capabilities:
            self.capabilities = sorted(capabilities, key=numbers)
        else:
            try:
                self.ask_gpu()
            except Missing as e:
                hint = "; --compute-capability 8.6 compiles without one" if name == "tensorrt_rtx" else ""
                raise Missing(f"{e}{hint}") from None
        known = getattr(self.trt, "ComputeCapability", None) if name == "tensorrt_rtx" else None
        if capabilities and not known:
            raise Missing(f"version {self.version} compiles only for the GPU that it finds; install a newer one")
        if known and (bad := [c for c in self.capabilities if not hasattr(known, sm(c))]):
            raise Missing(f"version {self.version} does not compile for compute capability {bad[0]}")

    def build(self, data, file, settings, part, cache):
        """Compile `data` into the file `part` -> notes."""
        log = collecting_log(self.trt)
        try:
            with stoppable():
                plan, notes, kernels = self.compiled(data, file, settings, cache, log)
        except (RuntimeError, TypeError, MemoryError) as e:  # the bindings' own: a TypeError where no object came out
            raise Failed(log.reason() or first_line(e)) from None
        part.write_bytes(plan)
        if kernels:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(cache) as written:
                written.write_bytes(kernels)
        return notes

    def compiled(self, data, file, settings, cache, log):
        trt, builder = self.trt, self.trt.Builder(log)
        network = builder.create_network(self.network_flags())
        parser = trt.OnnxParser(network, log)
        if not parser.parse(data):
            errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise Failed(f"the file cannot be parsed: {first_line(errors[0] if errors else log.reason())}")
        config = builder.create_builder_config()
        for shapes in flags.shapes_of(file):
            profile = builder.create_optimization_profile()
            profile.set_shape(file["input"], *shapes)
            config.add_optimization_profile(profile)
        notes = self.set_flags(config, settings)
        self.set_targets(config)
        keeps = self.name == "tensorrt" and hasattr(config, "create_timing_cache")  # with one, RTX compiles for no absent GPU
        if keeps:
            measured = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
            if measured is None or config.set_timing_cache(measured, False) is False:
                raise Failed(f"{cache} is a timing cache of another version or GPU; delete it or name another")
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise Failed(log.reason() or "the builder gave no reason")
        measured = config.get_timing_cache() if keeps else None
        return bytes(plan), notes, bytes(measured.serialize()) if measured else b""

    def network_flags(self):
        """Strongly typed: the file decides every precision. TensorRT 11 has no other kind."""
        flags = self.trt.NetworkDefinitionCreationFlag
        return sum(1 << int(getattr(flags, n)) for n in ("EXPLICIT_BATCH", "STRONGLY_TYPED") if hasattr(flags, n))

    def set_targets(self, config):
        if self.name == "tensorrt_rtx" and hasattr(self.trt, "ComputeCapability"):
            config.num_compute_capabilities = len(self.capabilities)
            for i, capability in enumerate(self.capabilities):
                config.set_compute_capability(getattr(self.trt.ComputeCapability, sm(capability)), i)

    def set_flags(self, config, settings):
        """Every setting that this version has; the others come back as notes."""
        trt, notes = self.trt, []
        for flag in settings["flags"]:
            if hasattr(trt.BuilderFlag, flag):
                config.set_flag(getattr(trt.BuilderFlag, flag))
            else:
                notes.append(f"without {flag}, which this version lacks")
        if not settings["tf32"] and hasattr(trt.BuilderFlag, "TF32"):
            config.clear_flag(trt.BuilderFlag.TF32)
        if settings["workspace_mb"]:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings["workspace_mb"] * MB)
        level = settings["hardware_compatibility"].upper()
        if level != "NONE" and self.name == "tensorrt":
            if hasattr(trt.HardwareCompatibilityLevel, level):
                config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
            else:
                notes.append(f"without hardware compatibility {level}, which this version lacks")
        config.profiling_verbosity = getattr(trt.ProfilingVerbosity, flags.VERBOSITY[settings["profiling"]])
        return notes


class Trtexec(Maker):
    """NVIDIA's command, where the Python package is missing. Its engines run in the Python package `tensorrt` or in C++."""

    name, runtime = "trtexec", "tensorrt"

    def __init__(self):
        self.command = shutil.which("trtexec") or TRTEXEC
        try:
            done = subprocess.run([self.command, "--help"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as e:
            raise Missing(f"it is neither on PATH nor {TRTEXEC}, or does not start ({first_line(e)})") from None
        self.help = done.stdout.decode("utf-8", "replace")
        if not (found := re.search(r"\[TensorRT v([\d.]+)\]", self.help)):
            raise Missing(f"{self.command} does not tell its version: {flags.explained(flags.reason_in(self.help))}")
        self.version = version_of(found[1])
        self.check_version()
        self.ask_gpu()

    def build(self, data, file, settings, part, cache):
        del data  # its hash is right; trtexec reads the file itself
        cache.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(cache, required=False) as written:
            if cache.is_file():
                shutil.copyfile(cache, written)
            arguments = flags.trtexec_arguments(file, settings, HERE / file["path"], part, written)
            known = [a for a in arguments if a.split("=")[0] in self.help and self.has_level(a)]
            log = self.started([self.command, *known])
        if not part.is_file() or not part.stat().st_size:
            raise Failed(flags.reason_in(log))
        return [f"without {a}, which this version lacks" for a in arguments if a not in known]

    def has_level(self, argument):
        option, _, value = argument.partition("=")
        return option != "--hardwareCompatibilityLevel" or value in self.help

    def started(self, command):
        """Run to the end -> its log. Stopped with us."""
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            try:
                log = process.communicate()[0].decode("utf-8", "replace")
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise Failed(flags.reason_in(log))
        return log


def collecting_log(trt: Any):
    """A logger that keeps errors; `.reason()` is the first, which names the cause."""

    class Kept(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors = []

        def log(self, severity, message):
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def reason(self):
            return first_line(self.errors[0]) if self.errors else ""

    return Kept()


@contextlib.contextmanager
def stoppable():
    """While a native builder runs, Ctrl-C and a kill end the process at once: Python would only hear of them after it."""
    before = {s: signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def sm(capability):
    return "SM" + capability.replace(".", "")


def version_of(digits):
    """trtexec's 100300 -> 10.3.0, 8602 -> 8.6.2."""
    if "." in digits:
        return digits
    number, base = int(digits), 10000 if len(digits) > 4 else 1000
    return f"{number // base}.{number % base // 100}.{number % 100}"


def numbers(version):
    return tuple(int(p) for p in re.findall(r"\d+", version.split("+")[0]))
