"""Item 07: schedules and the layer-wise multipliers."""

import re

import torch

from distill.optim import OptimConfig, make_optimizer
from distill.schedules import Cosine, Linear, is_decayed, layer_multiplier

EXACT = {"rtol": 1e-12, "atol": 1e-15}


def test_schedules_golden(vectors):
    v = vectors("07_schedules")
    c = {k: v.number(f"in/{k}") for k in v.children("in/")}
    length, total, warm, freeze = int(c["L"]), int(c["epochs"] * c["L"]), int(c["warmup"] * c["L"]), int(c["freeze"] * c["L"])
    lr = c["base_lr"] * (c["bs"] / 1024) ** 0.5
    v.close("scaled_lr", lr, "learning rate of the batch", **EXACT)
    schedules = {
        "lr": Cosine(lr, c["min_lr"], total, warm),
        "wd": Cosine(c["wd"], c["wde"], total),
        "momentum": Cosine(c["m"], 1.0, total),
        "teacher_temp": Linear(c["t0"], c["t1"], int(c["tt"] * length)),
        "last_layer_lr": lambda s: 0.0 if s < freeze else schedules["lr"](s),
    }
    for name, schedule in schedules.items():
        steps = range(len(v[f"out/{name}"]))
        v.close(name, [schedule(s) for s in steps], f"schedule: {name}", **EXACT)
    for name in (n.removeprefix("out/") for n in v.names if n.startswith("out/generic_")):
        freeze, warm, total, base, final, start = (float(x) for x in re.findall(r"[a-z](\d+(?:\.\d+)?)", name))
        schedule = Cosine(base, final, int(total), int(warm), start, int(freeze))
        steps = range(len(v[f"out/{name}"]))
        v.close(name, [schedule(s) for s in steps], "schedule: generic", **EXACT)


class Named:
    """The face of a module that an optimiser is made for."""

    def __init__(self, names: list[str]):
        self.names = names

    def modules(self):
        return []

    def named_parameters(self):
        return [(n, torch.nn.Parameter(torch.zeros(1))) for n in self.names]


def test_parameter_groups_golden(vectors):
    v = vectors("07_schedules")
    decay, patch = v.number("in/lw"), v.number("in/pe")
    for kind in v.children("out/groups/"):
        names = v.arrays[f"out/groups/{kind}/names"].tolist()
        blocks = 1 + max((int(n.split(".")[1]) for n in names if n.startswith("blocks.")), default=-1)
        lr = [layer_multiplier(n, blocks, decay, patch) if "head" not in kind else 1.0 for n in names]
        at = f"groups/{kind}"
        v.close(f"{at}/lr_multiplier", lr, "multipliers of parameters", **EXACT)
        v.close(f"{at}/wd_multiplier", [float(is_decayed(n)) for n in names], "multipliers of parameters", **EXACT)
        v.close(f"{at}/is_last_layer", ["last_layer" in n for n in names], "multipliers of parameters", **EXACT)
        module = "dino" if "head" in kind else "backbone"
        optimizer = make_optimizer({module: Named(names)}, blocks, OptimConfig(layer_decay=decay, patch_embed_lr=patch))
        v.close(f"{at}/n_fused_groups", len(optimizer.param_groups), "number of parameter groups")
