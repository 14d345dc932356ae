"""Items 04, 05 and 05b: the reference's heads and backbones, weights in official names."""

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
    checked = 0
    for variant in v.children("out/"):
        offset, antialias = variant.removeprefix("off").split("_")
        model = backbone_of(v, pos_offset=float(offset), pos_antialias=antialias == "aa")
        for size in v.children(f"out/{variant}/"):
            h, w = (int(s) for s in size.split("x"))
            images, out = v[f"in/x_{size}"], v.under(f"out/{variant}/{size}/")
            close = lambda got, want, tol=3e-5: torch.testing.assert_close(got, want, rtol=0, atol=tol)  # noqa: E731
            if "pos_embed" in out:
                close(model.position(h // model.patch, w // model.patch), out["pos_embed"], 1e-6)
            features = model(images)
            close(features.cls, out["x_norm_clstoken"])
            checked += 1
            if "x_norm_patchtokens" in out:
                close(features.patches, out["x_norm_patchtokens"])
            if "prepared_tokens" in out:
                close(model.tokens(images), out["prepared_tokens"])
            if "masked/x_norm_clstoken" in out:
                masked = model(images, v[f"in/masks_{size}"])
                close(masked.cls, out["masked/x_norm_clstoken"])
                close(masked.patches, out["masked/x_norm_patchtokens"])
            for kind, layers, norm in (
                ("intermediate_last2", [model.n_blocks - 2, model.n_blocks - 1], True),
                ("intermediate_0_2_unnormed_reshaped", [0, 2], False),
            ):
                if f"{kind}/0/cls" not in out:
                    continue
                for i, got in enumerate(model.intermediate(images, layers, norm)):
                    close(got.cls, out[f"{kind}/{i}/cls"])
                    want = out[f"{kind}/{i}/patch"]
                    close(got.patches, want.flatten(2).transpose(1, 2) if want.ndim == 4 else want)
    assert checked > 0


def test_dino_head_golden(vectors):
    v = vectors("04_dino_head")
    cases = v.children("in/")
    assert cases
    for case in cases:
        cfg = {k: v.number(f"in/{case}/cfg/{k}") for k in v.children(f"in/{case}/cfg/")}
        head = DINOHead(
            cfg["in_dim"],
            HeadConfig(
                prototypes=cfg["out_dim"],
                hidden=cfg["hidden_dim"],
                bottleneck=cfg["bottleneck_dim"],
                layers=cfg["nlayers"],
                bias=bool(cfg["mlp_bias"]),
            ),
        )
        head.load_state_dict(v.under(f"in/{case}/w/"), strict=True)
        y = head(v[f"in/{case}/x"])
        cotangent = v[f"in/{case}/cotangent"]
        cotangent[3] = 0  # row 3 of x is zero: its normalisation has no useful gradient
        (y * cotangent).sum().backward()
        out = v.under(f"out/{case}/")
        close = lambda got, want: torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)  # noqa: E731
        close(y, out["y"])
        gradients = {k.removeprefix("grad/"): g for k, g in out.items() if k.startswith("grad/")}
        assert gradients, sorted(out)
        parameters = dict(head.named_parameters())
        for name, want in gradients.items():
            close(parameters[name].grad, want)
