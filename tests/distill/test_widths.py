"""Networks whose blocks differ in width: built, counted, trained, saved and resized like any other."""

import re
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distill.data.preprocess import Preprocess
from distill.memory import image_activations
from distill.models.backbone import Backbone, BackboneConfig, BlockWidths, flops_per_image, parameter_count
from distill.models.checkpoints import load_backbone, save_model
from distill.models.kinds import backbone_flops, backbone_measures, backbone_parameters, read_config

torch.set_num_threads(1)

WIDTHS = [BlockWidths(heads=1, hidden=40), BlockWidths(heads=3, hidden=16), BlockWidths(heads=2, hidden=64)]
PRUNED: dict[str, Any] = {"dim": 24, "patch": 8, "image_size": 32, "head_dim": 16, "layer_scale": 1.0, "init": "fan_in"}
VARIANTS: list[dict[str, Any]] = [{}, {"ffn": "swiglu"}, {"layer_scale": 0.0}, {"registers": 2}]


def pruned(**changes: Any) -> Backbone:
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(**(PRUNED | {"blocks": WIDTHS} | changes)))
    with torch.no_grad():
        model.cls_token.normal_()
    return model.eval()


def images(n: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_formulas_hold(changes):
    model = pruned(**changes)
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters()) == backbone_parameters(model.config)
    assert backbone_measures(model.config) == (24, 8, 3)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images(1))
    assert counter.get_total_flops() == flops_per_image(model.config, 32) == backbone_flops(model.config, 32)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_training_gives_the_same_numbers_and_gradients_as_the_plain_blocks(changes):
    """The fused halves, whose attention is wider or narrower than the stream, against timm's modules, in double precision."""
    found = []
    for plain in (False, True):
        model: Any = pruned(**changes).double()
        model.train_with(recompute=False, compiled=False)
        for block in model.blocks:
            block.plain = plain
        model.train()
        out = model(images().double())
        (out.cls.square().sum() + out.patches.sin().sum()).backward()
        found.append((out.cls, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (fused, ours), (plain_cls, theirs) = found
    assert torch.allclose(fused, plain_cls, atol=1e-10)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-9), name


def test_attention_says_the_truth_about_its_shape():
    attn: Any = pruned().blocks[1].attn
    assert (attn.num_heads, attn.head_dim, attn.attn_dim, attn.scale) == (3, 16, 48, 0.25)
    assert attn.qkv.weight.shape == (144, 24)
    assert attn.proj.weight.shape == (24, 48)


@pytest.mark.parametrize("changes", [{}, {"ffn": "swiglu"}], ids=str)
def test_a_model_folder_rebuilds_it_exactly(tmp_path, changes):
    model = pruned(**changes)
    save_model(tmp_path, model, Preprocess(size=32, resize=32, normalize="per_image"))
    loaded = load_backbone(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(images()).patches, model(images()).patches)


def test_another_resolution():
    model = pruned()
    assert model.at_size(48).config.blocks == WIDTHS
    assert torch.equal(model.at_size(48)(images(1, 48)).cls, model(images(1, 48)).cls)


def test_folders_of_before_still_load():
    old = {"kind": "vit", "arch": "vit_small", "dim": 32, "depth": 2, "heads": 2, "patch": 8, "image_size": 32}
    config = read_config(old)
    assert isinstance(config, BackboneConfig)
    assert config.blocks is None
    assert config.regular()
    assert config.widths() == [BlockWidths(heads=2, hidden=128)] * 2


def test_widths_that_say_what_the_shape_says_change_nothing():
    plain = BackboneConfig(dim=32, depth=2, heads=2, patch=8, image_size=32)
    said = BackboneConfig(dim=32, patch=8, image_size=32, head_dim=16, blocks=[BlockWidths(heads=2, hidden=128)] * 2)
    assert said.regular()
    assert parameter_count(plain) == parameter_count(said)
    assert not BackboneConfig(dim=24, patch=8, image_size=32, head_dim=16, blocks=WIDTHS).regular()
    assert not BackboneConfig(dim=32, depth=2, heads=2, head_dim=8).regular()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"head_dim": None}, "blocks needs head_dim"),
        ({"head_dim": 0}, "head_dim must be at least 1"),
        ({"blocks": []}, "blocks must name at least one block"),
        ({"blocks": [BlockWidths(heads=0, hidden=8)]}, r"blocks\[0\] must have at least 1 head"),
        ({"blocks": [BlockWidths(heads=1, hidden=0)]}, r"blocks\[0\] must have at least 1 head"),
        ({"heads": 2}, "heads contradicts blocks"),
        ({"depth": 4}, "depth 4 contradicts blocks, which names 3"),
        ({"dim": 0}, "must be at least 1"),
    ],
    ids=str,
)
def test_nonsense_is_refused(changes, sentence):
    assert BackboneConfig(**(PRUNED | {"blocks": WIDTHS})).problems() == []
    problems = BackboneConfig(**(PRUNED | {"blocks": WIDTHS} | changes)).problems()
    assert any(re.search(sentence, p) for p in problems), problems


def test_memory_counts_the_widths_that_there_are():
    wide = BackboneConfig(dim=24, patch=8, image_size=32, head_dim=16, blocks=[BlockWidths(heads=3, hidden=64)] * 3)
    for recompute in (False, True):
        assert image_activations(pruned().config, 32, 4, recompute) < image_activations(wide, 32, 4, recompute)
    regular = BackboneConfig(dim=32, depth=2, heads=2, patch=8, image_size=32)
    said = BackboneConfig(dim=32, patch=8, image_size=32, head_dim=16, blocks=[BlockWidths(heads=2, hidden=128)] * 2)
    assert image_activations(regular, 32, 4, False) == image_activations(said, 32, 4, False)
