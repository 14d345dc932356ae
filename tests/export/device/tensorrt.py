"""A `tensorrt` for subprocesses: fake_tensorrt's names of version $FAKE_TENSORRT, engines that are ONNX files run by ONNX Runtime.

$FAKE_LOG takes one JSON line for each build. $FAKE_ERROR is what a build fails with, $FAKE_SLEEP how many seconds it lasts.
"""

import ctypes
import json
import math
import os
import sys
import time
from types import SimpleNamespace

import numpy as np
import onnxruntime
from fake_tensorrt import fake

trt = fake(os.environ["FAKE_TENSORRT"])


class OnnxParser:
    num_errors = 0

    def __init__(self, network, log):
        self.network = network

    def parse(self, data):
        self.network.data = data
        return True


class Builder(trt.Builder):
    def build_serialized_network(self, network, config):
        asked = {"flags": sorted(config.flags), "pools": config.pools, "profiles": config.profiles}
        asked |= {"level": config.hardware_compatibility_level, "cache": config.cache.data.decode(), "bits": trt.network_bits}
        with open(os.environ["FAKE_LOG"], "a") as f:
            f.write(json.dumps(asked | {"verbosity": config.profiling_verbosity}) + "\n")
        time.sleep(float(os.environ.get("FAKE_SLEEP", 0)))
        if reason := os.environ.get("FAKE_ERROR"):
            self.log.log("ERROR", reason)
            return None
        return json.dumps(asked).encode() + b"\n" + network.data


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, log):
        pass

    def deserialize_cuda_engine(self, plan):
        head, _, data = plan.partition(b"\n")
        asked = json.loads(head)
        if "VERSION_COMPATIBLE" in asked["flags"] and not self.engine_host_code_allowed:
            return None
        largest = asked["profiles"][0][2][0]
        return SimpleNamespace(create_execution_context=lambda: Context(data, largest))


class Context:
    """Reads and writes where the addresses say: the fake driver's memory is the host's."""

    def __init__(self, data, largest):
        self.session, self.largest, self.at = onnxruntime.InferenceSession(data), largest, {}

    def set_input_shape(self, name, shape):
        self.shape = tuple(shape)
        return shape[0] <= self.largest

    def set_tensor_address(self, name, address):
        self.at[name] = address

    def execute_async_v3(self, stream):
        floats = (ctypes.c_float * math.prod(self.shape)).from_address(self.at["images"])
        images = np.ctypeslib.as_array(floats).reshape(self.shape)
        names = [o.name for o in self.session.get_outputs()]
        for name, value in zip(names, self.session.run(names, {"images": images}), strict=True):
            ctypes.memmove(self.at[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)
        return True


trt.Logger = type("Logger", (trt.ILogger,), {"__init__": lambda self, level: None})
trt.Logger.ERROR = "ERROR"
trt.OnnxParser, trt.Builder, trt.Runtime = OnnxParser, Builder, Runtime
sys.modules["tensorrt"] = trt
