"""kNN scores and linear-probe inputs against the public reference, golden item 10. Shapes and settings come from the files."""

import re

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
        v.close(f"{grid}/top_sims", found.sims, "similarities of the neighbours", atol=ABS)
        assert torch.equal(found.labels, v[f"out/{grid}/top_labels"])
        predicted = predict(gallery, labels, test, ks, temperature)
        for k, scores in votes(found, ks, temperature, classes).items():
            v.close(f"{grid}/scores_k{k}", scores, "scores of the classes", atol=ABS)
            v.close(f"{grid}/pred_k{k}", predicted[k], "predicted classes")
            top1 = (predicted[k] == v["in/test_labels"]).double().mean()
            share = v.number(f"out/{grid}/top1_acc_k{k}") <= 1
            v.close(f"{grid}/top1_acc_k{k}", top1 if share else 100 * top1, "top-1 accuracy", rtol=1e-6)


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
        v.close(f"filter_train_seed{seed}", chosen, "few-shot galleries")


def test_linear_probe_inputs_and_logits(vectors):
    v = vectors("10_linear_probe")
    depth = len([n for n in v.names if re.fullmatch(r"in/layer\d+/cls", n)])
    layers = [Features(v[f"in/layer{i}/cls"], v[f"in/layer{i}/patch"]) for i in range(depth)]
    cases = [c for c in v.children("out/") if re.fullmatch(r"n\d+_avg[01]", c)]
    assert cases
    for case in cases:
        n, avgpool = (int(x) for x in re.findall(r"\d+", case))
        x = probe_features(layers[-n:], bool(avgpool))
        v.close(f"{case}/features", x, "inputs of the probe", atol=ABS)
        logits = F.linear(x, v[f"in/{case}/weight"], v[f"in/{case}/bias"])
        v.close(f"{case}/logits", logits, "logits", rtol=2e-6, atol=ABS)
        loss = F.cross_entropy(logits, v["in/labels"])
        v.close(f"{case}/cross_entropy", loss, "cross-entropy", rtol=2e-6, atol=ABS)


def test_scaled_learning_rates(vectors):
    v = vectors("10_linear_probe")
    ours = [scaled_lr(lr, v.number("in/batch_size")) for lr in v["in/learning_rates"].tolist()]
    v.close("scaled_learning_rates", ours, "learning rates of the batch", rtol=1e-12)
