"""Items 08, 08b and 09: six steps of pretraining and of distillation, from the reference's weights and batches."""

from functools import partial

import pytest
import torch
from torch import nn

from distill.data.crops import CropsConfig
from distill.data.loader import Batch
from distill.losses.ibot import patch_weights
from distill.models.backbone import Backbone, BackboneConfig
from distill.models.headed import HeadedBackbone
from distill.models.heads import DINOHead, HeadConfig
from distill.models.names import from_official, to_official
from distill.objectives import ObjectivesConfig
from distill.optim import OptimConfig
from distill.runtime import RuntimeConfig
from distill.step import Stepper
from distill.train import TrainConfig
from distill.training_state import Student, prepare_student


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
            pos_antialias=bool(c["interpolate_antialias"]),
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


PARTS = {"backbone": "backbone", "dino": "dino_head", "ibot": "ibot_head"}  # ours and theirs


def parameters_of(model: HeadedBackbone) -> dict[str, torch.Tensor]:
    """Under the reference's names."""
    found = {}
    for ours, theirs in PARTS.items():
        if (part := getattr(model, ours)) is not None:
            own: dict[str, torch.Tensor] = dict(part.named_parameters())
            if ours == "backbone":
                own = to_official(own, swiglu=part.config.shape()[3] == "swiglu")
            found |= {f"{theirs}.{name}": p for name, p in own.items()}
    return found


def without_key_biases(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Key biases have a zero gradient; Adam makes noise of it."""
    if name.endswith("attn.qkv.bias"):
        q, _, v = tensor.chunk(3)
        return torch.cat([q, v])
    return tensor


def norms_of(tensors) -> torch.Tensor:
    return torch.stack([torch.tensor(-1.0) if t is None else t.detach().norm() for t in tensors])


def norm_of(tensors) -> torch.Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors]).norm()


class Comparison:
    """One training beside the reference's: what is compared before, in and after every step."""

    def __init__(self, v, loop: Stepper, student: Student, clip: float):
        self.v, self.loop, self.student, self.clip = v, loop, student, clip
        self.mine, self.average = parameters_of(student.module), parameters_of(student.average)
        self.names = v.arrays["out/param_names"].tolist()
        assert set(self.names) == set(self.mine)
        self.began = {n: p.detach().clone() for n, p in self.mine.items()}
        self.no_keys = torch.tensor([not n.endswith("attn.qkv.bias") for n in self.names])

    def at(self, step: int, key: str, got, what: str, **tolerance) -> None:
        """With element `step` of an array over the steps."""
        self.v.close(key, got, what, **tolerance, of=lambda x: x[step])

    def before(self, step: int, batch: Batch) -> None:
        s, wanted = self.loop.schedules, {"rtol": 1e-12, "atol": 1e-15}
        for key, value in {
            "lr": s.lr(step), "wd": s.weight_decay(step), "momentum": s.ema(step), "last_layer_lr": s.last_layer_lr(step),
            "teacher_temp": self.loop.temperature(step),
        }.items():  # fmt: skip
            self.at(step, key, value, "schedules", **wanted)
        for which in ("dino", "ibot"):
            if f"out/{which}_center_norm_used" in self.v:
                centre = self.loop.extras[which].centre.norm()
                self.at(step, f"{which}_center_norm_used", centre, "norms of the centres", rtol=1e-5)
        at = f"in/step{step}"
        assert torch.equal(batch.masks.flatten().nonzero().flatten(), self.v[f"{at}/mask_indices_list"])
        torch.testing.assert_close(patch_weights(batch.masks) * len(batch.masks), self.v[f"{at}/masks_weight"])

    def after(self, step: int, terms: dict[str, float], more: dict[str, float]) -> None:
        loss = {"rtol": 3e-6, "atol": 1e-7}
        for key, value in terms.items():
            self.at(step, f"contribution/{key}", value, "terms of the loss", **loss)
        self.at(step, "total_loss", sum(terms.values()), "loss", rtol=3e-6)
        for key, value in {
            "dino_global_crops": terms["dino_global"], "dino_local_crops": terms["dino_local"],
            "ibot": terms["ibot"] / 2, "koleo": terms["koleo"] / 2,
        }.items():  # fmt: skip
            self.at(step, f"displayed/{key}_loss", value, "what the reference logs (half of iBOT and KoLeo)", **loss)
        before = {theirs: more[f"grad_norm_{ours}"] for ours, theirs in PARTS.items() if f"grad_norm_{ours}" in more}
        for part, norm in before.items():
            self.at(step, f"grad_norm_before_clip/{part}", norm, "gradient norms of the modules", rtol=1e-5)
        gradients = {n: self.unclipped(p.grad, before[n.split(".")[0]]) for n, p in self.mine.items()}
        norms = norms_of(gradients[n] for n in self.names)
        self.at(step, "grad_norm_param", norms, "gradient norms of the parameters", rtol=1e-5, atol=1e-6)
        if step == 0:
            for name in self.v.under("out/grad_step0/"):
                self.v.close(f"grad_step0/{name}", gradients[name], "gradients of the first step", rtol=1e-5, atol=1e-6)
        for whose, own in (("student", self.mine), ("ema", self.average)):
            self.at(step, f"{whose}_norm_after", norm_of(own.values()), f"norm of the {whose}", rtol=1e-5)
            for part in set(before) - {"backbone"}:  # key biases move as rounding has it
                moved = norm_of(p.detach() - self.began[n] for n, p in own.items() if n.startswith(part))
                self.at(
                    step, f"{whose}_moved_from_init/{part}", moved, f"how far heads of the {whose} moved", rtol=1e-5, atol=1e-6
                )

    def unclipped(self, gradient: torch.Tensor | None, norm: float) -> torch.Tensor | None:
        return None if gradient is None else gradient / min(1.0, self.clip / (norm + 1e-6))

    def at_the_end(self) -> None:
        for name in self.v.under("out/final_student/"):
            of = partial(without_key_biases, name)
            self.v.close(f"final_student/{name}", of(self.mine[name]), "the student's weights", atol=2e-6, of=of)
        for whose, own in (("student", self.mine), ("ema", self.average)):
            norms = norms_of(own[n] for n in self.names)[self.no_keys]
            what = f"norms of the {whose}'s parameters"
            self.v.close(f"final_{whose}_norm", norms, what, rtol=1e-5, atol=2e-6, of=lambda x: x[self.no_keys])
        if "out/final_frozen_teacher_norm" in self.v:
            norm = norm_of(self.loop.teacher.parameters())
            self.v.close("final_frozen_teacher_norm", norm, "norm of the frozen teacher", rtol=1e-6)


@pytest.mark.parametrize("name", ["08_trajectory", "08b_trajectory_centering_sharedhead", "09_distill"])
def test_trajectory_golden(vectors, name):
    v = vectors(name)
    c = settings_of(v)
    distill = bool(c.get("distill", 0))
    assert c["beta1"] == 0.9  # ours is no setting
    config = train_config(c, distill)
    student = model_of(v, c, "in/student/", c["embed_dim"], c["depth"], c["num_heads"])
    s = prepare_student(student, config.optim, config.objectives, config.mask_input, OneProcess())
    teacher = None
    if distill:
        teacher = model_of(v, c, "in/teacher/", c["teacher_embed_dim"], c["teacher_depth"], c["teacher_num_heads"])
    loop = Stepper(config, {"one": s}, teacher, config.steps(), OneProcess(), RuntimeConfig())
    comparison = Comparison(v, loop, s, c["clip_grad"])
    for step in range(c["n_steps"]):
        crops = Batch(*(v[f"in/step{step}/collated_{part}"] for part in ("global_crops", "local_crops", "masks")))
        comparison.before(step, crops)
        told = loop.step(step, crops)["one"]
        comparison.after(step, told.terms, told.more)
    comparison.at_the_end()


def train_config(c: dict, distill: bool) -> TrainConfig:
    """The file's settings as ours."""
    share = lambda epochs: epochs / c["epochs"]  # noqa: E731
    return TrainConfig(
        images=c["epochs"] * c["epoch_length"] * c["batch"],
        batch=c["batch"],
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
