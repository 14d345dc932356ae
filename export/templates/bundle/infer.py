#!/usr/bin/env python3
"""Image in, features out, with numpy, Pillow and ONNX Runtime alone (for engines: TensorRT and an NVIDIA driver instead).

    python infer.py photo.jpg                                     shapes and timing
    python infer.py a.jpg b.png --target onnx-int8 --out f.npz    features of both images in one file
    python infer.py photo.jpg --head NAME                         what a head of this bundle says of it

In a program:

    model = infer.open_model(target="onnx-int8", resolution=48)
    features = model(["photo.jpg"])      {"cls": [B, D], "patches": [B, N, D]}, float32; patches row by row from the top left

Python 3.9 or newer.
"""

import argparse
import ctypes
import dataclasses
import importlib
import importlib.util
import json
import platform
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True  # the folder stays as it was verified
HERE = Path(__file__).resolve().parent


class Unavailable(Exception):
    """Why this machine cannot run an artifact, in one sentence."""


def load(name):
    """A module of this bundle by its path: nothing else of that name can stand in for it."""
    spec = importlib.util.spec_from_file_location(f"bundle_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def read_json(name):
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def open_model(target=None, resolution=None, threads=0):
    """Open an artifact of this bundle.

    Args:
        target: e.g. "onnx-int8"; without one, the first artifact that this machine can run.
        resolution: side of the square input in pixels; without one, the artifact's first.
        threads: for one call; 0 leaves it to the runtime.
    Raises:
        Unavailable: this machine cannot run it.
        ValueError: there is no such artifact or resolution.
    """
    artifacts = read_json("manifest.json")["artifacts"]
    chosen = [a for a in artifacts if target in (None, a["target"])]
    if not chosen:
        raise ValueError(f"There is no {target} here, only {', '.join(a['target'] for a in artifacts)}.")
    reasons = []
    for artifact in chosen:
        files = [f for f in artifact["files"] if resolution in (None, f["resolution"])]
        if not files:
            have = ", ".join(str(f["resolution"]) for f in artifact["files"])
            raise ValueError(f"{artifact['target']} has no file for {resolution} px, only for {have}.")
        try:
            return Model(artifact, files[0], threads)
        except Unavailable as e:
            reasons.append(f"{artifact['target']}: {e}")
    raise Unavailable("; ".join(reasons))


class Model:
    """Paths or Pillow images in, features out. `run` takes preprocessed tensors.

    `stand_in` is "openvino" where that runs an ONNX Runtime artifact, because onnxruntime is not installed; else None.
    """

    def __init__(self, artifact, file, threads=0):
        self.stand_in = stand_in(artifact, file)
        if self.stand_in is None and (reason := unfit(artifact)):
            raise Unavailable(reason)
        self.artifact, self.file, self.max_batch = artifact, file, artifact["max_batch"]
        self.preprocessing = load("preprocess")
        settings = read_json("preprocess.json")["resolutions"][str(file["resolution"])]
        self.preprocess = self.preprocessing.Preprocess.from_json(settings)
        runtime = self.stand_in or artifact["runtime"]
        opened = OnnxFile if runtime == "onnxruntime" else OpenVinoFile if runtime == "openvino" else EngineFile
        try:
            self.opened = opened(HERE / file["path"], artifact, file, threads)
        except Exception as e:
            if self.stand_in is None:
                raise
            raise Unavailable(f"onnxruntime is not installed, and openvino cannot open the file ({first_line(e)})") from e

    def __call__(self, images):
        import numpy as np

        return self.run(np.stack([self.preprocess(i) for i in self.loaded(images)]))

    def loaded(self, images):
        """Paths opened; what are Pillow images already stay."""
        return [self.preprocessing.load_rgb(i) if isinstance(i, (str, Path)) else i for i in images]

    @property
    def run_by(self):
        """ "" or, of a stand-in, a clause that says so."""
        return f"run by {self.stand_in} instead of {self.artifact['runtime']}" if self.stand_in else ""

    def run(self, images):
        """[B, 3, S, S] float32 -> {"cls": [B, D], "patches": [B, N, D]} float32; batches beyond the largest are split."""
        import numpy as np

        parts = [self.opened(images[i : i + self.max_batch]) for i in range(0, len(images), self.max_batch)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def stand_in(artifact, file):
    """ "openvino" where it may run an ONNX Runtime artifact's file and has to, because onnxruntime is not installed; else None."""
    if artifact["runtime"] != "onnxruntime" or not file["expected"].get("stand_in"):
        return None
    if importlib.util.find_spec("onnxruntime") is not None:
        return None
    try:
        importlib.import_module("openvino")
    except Exception:  # a runtime whose libraries do not load fails with whatever they raise
        return None
    return "openvino"


def unfit(artifact):
    """Why this machine is none that the artifact was made for, or None. Asks no driver."""
    needs = artifact["compatibility"]
    system, machine = platform.system().lower(), platform.machine().lower()
    if needs["systems"] and system not in needs["systems"]:
        return f"it was compiled for {', '.join(needs['systems'])}, this is {system}"
    if needs["machines"] and machine not in needs["machines"]:
        return f"it was compiled for {', '.join(needs['machines'])}, this is {machine}"
    try:
        runtime = importlib.import_module(needs["runtime"])
    except Exception as e:  # a runtime whose libraries do not load fails with whatever they raise
        return f"{needs['runtime']} cannot be imported here ({first_line(e)})"
    if needs["compute_capabilities"] and not hasattr(runtime, "Logger"):
        return f"{needs['runtime']} is installed without its libraries"  # the bare package imports, and then has nothing
    made, here = needs["built_with"].get(needs["runtime"]), getattr(runtime, "__version__", None)
    # zip: trtexec tells three numbers of its version, the packages tell four
    if needs["compute_capabilities"] and made and here and any(a != b for a, b in zip(numbers(made), numbers(here))):  # noqa: B905
        return f"it was compiled by {needs['runtime']} {made}, this is {here}"
    return None


def has_vnni():
    """Whether this processor's own 8-bit products are exact; False where nobody says so."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    return bool({"avx512_vnni", "avx_vnni"} & set(flags))


class OnnxFile:
    """One ONNX file in ONNX Runtime on the CPU."""

    def __init__(self, path, artifact, file, threads=0):
        import onnxruntime

        def opened(exact):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 4 if exact else 3
            if exact:
                options.add_session_config_entry("session.x64quantprecision", "1")
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        try:
            try:
                # Exact 8-bit products, as they were measured. With VNNI they are so by themselves, and faster. Files of other quantizers
                # (onnx-int8-dynamic, ...) were measured at ONNX Runtime's defaults.
                self.session = opened(artifact["target"].count("-") < 2 and not has_vnni())
            except Exception as e:
                if "Attempt to replace the existing tensor" not in str(e):
                    raise
                self.session = opened(False)  # weights that share a zero point
        except Exception as e:
            made = artifact["compatibility"]["built_with"].get("onnxruntime", "0")
            if numbers(onnxruntime.__version__) < numbers(made):
                raise Unavailable(f"onnxruntime {onnxruntime.__version__} cannot open it; it was made with {made}") from e
            raise
        self.input = file["inputs"][0]["name"]
        self.outputs = [port["name"] for port in file["outputs"]]

    def __call__(self, images):
        return dict(zip(self.outputs, self.session.run(self.outputs, {self.input: images})))  # noqa: B905 (Python 3.9)


class OpenVinoFile:
    """One ONNX file in OpenVINO on the CPU."""

    def __init__(self, path, artifact, file, threads=0):
        import openvino

        properties = {"PERFORMANCE_HINT": "LATENCY", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
        exact = "f32" if artifact["runtime"] == "onnxruntime" else None  # as a stand-in, in the precision of the graph
        if precision := artifact["compatibility"].get("inference_precision") or exact:
            properties["INFERENCE_PRECISION_HINT"] = precision
        self.request = openvino.Core().compile_model(str(path), "CPU", properties).create_infer_request()
        self.input = file["inputs"][0]["name"]
        self.outputs = [port["name"] for port in file["outputs"]]

    def __call__(self, images):
        found = self.request.infer({self.input: images}, share_outputs=False)
        return {name: found[name] for name in self.outputs}


class EngineFile:
    """One TensorRT or TensorRT-RTX engine. Verify the bundle before: an engine is native code."""

    def __init__(self, path, artifact, file, threads=0):
        del threads  # a GPU has none to set
        self.cuda = Cuda()
        capabilities = artifact["compatibility"]["compute_capabilities"]
        if self.cuda.capability not in capabilities:
            raise Unavailable(
                f"it was compiled for compute capability {', '.join(capabilities)}, here is {self.cuda.capability}"
            )
        trt = importlib.import_module(artifact["runtime"])
        self.logger = trt.Logger(trt.Logger.ERROR)
        self.runtime = trt.Runtime(self.logger)
        if hasattr(self.runtime, "engine_host_code_allowed"):
            self.runtime.engine_host_code_allowed = True  # a version-compatible engine brings the runtime that it needs
        self.engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise RuntimeError(f"{artifact['runtime']} {trt.__version__} refused the engine on {self.cuda.name}")
        self.context = self.engine.create_execution_context()
        self.input, self.outputs, self.buffers = file["inputs"][0], file["outputs"], {}

    def __call__(self, images):
        import numpy as np

        images = np.ascontiguousarray(images, np.float32)
        results = {p["name"]: np.empty([len(images), *p["shape"][1:]], np.float32) for p in self.outputs}
        if not self.context.set_input_shape(self.input["name"], images.shape):
            raise RuntimeError(f"the engine has no profile for a batch of {len(images)}")
        for name, array in {self.input["name"]: images, **results}.items():
            self.context.set_tensor_address(name, self.buffer(name, array.nbytes))
        self.cuda.upload(self.buffers[self.input["name"]][0], images)
        if not self.context.execute_async_v3(self.cuda.stream):
            raise RuntimeError("the engine did not start")
        self.cuda.synchronize()
        for name, array in results.items():
            self.cuda.download(array, self.buffers[name][0])
        return results

    def buffer(self, name, size):
        """GPU memory of a tensor, kept for the next call: asking the driver each time would be part of every latency."""
        pointer, have = self.buffers.get(name, (None, 0))
        if have < size:
            if pointer is not None:
                self.cuda.free(self.buffers.pop(name)[0])
            pointer = self.cuda.allocate(size)
            self.buffers[name] = pointer, size
        return pointer

    def __del__(self):
        for pointer, _ in getattr(self, "buffers", {}).values():
            self.cuda.free(pointer)


class Cuda:
    """The dozen calls of NVIDIA's driver that an engine needs, through ctypes: no CUDA toolkit and no torch."""

    MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*

    def __init__(self, device=0):
        try:
            self.driver = ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
        except OSError:
            raise Unavailable("there is no NVIDIA driver here") from None
        count, handle, context, stream = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        if self.driver.cuInit(ctypes.c_uint(0)) or self.driver.cuDeviceGetCount(ctypes.byref(count)) or count.value <= device:
            raise Unavailable("the NVIDIA driver finds no GPU here")
        self.call("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(device))
        name = ctypes.create_string_buffer(100)
        self.call("cuDeviceGetName", name, ctypes.c_int(100), handle)
        self.name = name.value.decode()
        version = []
        for attribute in (self.MAJOR, self.MINOR):
            value = ctypes.c_int()
            self.call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), handle)
            version.append(str(value.value))
        self.capability = ".".join(version)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        self.call("cuCtxSetCurrent", context)
        self.call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(0))
        self.stream = stream.value

    def call(self, function, *arguments):
        if status := getattr(self.driver, function)(*arguments):
            raise RuntimeError(f"{function} of the NVIDIA driver failed with error {status}")

    def allocate(self, size):
        pointer = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer.value

    def free(self, pointer):
        self.call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def upload(self, pointer, array):
        self.call(
            "cuMemcpyHtoD_v2", ctypes.c_uint64(pointer), ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        )

    def download(self, array, pointer):
        self.call(
            "cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(pointer), ctypes.c_size_t(array.nbytes)
        )

    def synchronize(self):
        self.call("cuStreamSynchronize", ctypes.c_void_p(self.stream))


def ask_head(name, images, target=None, resolution=None, threads=0, folder="."):
    """What a head says of images.

    Args:
        folder: where the maps of a segmentation or depth head are written, as IMAGE-HEAD.png.
    Returns:
        the Model that gave the features, and a line for each image.
    Raises:
        Unavailable: nothing here can run it.
        ValueError: there is no such head, or it does not read such an artifact.
    """
    import numpy as np

    heads = load("head")
    head = heads.find(read_json("manifest.json"), name, target, resolution)
    run = heads.opened(HERE, head, threads)
    if run is None:
        raise Unavailable("a head needs onnxruntime or openvino; run: pip install onnxruntime")
    reasons = []
    for candidate in [target] if target else head["artifacts"]:
        try:
            model = open_model(candidate, head["resolution"], threads)
            break
        except Unavailable as e:
            reasons.append(str(e))
    else:
        raise Unavailable("; ".join(reasons))
    pictures = model.loaded(images)
    preprocess = dataclasses.replace(model.preprocess, fit=head["fit"])
    results = run(model.run(np.stack([preprocess(p) for p in pictures])))
    return model, heads.answers(head, next(iter(results.values())), images, pictures, Path(folder))


def numbers(version):
    """ "1.17.0+cu12" -> (1, 17, 0), to compare versions."""
    parts = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


def said(model):
    return f" ({model.run_by})" if model.run_by else ""


def main():
    parser = argparse.ArgumentParser(description="Features of images, by an artifact of this bundle.")
    parser.add_argument("images", nargs="+", help="image files of any kind that Pillow reads")
    parser.add_argument("--target", help="artifact, such as onnx-int8; default: the first that runs here")
    parser.add_argument("--resolution", type=int, help="side of the input in pixels; default: the artifact's first")
    parser.add_argument("--threads", type=int, default=0, help="0: the runtime decides")
    parser.add_argument("--out", help="write cls [B, D] and patches [B, N, D] to this .npz; with --head the folder of its maps")
    parser.add_argument("--head", help="print this head's five likeliest classes, or write its map of classes or depth")
    args = parser.parse_args()
    try:
        import numpy as np
        import PIL
    except ImportError as e:
        print(f"{e.name} is missing; run: pip install numpy pillow onnxruntime", file=sys.stderr)
        return 3
    try:
        if args.head:
            model, lines = ask_head(args.head, args.images, args.target, args.resolution, args.threads, args.out or ".")
            print(f"{args.head} on {model.artifact['target']} at {model.file['resolution']} px{said(model)}", *lines, sep="\n")
            return 0
        model = open_model(args.target, args.resolution, args.threads)
        start = time.perf_counter()
        features = model(args.images)
        seconds = time.perf_counter() - start
    except Unavailable as e:
        print(f"Nothing here can run: {e}", file=sys.stderr)
        return 3
    except (ValueError, OSError, PIL.UnidentifiedImageError) as e:
        print(first_line(e), file=sys.stderr)
        return 2
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in features.items())
    took = f"{seconds * 1000:.1f} ms with preprocessing"
    print(f"{model.artifact['target']} at {model.file['resolution']} px{said(model)}: {shapes}, {took}")
    if args.out:
        try:
            with open(args.out, "wb") as f:  # under the very name that was asked for
                np.savez(f, **features)
        except OSError as e:
            print(f"{args.out} cannot be written: {e.strerror}", file=sys.stderr)
            return 2
        print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
