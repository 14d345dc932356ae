"""Heads of this bundle: small ONNX files from features to classes, maps of classes, or maps of depth. Python 3.9 or newer.

head = head.find(manifest, "rooms")          what manifest.json says of it
run = head.opened(folder, head)              None where neither ONNX Runtime nor OpenVINO is installed
run({"cls": [B, D], "patches": [B, N, D]})   {"logits": [B, K] or [B, N, K]} or {"metres": [B, N]}, float32
"""

from pathlib import Path

import numpy as np
from PIL import Image

LARGEST = 1024  # pixels of the longer side of a map


def find(manifest, name, target=None, resolution=None):
    """What the manifest says of a head.

    Raises:
        ValueError: there is no such head, or it does not read that artifact or resolution.
    """
    heads = {head["name"]: head for head in manifest.get("heads") or []}
    if name not in heads:
        raise ValueError(f"There is no head {name} here; there are: {', '.join(heads) or 'none'}.")
    reads, size = heads[name]["artifacts"], heads[name]["resolution"]
    if target not in (None, *reads) or resolution not in (None, size):
        raise ValueError(f"The head {name} reads {', '.join(reads)} at {size} px.")
    return heads[name]


def opened(folder, head, threads=0):
    """The head as a function of features, in ONNX Runtime or else OpenVINO, in FP32."""
    path, names = str(folder / head["path"]), [port["name"] for port in head["inputs"]]
    outputs = [port["name"] for port in head["outputs"]]
    try:
        import onnxruntime
    except ImportError:
        return in_openvino(path, names, outputs, threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda features: dict(zip(outputs, session.run(outputs, {n: features[n] for n in names})))  # noqa: B905 (Python 3.9)


def in_openvino(path, names, outputs, threads):
    try:
        import openvino
    except ImportError:
        return None
    properties = {"INFERENCE_PRECISION_HINT": "f32", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
    request = openvino.Core().compile_model(path, "CPU", properties).create_infer_request()

    def run(features):
        found = request.infer({n: features[n] for n in names}, share_outputs=False)
        return {n: found[n] for n in outputs}

    return run


def answers(head, results, images, pictures, folder):
    """A line for each image; maps are written to `folder`.

    Args:
        results: [B, ...], the head's output. images: paths. pictures: the same opened.
    """
    if head["kind"] == "classification":
        said = [", ".join(f"{label} {share:.1%}" for label, share in likeliest(head, logits)) for logits in results]
        return [f"{image}: {answer}" for image, answer in zip(images, said)]  # noqa: B905 (Python 3.9)
    names = [f"{Path(image).stem}-{head['name']}.png" for image in images]
    if len(set(names)) < len(names):
        names = [f"{i}-{name}" for i, name in enumerate(names)]
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for image, picture, values, name in zip(images, pictures, results, names):  # noqa: B905 (Python 3.9)
        drawn, text = dense_map(head, values, picture.size)
        drawn.save(folder / name)
        lines.append(f"{image}: {text}, written to {folder / name}")
    return lines


def class_name(head, k):
    """What output `k` stands for."""
    return head["classes"][k] if head["classes"] else f"class {head['ids'][k]}"


def likeliest(head, logits, most=5):
    """[(class, probability)] of one image, at most `most`, from its logits [K]."""
    shares = np.exp(logits.astype(np.float64) - logits.max())
    shares /= shares.sum()
    return [(class_name(head, k), float(shares[k])) for k in np.argsort(-shares, kind="stable")[:most]]


def dense_map(head, result, size):
    """One image's answer as a picture of `size` (w, h), its longer side at most LARGEST -> (Pillow image, a clause on it).

    Segmentation: class ids, from logits [N, K] upsampled bilinearly. Depth: whole millimetres, from metres [N].
    """
    side = round(len(result) ** 0.5)
    scale = min(1.0, LARGEST / max(size))
    size = tuple(max(1, round(length * scale)) for length in size)

    def enlarged(values):
        picture = Image.fromarray(values.reshape(side, side).astype(np.float32))
        return np.asarray(picture.resize(size, Image.Resampling.BILINEAR))

    if head["kind"] == "depth":
        metres = enlarged(result)
        text = f"{metres.min():.2f} to {metres.max():.2f} m; the picture holds millimetres"
        return Image.fromarray(np.clip(metres * 1000 + 0.5, 0, 65535).astype(np.uint16)), text
    best, index = enlarged(result[:, 0]).copy(), np.zeros(size[::-1], np.int64)
    for k in range(1, result.shape[1]):
        values = enlarged(result[:, k])
        index[values > best] = k
        np.maximum(best, values, out=best)
    counts = np.bincount(index.ravel(), minlength=result.shape[1])
    shares = [
        f"{class_name(head, k)} {counts[k] / index.size:.0%}" for k in np.argsort(-counts, kind="stable")[:5] if counts[k]
    ]
    ids = np.array(head["ids"])[index]
    if ids.max() > 65535:
        raise ValueError(f"class id {ids.max()} does not fit into a PNG; use `opened` and the logits")
    kind = np.uint8 if ids.max() < 256 else np.uint16
    return Image.fromarray(ids.astype(kind)), f"{', '.join(shares)}; the picture holds class ids"
