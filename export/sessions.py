"""ONNX Runtime's session options, as every part of export uses them."""

import onnxruntime


def quiet_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """Nothing on the console but errors; `threads` of the CPU, all without it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return options
