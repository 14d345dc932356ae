"""Items 01 to 03 and 06: targets, DINO, iBOT, KoLeo and the statistics of block masks."""

import numpy as np
import pytest
import torch

from distill.data.masks import batch_masks, block_mask
from distill.losses.dino import dino_global, dino_local
from distill.losses.ibot import patch_weights
from distill.losses.koleo import koleo_loss
from distill.losses.prototypes import prototype_cross_entropy
from distill.losses.targets import Centring, Dense, sinkhorn_knopp


def close(got, want, rtol=2e-6, atol=1e-6):
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def cross_entropy(logits, targets, weights):
    return prototype_cross_entropy(logits, targets, weights, 0.1)


def test_sinkhorn_golden(vectors):
    v = vectors("01_dino_loss")
    cases = [c for c in v.children("in/") if c.startswith("sk")]
    assert cases
    for case in cases:
        logits, t = v[f"in/{case}/teacher_logits"], v.number(f"in/{case}/teacher_temp")
        close(sinkhorn_knopp(logits, t), v[f"out/{case}/targets"])
        close(sinkhorn_knopp(logits, t, 1), v[f"out/{case}/targets_1iter"])


@pytest.mark.parametrize(("name", "rows"), [("01_dino_loss", "samples"), ("02_ibot_loss", "patches")])
def test_centring_golden(vectors, name, rows):
    v = vectors(name)
    logits = [v[n] for n in v.names if n.startswith("in/center/teacher_logits_step")]
    t = v.number("in/center/teacher_temp" if "in/center/teacher_temp" in v else "in/teacher_temp")
    centring = Centring(logits[0].shape[1])
    for step, x in enumerate(logits):
        close(centring.centre.flatten(), v[f"out/center/center_used_step{step}"].flatten())
        close(centring([x], t)[0].whole(), v[f"out/center/targets_step{step}"])
    close(centring.centre.flatten(), v[f"out/center/center_after_step{len(logits) - 1}"].flatten())


def test_dino_loss_golden(vectors):
    v = vectors("01_dino_loss")
    n_local = v.number("in/ce/n_local_crops")
    student_global = v["in/ce/student_global_logits"].requires_grad_()
    student_local = v["in/ce/student_local_logits"].requires_grad_()
    k = student_global.shape[1]
    targets = sinkhorn_knopp(v["in/ce/teacher_logits"], v.number("in/ce/teacher_temp")).view(2, -1, k)
    close(targets.flip(0), v["out/ce/targets_swapped"])
    loss_global = dino_global(student_global, targets, n_local, cross_entropy)
    loss_local = dino_local(student_local, targets, n_local, cross_entropy)
    close(loss_global, v["out/ce/dino_global_crops_loss"])
    close(loss_local, v["out/ce/dino_local_crops_loss"])
    (loss_global + loss_local).backward()
    close(student_global.grad, v["out/ce/grad_student_global"])
    close(student_local.grad, v["out/ce/grad_student_local"])


def test_ibot_loss_golden(vectors):
    v = vectors("02_ibot_loss")
    masks, m = v["in/masks"], v.number("in/n_masked_patches")
    weights = patch_weights(masks)
    close(weights * len(masks), v["out/masks_weight"])
    targets = sinkhorn_knopp(v["in/teacher_logits"][:m], v.number("in/teacher_temp"))
    close(targets, v["out/sk_targets"])
    student = v["in/student_logits"].requires_grad_()
    loss = cross_entropy(student[:m], Dense(targets), weights)
    for name in ("loss_sk", "loss_sk_padded", "loss_sk_noweight"):
        close(loss, v[f"out/{name}"])
    loss.backward()
    close(student.grad, v["out/loss_sk_grad_student"])
    full = torch.softmax(v["in/full/teacher_logits"] / v.number("in/teacher_temp"), -1)
    close(cross_entropy(v["in/full/student_logits"][masks], Dense(full[masks]), weights), v["out/full/loss"])


def test_koleo_golden(vectors):
    v = vectors("03_koleo")
    for case in v.children("in/"):
        x = v[f"in/{case}"].requires_grad_()
        loss = koleo_loss(x)
        close(loss, v[f"out/{case}/loss"], rtol=1e-5 if "duplicate" in case else 2e-6)
        loss.backward()
        assert x.grad.isfinite().all()
        if f"out/{case}/grad" in v:
            close(x.grad, v[f"out/{case}/grad"], rtol=1e-5)


def test_block_mask_statistics_golden(vectors):
    v = vectors("06_masking_stats")
    side = v.number("in/img_size") // v.number("in/patch_size")
    g, draws = np.random.default_rng(0), 500
    for ratio in v.children("out/"):
        if not ratio.startswith("ratio"):
            continue
        target = v.number(f"out/{ratio}/target_count")
        masks = np.stack([block_mask(g, (side, side), target) for _ in range(draws)])
        counts = masks.sum((1, 2))
        assert counts.max() <= target
        reference = v[f"out/{ratio}/counts"].double()
        error = np.hypot(counts.std(ddof=1) / draws**0.5, reference.std().item() / len(reference) ** 0.5)
        assert abs(counts.mean() - reference.mean().item()) < 4.5 * error, ratio
        masked = masks[:, :, :-1]
        agreement = (masked & masks[:, :, 1:]).sum() / masked.sum()
        assert abs(agreement - v.number(f"out/{ratio}/neighbour_agreement")) < 0.02, ratio


def test_batch_masks_golden(vectors):
    v = vectors("06_masking_stats")
    side, crops = v.number("in/img_size") // v.number("in/patch_size"), v.number("out/collate/n_global_crops")
    g, low_high = np.random.default_rng(1), tuple(v["in/mask_ratio_min_max"].tolist())
    counts = np.stack(
        [np.sort(batch_masks(g, crops, (side, side), v.number("in/mask_probability"), low_high).sum(1)) for _ in range(300)]
    )
    assert ((counts > 0).sum(1) == v["out/collate/n_crops_masked_min_max"][0].item()).all()
    want, spread = v["out/collate/sorted_counts_mean"].numpy(), v["out/collate/sorted_counts_std"].numpy()
    assert (abs(counts.mean(0) - want) <= 4.5 * (spread + 0.05) / 300**0.5 + 0.02).all()
