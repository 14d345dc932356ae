"""Items 01 to 03 and 06: targets, DINO, iBOT, KoLeo and the statistics of block masks."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from distill.data.masks import batch_masks, block_mask
from distill.losses.dino import dino_global, dino_local
from distill.losses.ibot import patch_weights
from distill.losses.koleo import koleo_loss
from distill.losses.prototypes import prototype_cross_entropy
from distill.losses.targets import Centring, Dense, sinkhorn_knopp

SAME = {"rtol": 2e-6, "atol": 1e-6}


def cross_entropy(logits, targets, weights):
    return prototype_cross_entropy(logits, targets, weights, 0.1)


def test_sinkhorn_golden(vectors):
    v = vectors("01_dino_loss")
    cases = [c for c in v.children("in/") if c.startswith("sk")]
    assert cases
    for case in cases:
        logits, t = v[f"in/{case}/teacher_logits"], v.number(f"in/{case}/teacher_temp")
        v.close(f"{case}/targets", sinkhorn_knopp(logits, t), "Sinkhorn-Knopp, 3 iterations", **SAME)
        v.close(f"{case}/targets_1iter", sinkhorn_knopp(logits, t, 1), "Sinkhorn-Knopp, 1 iteration", **SAME)


@pytest.mark.parametrize("name", ["01_dino_loss", "02_ibot_loss"])
def test_centring_golden(vectors, name):
    v = vectors(name)
    logits = [v[n] for n in v.names if n.startswith("in/center/teacher_logits_step")]
    t = v.number("in/center/teacher_temp" if "in/center/teacher_temp" in v else "in/teacher_temp")
    centring = Centring(logits[0].shape[1])
    for step, x in enumerate(logits):
        v.close(f"center/center_used_step{step}", centring.centre, "moving centre", **SAME)
        targets = centring([x], t)[0]
        v.close(f"center/targets_step{step}", targets.whole(), "targets of the moving centre", **SAME)
        if f"out/center/loss_step{step}" in v:
            m, masks = len(x), v["in/masks"]
            assert m == masks.sum() or step > 0
            if m == masks.sum():  # the file holds masks for one of the batches
                loss = cross_entropy(v["in/student_logits"][:m], targets, patch_weights(masks))
                v.close(f"center/loss_step{step}", loss, "loss with a moving centre", **SAME)
    v.close(f"center/center_after_step{len(logits) - 1}", centring.centre, "moving centre", **SAME)


def test_dino_loss_golden(vectors):
    v = vectors("01_dino_loss")
    n_local = v.number("in/ce/n_local_crops")
    student_global = v["in/ce/student_global_logits"].requires_grad_()
    student_local = v["in/ce/student_local_logits"].requires_grad_()
    k = student_global.shape[1]
    targets = sinkhorn_knopp(v["in/ce/teacher_logits"], v.number("in/ce/teacher_temp")).view(2, -1, k)
    v.close("ce/targets_swapped", targets.flip(0), "targets, crops swapped", **SAME)
    loss_global = dino_global(student_global, targets, n_local, cross_entropy)
    loss_local = dino_local(student_local, targets, n_local, cross_entropy)
    terms = 2 + 2 * n_local
    v.close("ce/dino_global_crops_loss", loss_global, "DINO, global crops", **SAME)
    v.close("ce/dino_local_crops_loss", loss_local, "DINO, local crops", **SAME)
    v.close("ce/raw_global_mean_ce", loss_global * terms / 2, "DINO before the division by the pairs", **SAME)
    v.close("ce/raw_local_sum_of_pair_means", loss_local * terms, "DINO before the division by the pairs", **SAME)
    v.close("ce/total", loss_global + loss_local, "DINO, total", **SAME)
    (loss_global + loss_local).backward()
    v.close("ce/grad_student_global", student_global.grad, "DINO, gradients", **SAME)
    v.close("ce/grad_student_local", student_local.grad, "DINO, gradients", **SAME)


def test_ibot_loss_golden(vectors):
    v = vectors("02_ibot_loss")
    masks, m = v["in/masks"], v.number("in/n_masked_patches")
    assert v.number("in/upperbound") == len(v["in/student_logits"]) > m  # the rest is padding
    weights = patch_weights(masks)
    v.close("masks_weight", weights * len(masks), "weights of patches", **SAME)
    targets = sinkhorn_knopp(v["in/teacher_logits"][:m], v.number("in/teacher_temp"))
    v.close("sk_targets", targets, "Sinkhorn-Knopp, 3 iterations", **SAME)
    student = v["in/student_logits"].requires_grad_()
    loss = cross_entropy(student[:m], Dense(targets), weights)
    for name in ("loss_sk", "loss_sk_padded", "loss_sk_noweight"):
        v.close(name, loss, "iBOT", **SAME)
    loss.backward()
    v.close("loss_sk_grad_student", student.grad, "iBOT, gradient (0 on padding)", **SAME)
    # Padding that has no weight changes nothing either.
    padded = [F.pad(x, (0, 0, 0, len(student) - m), value=1.0) for x in (student[:m], targets)]
    loss = cross_entropy(padded[0], Dense(padded[1]), F.pad(weights, (0, len(student) - m)))
    v.close("loss_sk_padded", loss, "iBOT, padded", **SAME)
    full = torch.softmax(v["in/full/teacher_logits"] / v.number("in/teacher_temp"), -1)
    loss = cross_entropy(v["in/full/student_logits"][masks], Dense(full[masks]), weights)
    v.close("full/loss", loss, "iBOT from whole crops", **SAME)


def test_koleo_golden(vectors):
    v = vectors("03_koleo")
    for case in v.children("in/"):
        rtol = 1e-5 if "duplicate" in case else 2e-6
        kind = "KoLeo, duplicate rows" if "duplicate" in case else "KoLeo"
        x = v[f"in/{case}"].requires_grad_()
        loss = koleo_loss(x)
        v.close(f"{case}/loss", loss, kind, rtol, 1e-6)
        loss.backward()
        assert x.grad.isfinite().all()
        x64 = v[f"in/{case}"].double().requires_grad_()
        loss64 = koleo_loss(x64)
        v.close(f"{case}/loss", loss64, f"{kind}, in float64", 1e-9, runs=("out64",))
        if f"out/{case}/grad" in v:
            v.close(f"{case}/grad", x.grad, "KoLeo, gradient", 1e-5, 1e-6)
            loss64.backward()
            # Longer arrays are stored rounded to float32.
            v.close(f"{case}/grad", x64.grad, "KoLeo, gradient in float64", 1e-7, 1e-9, runs=("out64",))


def test_block_mask_statistics_golden(vectors):
    v = vectors("06_masking_stats")
    side = v.number("in/img_size") // v.number("in/patch_size")
    g, draws = np.random.default_rng(0), 500
    assert side**2 == v.number("out/n_tokens")
    for ratio in v.children("out/"):
        if not ratio.startswith("ratio"):
            continue
        target = v.number(f"out/{ratio}/target_count")
        masks = np.stack([block_mask(g, (side, side), target) for _ in range(draws)])
        counts, theirs = masks.sum((1, 2)), v[f"out/{ratio}/counts"].double().numpy()
        assert counts.max() <= target
        v.within("masked patches: mean", standard_errors(counts, theirs), 4.5)
        # Most draws reach the target, so the share says more than the deviation, which a few outliers carry.
        v.within(
            "masked patches: share of draws that reach the target", standard_errors(counts == target, theirs == target), 4.5
        )
        want = v[f"out/{ratio}/position_frequency"].numpy()
        likely = (want * len(theirs) + 1) / (len(theirs) + 2)  # never quite 0 or 1
        error = np.sqrt(likely * (1 - likely) * (1 / draws + 1 / len(theirs)))
        v.within("masked patches: how often each position", (masks.mean(0) - want) / error, 5.0)
        masked = masks[:, :, :-1]
        agreement = (masked & masks[:, :, 1:]).sum() / masked.sum()
        assert abs(agreement - v.number(f"out/{ratio}/neighbour_agreement")) < 0.02, ratio


def standard_errors(ours, theirs) -> float:
    """The difference of two samples' means, in standard errors."""
    error = np.hypot(*(x.std(ddof=1) / len(x) ** 0.5 for x in (ours, theirs)))
    return (ours.mean() - theirs.mean()) / max(error, 1e-9)


def test_batch_masks_golden(vectors):
    v = vectors("06_masking_stats")
    side, crops = v.number("in/img_size") // v.number("in/patch_size"), v.number("out/collate/n_global_crops")
    g, low_high, draws = np.random.default_rng(1), tuple(v["in/mask_ratio_min_max"].tolist()), 300
    drawn = [batch_masks(g, crops, (side, side), v.number("in/mask_probability"), low_high) for _ in range(draws)]
    counts = np.stack([np.sort(masks.sum(1)) for masks in drawn])
    fewest_most = v["out/collate/n_crops_masked_min_max"].tolist()
    assert [(counts > 0).sum(1).min(), (counts > 0).sum(1).max()] == fewest_most
    assert counts.sum(1).max() <= v["out/collate/upperbound"].min()
    want, spread = v["out/collate/sorted_counts_mean"].numpy(), v["out/collate/sorted_counts_std"].numpy()
    theirs = v.number("in/n_collates")
    error = np.sqrt((spread**2 + 0.05**2) * (1 / draws + 1 / theirs))
    v.within("masks of a batch: sorted counts", (counts.mean(0) - want) / error, 4.5)
    mean, deviation = v["out/collate/masked_among_first_global_crops_mean_std"].tolist()
    first = np.array([(masks[: crops // 2].sum(1) > 0).sum() for masks in drawn])
    error = max(deviation, first.std()) * (1 / draws + 1 / theirs) ** 0.5
    v.within("masks of a batch: how many among first crops", (first.mean() - mean) / error, 4.5)
    assert abs(first.std() / deviation - 1) < 0.25  # at random places, and not alternating
