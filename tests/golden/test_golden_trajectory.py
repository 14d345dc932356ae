"""Items 08, 08b and 09: six steps of pretraining and of distillation, from the reference's weights and batches."""

import pytest
import torch
from torch import nn

from distill.data.crops import CropsConfig
from distill.data.loader import Batch
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.headed import HeadedBackbone
from distill.models.heads import DINOHead, HeadConfig
from distill.models.names import from_official
from distill.objectives import ObjectivesConfig
from distill.optim import OptimConfig
from distill.runtime import RuntimeConfig
from distill.step import Stepper
from distill.train import TrainConfig
from distill.training_state import prepare_student


class OneProcess:
    """The part of Accelerator that a step uses, in plain float32."""

    num_processes = 1
    device = torch.device("cpu")

    def prepare_model(self, module: nn.Module) -> nn.Module:
        return module

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def settings_of(v) -> dict:
    return {k: v.number(f"in/cfg/{k}") for k in v.children("in/cfg/")}


def model_of(v, c: dict, prefix: str, dim: int, depth: int, heads: int) -> HeadedBackbone:
    state = v.under(prefix)
    split = lambda part: {k.removeprefix(f"{part}."): t for k, t in state.items() if k.startswith(f"{part}.")}  # noqa: E731
    backbone_state = from_official(split("backbone"))
    patch = c["patch_size"]
    backbone = Backbone(
        BackboneConfig(
            patch=patch,
            image_size=c["global_size"],
            dim=dim,
            depth=depth,
            heads=heads,
            ffn=c["ffn_layer"] if c["ffn_layer"] == "mlp" else "swiglu",
            registers=c["num_registers"],
            pos_offset=c["interpolate_offset"],
        )
    )
    backbone.load_state_dict(backbone_state, strict=True)

    def head(name: str) -> DINOHead:
        weights = split(f"{name}_head")
        layers = [k for k in weights if k.startswith("mlp.") and k.endswith("weight")]
        config = HeadConfig(
            prototypes=weights["last_layer.weight_v"].shape[0],
            bottleneck=weights["last_layer.weight_v"].shape[1],
            hidden=weights["mlp.0.weight"].shape[0],
            layers=len(layers),
        )
        made = DINOHead(dim, config)
        made.load_state_dict(weights, strict=True)
        return made

    return HeadedBackbone(backbone, head("dino"), head("ibot") if c["separate_head"] else None)


def without_key_biases(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Key biases have a zero gradient; Adam makes noise of it."""
    if name.endswith("attn.qkv.bias"):
        q, _, v = tensor.chunk(3)
        return torch.cat([q, v])
    return tensor


@pytest.mark.parametrize("name", ["08_trajectory", "08b_trajectory_centering_sharedhead", "09_distill"])
def test_trajectory_golden(vectors, name):
    v = vectors(name)
    c = settings_of(v)
    distill = bool(c.get("distill", 0))
    student = model_of(v, c, "in/student/", c["embed_dim"], c["depth"], c["num_heads"])
    total, batch = c["epochs"] * c["epoch_length"], c["batch"]
    share = lambda epochs: epochs / c["epochs"]  # noqa: E731
    config = TrainConfig(
        images=total * batch,
        batch=batch,
        crops=CropsConfig(global_size=c["global_size"], local_size=c["local_size"], local_count=c["n_local"]),
        mask_input=not distill,
        masks=None if distill else {},
        objectives=ObjectivesConfig(
            dino=c["dino_w"],
            ibot=c["ibot_w"],
            koleo=c["koleo_w"],
            teacher_temperature=(c["t0"], c["t1"]),
            temperature_warmup=share(c["warmup_teacher_temp_epochs"]),
            centring="sinkhorn" if c["centering"].startswith("sinkhorn") else "centre",
        ),
        optim=OptimConfig(
            lr=c["base_lr"],
            min_lr=c["min_lr"],
            warmup=share(c["warmup_epochs"]),
            weight_decay=(c["weight_decay"], c["weight_decay_end"]),
            ema=(c["momentum"], c["final_momentum"]),
            clip=c["clip_grad"],
            layer_decay=c["layerwise_decay"],
            patch_embed_lr=c["patch_embed_lr_mult"],
            freeze_last_layer=share(c["freeze_last_layer_epochs"]),
            beta2=c["beta2"],
        ),
        precision="fp32",
    )
    s = prepare_student(student, config.optim, config.objectives, config.mask_input, OneProcess())
    teacher = None
    if distill:
        teacher = model_of(v, c, "in/teacher/", c["teacher_embed_dim"], c["teacher_depth"], c["teacher_num_heads"])
    loop = Stepper(config, {"one": s}, teacher, total, OneProcess(), RuntimeConfig())
    for step in range(c["n_steps"]):
        at = lambda key: v[f"in/step{step}/{key}"]  # noqa: E731, B023
        crops = Batch(at("collated_global_crops"), at("collated_local_crops"), at("collated_masks"))
        told = loop.step(step, crops)["one"]
        terms, norms = told.terms, told.more
        for ours in terms:
            assert terms[ours] == pytest.approx(v[f"out/contribution/{ours}"][step].item(), rel=3e-6, abs=1e-7), (ours, step)
        assert sum(terms.values()) == pytest.approx(v["out/total_loss"][step].item(), rel=3e-6)
        for part, theirs in (("backbone", "backbone"), ("dino", "dino_head"), ("ibot", "ibot_head")):
            if f"grad_norm_{part}" in norms and f"out/grad_norm_before_clip/{theirs}" in v:
                want = v[f"out/grad_norm_before_clip/{theirs}"][step].item()
                assert norms[f"grad_norm_{part}"] == pytest.approx(want, rel=1e-5), (part, step)
    final = from_official({k.removeprefix("backbone."): t for k, t in v.under("out/final_student/").items() if "backbone" in k})
    assert final
    ours = student.backbone.state_dict()
    for key, want in final.items():
        torch.testing.assert_close(
            without_key_biases(key, ours[key]), without_key_biases(key, want), rtol=0, atol=2e-6, msg=key
        )
