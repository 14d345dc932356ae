"""Item 07: schedules and the layer-wise multipliers."""

import re

import numpy as np

from distill.schedules import Cosine, Linear, is_decayed, layer_multiplier


def test_schedules_golden(vectors):
    v = vectors("07_schedules")
    c = {k: v.number(f"in/{k}") for k in v.children("in/")}
    length, total, warm, freeze = int(c["L"]), int(c["epochs"] * c["L"]), int(c["warmup"] * c["L"]), int(c["freeze"] * c["L"])
    lr = c["base_lr"] * (c["bs"] / 1024) ** 0.5
    assert abs(lr - v.number("out/scaled_lr")) < 1e-12
    schedules = {
        "lr": Cosine(lr, c["min_lr"], total, warm),
        "wd": Cosine(c["wd"], c["wde"], total),
        "momentum": Cosine(c["m"], 1.0, total),
        "teacher_temp": Linear(c["t0"], c["t1"], int(c["tt"] * length)),
        "last_layer_lr": lambda s: 0.0 if s < freeze else schedules["lr"](s),
    }
    for name, schedule in schedules.items():
        want = v[f"out/{name}"].numpy()
        np.testing.assert_allclose([schedule(s) for s in range(len(want))], want, rtol=1e-12, atol=1e-15, err_msg=name)
    for name in (n for n in v.names if n.startswith("out/generic_")):
        freeze, warm, total, base, final, start = (float(x) for x in re.findall(r"[a-z](\d+(?:\.\d+)?)", name))
        schedule = Cosine(base, final, int(total), int(warm), start, int(freeze))
        want = v[name].numpy()
        np.testing.assert_allclose([schedule(s) for s in range(len(want))], want, rtol=1e-12, atol=1e-15)


def test_parameter_groups_golden(vectors):
    v = vectors("07_schedules")
    decay, patch = v.number("in/lw"), v.number("in/pe")
    for kind in v.children("out/groups/"):
        names = v.arrays[f"out/groups/{kind}/names"].tolist()
        blocks = 1 + max((int(n.split(".")[1]) for n in names if n.startswith("blocks.")), default=-1)
        lr = [layer_multiplier(n, blocks, decay, patch) if "head" not in kind else 1.0 for n in names]
        np.testing.assert_allclose(lr, v[f"out/groups/{kind}/lr_multiplier"].numpy(), rtol=1e-12)
        assert [float(is_decayed(n)) for n in names] == v[f"out/groups/{kind}/wd_multiplier"].tolist()
        assert ["last_layer" in n for n in names] == v[f"out/groups/{kind}/is_last_layer"].tolist()
