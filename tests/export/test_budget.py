"""The budget's search on artifacts whose cost is known, its memory, and its measures on real networks and graphs."""

import io
import json

import numpy as np
import pytest
import torch
from tiny import backbone, pictures
from torch.nn import functional as F

from distill.data.preprocess import Preprocess
from distill.data.scenes import ScenesConfig
from distill.encoder import Features, TorchEncoder
from distill.errors import UserError
from distill.evaluate import knn
from distill.evaluate.suite import EvaluateConfig
from distill.progress import Progress
from export.benchmark import BenchmarkConfig
from export.quantizing.budget import BudgetConfig, Ledger, Sensitivity, ranked, search, sensitivity
from export.quantizing.budget_measures import Candidate, GalleryLoss, Measures, add_latency, leave_one_out

QUIET = Progress("quiet", io.StringIO())
# What quantizing each layer takes from the cosine; it adds up, except where a test says otherwise.
DAMAGE = {f"blocks.{i}.{n}": d for i, row in enumerate(([1, 2, 900, 3], [4, 5, 6, 40], [7, 8, 9, 300]))
          for n, d in zip(("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"), row, strict=True)}  # fmt: skip


class Bench:
    """Counts what it is asked for. Cosine falls by DAMAGE; points are lost in proportion."""

    def __init__(self, damage=DAMAGE, dies_after=None):
        self.damage, self.calls, self.dies_after = damage, [], dies_after

    def cosine(self, kept):
        if self.dies_after is not None and len(self.calls) >= self.dies_after:
            raise KeyboardInterrupt
        self.calls.append(kept)
        lost = sum(d for name, d in self.damage.items() if name not in kept) / 1e5
        return {"cosine_min": 1 - lost, "cosine_mean": 1 - lost / 4, "size_mb": 20.0 + len(kept)}

    def __call__(self, kept):
        measured = self.cosine(kept)
        points = 100 * (1 - measured["cosine_min"])
        return measured | {"knn_points": points, "knn_low": points - 0.2, "knn_high": points + 0.2}


def found_by(config, bench, ledger=None, confirm=None):
    ledger = ledger or Ledger()
    order = sensitivity(dict.fromkeys(bench.damage, 1.0), bench.cosine, ledger, QUIET)
    return search(config, order, bench, ledger, QUIET, confirm=confirm)


def test_sensitivity_orders_by_damage_and_shares_the_work():
    bench = Bench()
    layers = {name: 3.0 if name.endswith("fc1") else 1.0 for name in DAMAGE}
    order = ranked(BudgetConfig(cosine_min=0.9), sensitivity(layers, bench.cosine, Ledger(), QUIET))
    assert [s.layer for s in order] == sorted(DAMAGE, key=lambda n: -DAMAGE[n])
    assert order[0].cosine_min == pytest.approx(1 - 900 / 1e5)
    assert sum(s.flops_share for s in order) == pytest.approx(1)
    assert order[0].flops_share == pytest.approx(3 / 18)
    assert len(bench.calls) == len(DAMAGE)


def test_the_order_follows_what_the_budget_limits():
    """Worst vector for cosine_min, mean for accuracy; what is not finite comes first either way."""
    found = [Sensitivity("a", 0.90, 0.999, 0.3), Sensitivity("b", 0.99, 0.99, 0.3), Sensitivity("c", None, None, 0.4)]
    assert [s.layer for s in ranked(BudgetConfig(cosine_min=0.9), found)] == ["c", "a", "b"]
    assert [s.layer for s in ranked(BudgetConfig(knn_points=0.3), found)] == ["c", "b", "a"]


def test_nothing_is_kept_where_nothing_has_to_be():
    bench = Bench()
    result = found_by(BudgetConfig(cosine_min=0.98), bench)
    assert (result.met, result.kept, result.minimal, len(result.curve)) == (True, [], True, 1)
    assert result.failure() is None


def test_the_fewest_layers_are_found_and_every_single_removal_was_tried():
    result = found_by(BudgetConfig(cosine_min=0.9991), Bench())
    assert result.kept == ["blocks.0.mlp.fc1", "blocks.2.mlp.fc2", "blocks.1.mlp.fc2"][: len(result.kept)]
    assert len(result.kept) == 2  # 1 - 85e-5: within; one more layer quantized is not
    assert result.minimal
    tried = {frozenset(point["kept"]): point["met"] for point in result.curve}
    assert all(tried[frozenset(result.kept) - {layer}] is False for layer in result.kept)


def test_layers_that_the_order_misjudged_are_given_back():
    """A layer that is bad alone and harmless beside the others: the beginning of the order keeps it, the artifact need not."""

    class Odd(Bench):
        def cosine(self, kept):
            measured = super().cosine(kept)
            if len(kept) < len(self.damage) - 1 and "blocks.0.mlp.fc1" not in kept:
                measured["cosine_min"] += 900 / 1e5
            return measured

    result = found_by(BudgetConfig(cosine_min=0.9991), Odd())
    assert result.sensitivity[0].layer == "blocks.0.mlp.fc1"
    assert result.kept == ["blocks.2.mlp.fc2"]
    assert result.minimal


def test_a_budget_out_of_reach_keeps_the_best_and_says_what_to_do():
    result = found_by(BudgetConfig(cosine_min=0.9999, knn_points=0.1, most_kept=3), Bench())
    assert not result.met
    assert not result.minimal
    assert result.kept == ["blocks.0.mlp.fc1", "blocks.2.mlp.fc2", "blocks.1.mlp.fc2"]
    sentence = result.failure("onnx-int8 of small")
    assert sentence is not None
    assert sentence.count(".") - sentence.count("0.") - sentence.count("budget.") == 1  # one sentence
    for part in ("onnx-int8 of small", "cosine_min 0.9999", "at most 0.1 kNN points", "3 of 12 layers", "cosine_min 0.99955"):
        assert part in sentence
    assert "raise budget.most_kept above 3" in sentence


def test_what_was_not_measured_does_not_meet_a_limit():
    class Cheap(Bench):
        def __call__(self, kept):
            return self.cosine(kept)

    result = found_by(BudgetConfig(knn_points=50.0), Cheap())
    assert not result.met
    assert "a kNN loss that was not measured" in result.failure()


@pytest.mark.parametrize(("within_noise", "kept"), [(True, 2), (False, 3)])
def test_a_loss_within_its_interval_counts_as_none_where_asked(within_noise, kept):
    """Two layers kept: 0.085 points lost, interval from -0.115; three: 0.045."""
    result = found_by(BudgetConfig(knn_points=0.05, within_noise=within_noise), Bench())
    assert result.met
    assert len(result.kept) == kept


def test_evaluations_are_capped_and_the_result_says_that_it_is_not_proved():
    bench = Bench()
    result = found_by(BudgetConfig(cosine_min=0.9991, evaluations=3), bench)
    assert len(result.curve) == 3
    assert result.met  # the third try, with two layers, met it
    assert not result.minimal
    short = found_by(BudgetConfig(cosine_min=0.99999, evaluations=2), Bench())
    assert "raise budget.evaluations" in short.failure()


def test_what_was_lucky_on_the_images_of_the_search_is_not_taken():
    """On other images every layer that is quantized costs a little more: the smallest set that met the budget does not hold."""
    asked = []

    def confirm(kept):
        asked.append(len(kept))
        measured = Bench().cosine(kept)
        return {"cosine_min": measured["cosine_min"] - 30e-5, "cosine_mean": 0.5}

    config = BudgetConfig(cosine_min=0.9991)
    result = found_by(config, Bench(), confirm=confirm)
    assert asked[0] == 2  # what the search alone would have taken
    assert result.met
    assert result.confirmed
    assert not result.minimal  # on the images of the search fewer were enough
    assert len(result.kept) > 2
    assert result.reached["cosine_min"] == pytest.approx(Bench().cosine(frozenset(result.kept))["cosine_min"] - 30e-5)
    assert result.reached["cosine_mean"] == 0.5
    chosen = next(p for p in result.curve if p["kept"] == result.kept)
    assert chosen["confirmed_cosine_min"] == result.reached["cosine_min"] < chosen["cosine_min"]


def test_what_holds_on_other_images_is_confirmed_once():
    asked = []
    result = found_by(BudgetConfig(cosine_min=0.9991), Bench(), confirm=lambda kept: asked.append(kept) or Bench().cosine(kept))
    assert (result.met, result.confirmed, result.minimal, len(result.kept)) == (True, True, True, 2)
    assert asked == [frozenset(result.kept)]


def test_nothing_that_holds_on_other_images_is_a_failure_that_says_so():
    result = found_by(BudgetConfig(cosine_min=0.9991), Bench(), confirm=lambda kept: {"cosine_min": 0.9, "cosine_mean": 0.95})
    assert not result.met
    assert result.reached["cosine_min"] == 0.9
    assert "cosine_min 0.90000 on images that the search did not see" in result.failure()


def test_a_killed_search_goes_on_where_it_was(tmp_path):
    config, path = BudgetConfig(cosine_min=0.99975), tmp_path / "budget.jsonl"
    whole = Bench()
    expected = found_by(config, whole)
    done = 0
    for dies_after in (5, 9, 3):  # in the sensitivity, and in the search
        bench = Bench(dies_after=dies_after)
        with pytest.raises(KeyboardInterrupt):
            found_by(config, bench, Ledger(path, {"model": "a"}))
        done += len(bench.calls)
        with open(path, "a") as f:
            f.write('{"kept": ["blo')  # the line that the kill cut short
    last = Bench()
    result = found_by(config, last, Ledger(path, {"model": "a"}))
    assert done + len(last.calls) == len(whole.calls)
    assert result == expected
    other = Bench()
    found_by(config, other, Ledger(path, {"model": "b"}))
    assert len(other.calls) == len(whole.calls)  # of another model: nothing is believed


def test_result_is_json():
    result = found_by(BudgetConfig(cosine_min=0.9991), Bench())
    value = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(value) == {"asked", "met", "minimal", "confirmed", "reached", "kept", "layers", "sensitivity", "curve", "naive"}
    assert value["asked"]["cosine_min"] == 0.9991
    assert value["sensitivity"][0].keys() == {"layer", "cosine_min", "cosine_mean", "flops_share"}
    assert [len(p["kept"]) for p in value["curve"]] == sorted(len(p["kept"]) for p in value["curve"])


def test_settings_that_contradict_themselves():
    assert BudgetConfig(cosine_min=0.98).problems() == []
    for wrong, word in (
        ({}, "cosine_min"),
        ({"cosine_min": 1.0}, "cosine_min"),
        ({"knn_points": -0.1}, "knn_points"),
        ({"linear_points": 101.0}, "linear_points"),
        ({"cosine_min": 0.9, "most_kept": -1}, "most_kept"),
        ({"cosine_min": 0.9, "images": 0}, "images"),
        ({"cosine_min": 0.9, "evaluations": 0}, "evaluations"),
        ({"cosine_min": 0.9, "gallery": 10}, "gallery"),
    ):
        (problem,) = BudgetConfig(**wrong).problems()
        assert problem.startswith(word)


# Measures.


def test_leaving_one_out_is_what_a_search_without_the_image_finds():
    torch.manual_seed(0)
    features, labels = F.normalize(torch.randn(60, 8), dim=1), torch.randint(0, 4, (60,))
    features[7] = features[31]  # twins
    features[40:44] = features[40]
    found = leave_one_out(features, labels, [1, 5], 0.07)
    for i in range(60):
        others = torch.arange(60) != i
        wanted = knn.predict(features[others], labels[others], features[i : i + 1], [1, 5], 0.07)
        assert all(int(found[k][i]) == int(wanted[k]) for k in (1, 5))


def test_an_image_whose_twins_crowd_it_out_still_asks_the_others_only():
    features, labels = torch.ones(12, 4), torch.tensor([1] + 11 * [0])
    assert leave_one_out(features, labels, [3], 0.07)[3][0] == 0


class Noisy:
    """An encoder whose features are another one's with noise: a quantized artifact whose damage can be chosen."""

    target, conditions = "torch-fp32", {"device": "cpu"}

    def __init__(self, encoder, noise):
        self.encoder, self.noise = encoder, noise

    def __call__(self, images):
        out = self.encoder(images)
        if self.noise is None:
            return Features(out.cls * torch.nan, out.patches * torch.nan)
        torch.manual_seed(0)
        return Features(*(x + self.noise * x.std() * torch.randn_like(x) for x in (out.cls, out.patches)))


@pytest.fixture(scope="module")
def scenes():
    return ScenesConfig(count=240, size=32, seed=1).build()


@pytest.fixture(scope="module")
def reference():
    return TorchEncoder(backbone())


def test_points_lost_are_paired_and_grow_with_the_damage(scenes, reference, tmp_path):
    config = BudgetConfig(knn_points=1.0, linear_points=1.0, gallery=200)
    evaluate = EvaluateConfig(ks=[5, 10, 500], probe_steps=50)
    preprocess = Preprocess(size=32, resize=32, normalize="per_image")
    loss = GalleryLoss(config, evaluate, scenes, preprocess, reference, QUIET, "w", tmp_path)
    same = loss(reference)
    assert (same["knn_points"], same["linear_points"], same["gallery_images"]) == (0.0, 0.0, 200)
    assert same["knn_low"] <= 0 <= same["knn_high"]
    assert same["k"] in (5, 10)
    ruined = loss(Noisy(reference, 5.0))
    assert ruined["knn_points"] > 5
    assert ruined["knn_low"] < ruined["knn_points"] < ruined["knn_high"]
    assert all(np.isfinite(v) for v in loss(Noisy(reference, None)).values())
    assert len(list(tmp_path.glob("*/identity.json"))) == 1

    def never(_):
        raise AssertionError("the stored features were not used")

    again = GalleryLoss(config, evaluate, scenes, preprocess, never, QUIET, "w", tmp_path)
    assert again(Noisy(reference, 5.0)) == ruined


def test_a_gallery_without_labels_is_refused(scenes, reference):
    class Unlabelled:
        name, classes = "photos", None

        def __len__(self):
            return 5

        def labels(self):
            return None

    with pytest.raises(UserError, match="photos has no labels"):
        GalleryLoss(
            BudgetConfig(knn_points=1.0),
            EvaluateConfig(),
            Unlabelled(),
            Preprocess(size=32, resize=32),
            reference,
            QUIET,
        )


def test_accuracy_is_measured_only_where_the_cosine_is_good_enough(reference):
    asked = []

    def loss(encoder):
        asked.append(encoder)
        return {"knn_points": 0.0}

    def make(kept):
        return Candidate(Noisy(reference, None if "broken" in kept else 0.0 if kept else 0.3), 1_500_000)

    measures = Measures(BudgetConfig(cosine_min=0.99, knn_points=1.0), make, reference, pictures(20, 32), loss)
    bad, good, broken = (measures(frozenset(k)) for k in ([], ["a"], ["broken"]))
    assert 0 < bad["cosine_min"] < 0.99
    assert "knn_points" not in bad
    assert measures.confirm(frozenset("a"))["cosine_min"] == pytest.approx(1)
    assert len(measures.searched.images) == len(measures.held.images) == 10
    assert not torch.equal(measures.searched.images, measures.held.images)
    assert good == {"cosine_min": pytest.approx(1), "cosine_mean": pytest.approx(1), "size_mb": 1.5, "knn_points": 0.0}
    assert broken["cosine_min"] is None
    assert len(asked) == 1


def test_latency_is_measured_for_the_chosen_artifact_and_the_ends(reference):
    result = found_by(BudgetConfig(cosine_min=0.99975), Bench())
    opened = []

    def make(kept):
        opened.append(sorted(kept))
        return Candidate(reference, 1000)

    settings = BenchmarkConfig(seconds=0.02, warmup_seconds=0.01, rounds=6)
    timed = add_latency(result, make, 32, settings, threads=1)
    assert sorted(result.kept) in opened
    assert [] in opened
    assert 1 < len(opened) <= 6
    assert timed.reached["latency_ms"] > 0
    with_latency = [p for p in timed.curve if "latency_ms" in p]
    assert len(with_latency) == len(opened)
    assert [{k: v for k, v in p.items() if not k.startswith("latency")} for p in timed.curve] == result.curve
