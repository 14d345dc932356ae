"""kNN scores and linear-probe inputs against the public reference, golden item 10. Shapes and settings come from the files."""

import re

import pytest
import torch
from torch.nn import functional as F

from distill.encoder import Features
from distill.evaluate.knn import few_per_class, neighbours, predict, votes
from distill.evaluate.linear import probe_features, scaled_lr

ABS = 2e-6


def grids(v) -> list[str]:
    return [n.removeprefix("in/") for n in v.names if re.fullmatch(r"in/nb_knn\w*", n)]


def test_knn_scores(vectors):
    v = vectors("10_knn")
    gallery, labels, test = v["in/train_features_raw"], v["in/train_labels"], v["in/test_features_raw"]
    temperature, classes = v.number("in/temperature"), int(labels.max()) + 1
    assert grids(v)
    for grid in grids(v):
        ks = v[f"in/{grid}"].tolist()
        found = neighbours(gallery, labels, test, max(ks))
        torch.testing.assert_close(found.sims, v[f"out/{grid}/top_sims"], atol=ABS, rtol=0)
        assert torch.equal(found.labels, v[f"out/{grid}/top_labels"])
        predicted = predict(gallery, labels, test, ks, temperature)
        for k, scores in votes(found, ks, temperature, classes).items():
            torch.testing.assert_close(scores, v[f"out/{grid}/scores_k{k}"], atol=ABS, rtol=0)
            torch.testing.assert_close(scores.double(), v[f"out64/{grid}/scores_k{k}"], atol=ABS, rtol=0)
            assert torch.equal(predicted[k], v[f"out/{grid}/pred_k{k}"])
            top1 = (predicted[k] == v["in/test_labels"]).double().mean().item()
            assert (
                min(abs(top1 - v.number(f"out/{grid}/top1_acc_k{k}")), abs(100 * top1 - v.number(f"out/{grid}/top1_acc_k{k}")))
                < 1e-6
            )


def test_smaller_k_does_not_renormalise(vectors):
    """The softmax runs over all max(k) neighbours: only the scores of the largest k sum to 1."""
    v = vectors("10_knn")
    for grid in grids(v):
        ks = sorted(v[f"in/{grid}"].tolist())
        found = neighbours(v["in/train_features_raw"], v["in/train_labels"], v["in/test_features_raw"], ks[-1])
        totals = {
            k: s.sum(1) for k, s in votes(found, ks, v.number("in/temperature"), int(v["in/train_labels"].max()) + 1).items()
        }
        assert (totals[ks[0]] < 0.999).all()
        torch.testing.assert_close(totals[ks[-1]], torch.ones_like(totals[ks[-1]]))


def test_few_shot_galleries(vectors):
    v = vectors("10_knn")
    seeds = [int(m[1]) for n in v.names if (m := re.fullmatch(r"out/filter_train_seed(\d+)", n))]
    assert seeds
    for seed in seeds:
        chosen = few_per_class(v["in/train_labels"], v.number("in/n_per_class"), seed)
        assert torch.equal(chosen, v[f"out/filter_train_seed{seed}"])


def test_linear_probe_inputs_and_logits(vectors):
    v = vectors("10_linear_probe")
    depth = len([n for n in v.names if re.fullmatch(r"in/layer\d+/cls", n)])
    layers = [Features(v[f"in/layer{i}/cls"], v[f"in/layer{i}/patch"]) for i in range(depth)]
    cases = [c for c in v.children("out/") if re.fullmatch(r"n\d+_avg[01]", c)]
    assert cases
    for case in cases:
        n, avgpool = (int(x) for x in re.findall(r"\d+", case))
        x = probe_features(layers[-n:], bool(avgpool))
        torch.testing.assert_close(x, v[f"out/{case}/features"], atol=ABS, rtol=0)
        logits = F.linear(x, v[f"in/{case}/weight"], v[f"in/{case}/bias"])
        torch.testing.assert_close(logits, v[f"out/{case}/logits"], atol=ABS, rtol=2e-6)
        loss = F.cross_entropy(logits, v["in/labels"])
        torch.testing.assert_close(loss, v[f"out/{case}/cross_entropy"], atol=ABS, rtol=2e-6)


def test_scaled_learning_rates(vectors):
    v = vectors("10_linear_probe")
    ours = [scaled_lr(lr, v.number("in/batch_size")) for lr in v["in/learning_rates"].tolist()]
    assert ours == pytest.approx(v["out/scaled_learning_rates"].tolist(), rel=1e-12)
