"""Items 04, 05 and 05b: the reference's heads and backbones, weights in official names."""

import re

import pytest
import torch

from distill.models.backbone import Backbone, BackboneConfig
from distill.models.heads import DINOHead, HeadConfig
from distill.models.names import from_official


def backbone_of(v, **overrides) -> Backbone:
    cfg = {k: v.number(f"in/cfg/{k}") for k in v.children("in/cfg/")}
    config = BackboneConfig(
        patch=cfg["patch_size"],
        image_size=cfg["img_size"],
        dim=cfg["embed_dim"],
        depth=cfg["depth"],
        heads=cfg["num_heads"],
        ffn="swiglu" if "swiglu" in cfg["ffn_layer"] else "mlp",
        registers=cfg["num_register_tokens"],
        **overrides,
    )
    model = Backbone(config).eval()
    model.load_state_dict(from_official(v.under("in/w/")), strict=True)
    return model


FILES = ["05_vit_mlp_reg0", "05_vit_mlp_reg4", "05_vit_swiglu_reg0", "05_vit_swiglu_reg4", "05b_vit_smallscale_eps"]


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_backbone_golden(vectors, name):
    v = vectors(name)
    checked = set()
    for variant in v.children("out/"):
        offset, antialias = variant.removeprefix("off").split("_")
        model = backbone_of(v, pos_offset=float(offset), pos_antialias=antialias == "aa")
        for size in v.children(f"out/{variant}/"):
            at = f"{variant}/{size}"
            images = v[f"in/x_{size}"]
            grid = tuple(int(s) // model.patch for s in size.split("x"))
            masks = v.get(f"in/masks_{size}")
            results = {
                "pos_embed": model.position(*grid),
                "patch_embed_tokens": model.patch_embed(images).flatten(1, 2),
                "prepared_tokens": model.tokens(images),
                **outputs(model, images, None),
            }
            if masks is not None:
                results |= {f"masked/{k}": x for k, x in outputs(model, images, masks).items()}
            results |= intermediates(model, images, v.children(f"out/{at}/"), grid)
            for key, got in results.items():
                if f"out/{at}/{key}" in v:
                    what = re.sub(r"/\d/.*", "", key).replace("/", ": ")
                    v.close(f"{at}/{key}", got, what, atol=1e-6 if key == "pos_embed" else 3e-5)
                    checked.add(f"out/{at}/{key}")
            part = "" if masks is None else "masked/"
            for key, got in outputs(model.train(), images, masks).items():  # other arithmetic: models/fused.py
                if f"out/{at}/{part}{key}" in v:
                    v.close(f"{at}/{part}{key}", got, f"{key}, by the blocks of training", atol=3e-5)
            model.eval()
    assert checked == {n for n in v.names if n.startswith("out/")}


def outputs(model: Backbone, images, masks) -> dict:
    """Under the reference's names; what `forward` leaves out (registers, tokens before the norm) from its parts."""
    features, before = model(images, masks), model.tokens(images, masks)
    for block in model.blocks:
        before = block(before)
    registers = model.norm(before)[:, 1 : 1 + model.config.registers]
    return {
        "x_norm_clstoken": features.cls,
        "x_norm_patchtokens": features.patches,
        "x_norm_regtokens": registers,
        "x_prenorm": before,
    }


def intermediates(model: Backbone, images, kinds: list[str], grid: tuple[int, int]) -> dict:
    """`intermediate_last2`, `intermediate_0_2_unnormed_reshaped`, ...: which blocks, normed or not, as maps or not."""
    found = {}
    for kind in (k for k in kinds if k.startswith("intermediate_")):
        numbers = [int(n) for n in re.findall(r"\d+", kind)]
        layers = range(model.n_blocks - numbers[0], model.n_blocks) if "last" in kind else numbers
        for i, got in enumerate(model.intermediate(images, list(layers), "unnormed" not in kind)):
            found[f"{kind}/{i}/cls"] = got.cls
            maps = got.patches.transpose(1, 2).unflatten(2, grid)
            found[f"{kind}/{i}/patch"] = maps if "reshaped" in kind else got.patches
    return found


def test_dino_head_golden(vectors):
    v = vectors("04_dino_head")
    cases = v.children("in/")
    assert cases
    for case in cases:
        for dtype, runs in ((torch.float32, ("out", "out64")), (torch.float64, ("out64",))):
            head, x = head_of(v, case).to(dtype), v[f"in/{case}/x"].to(dtype).requires_grad_()
            y = head(x)
            cotangent = v[f"in/{case}/cotangent"].to(dtype)
            cotangent[(x == 0).all(1)] = 0  # normalising a row of zeros has no useful gradient
            (y * cotangent).sum().backward()
            tolerance = {"atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-9}
            more = "" if dtype == torch.float32 else ", in float64"
            v.close(f"{case}/y", y, f"logits{more}", **tolerance, runs=runs)
            v.close(f"{case}/grad_x", x.grad, f"gradient of the input{more}", **tolerance, runs=runs)
            gradients = v.under(f"out/{case}/grad/")
            assert gradients.keys() == dict(head.named_parameters()).keys()
            for name, p in head.named_parameters():
                v.close(f"{case}/grad/{name}", p.grad, f"gradients of the parameters{more}", **tolerance, runs=runs)


def head_of(v, case: str) -> DINOHead:
    cfg = {k: v.number(f"in/{case}/cfg/{k}") for k in v.children(f"in/{case}/cfg/")}
    config = HeadConfig(
        prototypes=cfg["out_dim"],
        hidden=cfg["hidden_dim"],
        bottleneck=cfg["bottleneck_dim"],
        layers=cfg["nlayers"],
        bias=bool(cfg["mlp_bias"]),
    )
    head = DINOHead(cfg["in_dim"], config)
    head.load_state_dict(v.under(f"in/{case}/w/"), strict=True)
    return head
