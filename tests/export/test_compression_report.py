"""What the report says of compressed models: made-up rows and files (compressed_run.py) in, page and facts out."""

import json
import re

import compressed_run as sample
import pytest
from test_report import Page, page_of, words

from distill.files import write_json, write_text
from distill.rows import Row, not_measured
from export.report import training_curves, write_report
from export.reporting import bars, plots, tables
from export.reporting.budget_report import budget_views
from export.reporting.compression_report import collect, verdict, view
from export.reporting.labels import label_of, target_name
from export.reporting.report_charts import styles_of
from export.reporting.summary import summary
from export.reporting.tables import Book, headline_table


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return sample.run(tmp_path_factory.mktemp("runs") / "compressed")


@pytest.fixture(scope="module")
def page(run):
    write_report(run, run / "report", sample.rows())
    return page_of(run / "report")


@pytest.fixture(scope="module")
def shown(run):
    rows = sample.rows()
    return view(collect(run, rows), Book(rows))


def test_every_target_has_a_name_and_a_place():
    assert [target_name(t) for t in ("onnx-int8-dynamic", "openvino-int8-nncf", "rtx-w4", "trt-fp8", "onnx-w8", "mystery")] == [
        "ONNX INT8 (dynamic)", "OpenVINO INT8 (NNCF)", "TensorRT-RTX INT4 weights", "TensorRT FP8", "ONNX INT8 weights", "mystery",
    ]  # fmt: skip
    assert label_of("pruned/half", "torch-fp32") == "Pruned half"
    assert label_of("qad/small8", "onnx-int8") == "QAD small8, ONNX INT8"
    labels = [line.label for line in headline_table(sample.rows())]
    start = labels.index("Pruned half, before recovery")
    assert labels[start : start + 4] == [
        "Pruned half, before recovery",
        "Pruned half",
        "Control half, from scratch",
        "QAD small8",
    ]
    files = labels[start + 4 :]
    assert files[:5] == [f"small, ONNX {p}" for p in ("FP32", "BF16", "INT8", "INT8 (dynamic)", "INT8 (ModelOpt)")]
    assert files[-2:] == ["QAD small8, ONNX FP32", "QAD small8, ONNX INT8"]


def test_models_are_told_apart_by_colour_and_relatives_share_one():
    styles = styles_of([*dict.fromkeys(r.subject for r in sample.rows())])
    assert styles["teacher"] == "c0"
    assert styles["raw"] == "c5"
    assert len({styles[s] for s in ("students/small", "pruned/half", "qad/small8")}) == 3
    assert styles["control/half"] == styles["cut/half"] == f"{styles['pruned/half']} dashed"
    assert styles["control/small"] == f"{styles['students/small']} dashed"


def test_the_fastest_is_named_no_stronger_than_the_intervals_allow(shown):
    small, half, _ = shown.fastest
    assert (small.first, small.second, small.verdict) == ("OpenVINO INT8", "ONNX INT8", "INCONCLUSIVE")
    assert small.difference.value == pytest.approx(-0.2)
    assert (half.first, half.verdict) == ("ONNX INT8", "FASTER")
    assert small.where == "CPU, 2 threads"


def test_a_ratio_measured_between_two_files_decides_before_intervals_do():
    def timed(target, value, half=0.1):
        return sample.row("latency_p50_ms", value, "students/a", target, half, device="cpu", batch=1)

    first, second = timed("onnx-int8", 10.0), timed("onnx-fp32", 20.0)
    floor = Row(metric="noise_floor_percent", value=1.0, n=1, subject="all", target="all", conditions={})
    about = {"batch": 1, "versus": "students/a/onnx-fp32", "verdict": "INCONCLUSIVE"}
    ratio = sample.row("latency_ratio", 0.5, "students/a", "onnx-int8", **about)
    assert verdict(Book([first, second, floor]), first, second) == "FASTER"
    assert verdict(Book([first, second]), first, second) == "INCONCLUSIVE"  # nobody knows what a difference means
    assert verdict(Book([first, second, floor, ratio]), first, second) == "INCONCLUSIVE"
    near = timed("onnx-fp32", 10.25)
    assert verdict(Book([first, near, floor]), first, near) == "INCONCLUSIVE"  # 10.1 to 10.15, within the floor


def test_proofs_are_shares_of_flops_largest_first(shown):
    found = {p.label: p for p in shown.proofs}
    assert found["small, ONNX INT8"].shares == "INT8 87\u00a0%, FP32 13\u00a0%"
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="10"', found["small, ONNX INT8"].bar)]
    assert widths == pytest.approx([0.87 * 160, 0.13 * 160], abs=0.01)
    assert found["small, TensorRT-RTX FP16"].attention == "12 of 12 fused"
    assert found["small, ONNX FP32"].attention == "12 of 12 fusable"
    assert found["small, ONNX FP32"].reformats is None
    assert bars.type_name("SOMETHING") == "SOMETHING"


def test_what_is_not_faster_is_explained_with_facts_and_the_rest_is_not(shown):
    (sentence,) = shown.slow
    assert sentence.startswith("small, ONNX INT4 weights is not measurably faster or slower than FP32 at batch 1 (×1.04")
    assert "INT4 weights 90\u00a0%, FP32 10\u00a0%" in sentence
    assert "12.2 GFLOP" in sentence


def test_plans_that_agree_are_one_and_reasons_are_in_words(shown):
    first, second = shown.plans
    assert first.label == "small: ONNX INT8, OpenVINO INT8"
    assert first.counts == "46 of 48 linear layers, 0 of 24 attention products, 0 of 1 convolutions to INT8"
    assert first.columns == ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert [block for block, _ in first.rows] == [f"Block {i}" for i in range(12)]
    kept = first.rows[0][1][2]
    assert (kept.text, kept.style) == ("float", "keep")
    assert "the accuracy budget keeps it" in kept.tip
    assert "input scale 0.0312; weight 384 × 1536; weight scales 0.0011 to 0.0094" in first.rows[1][1][0].tip
    reasons = dict(first.reasons)
    assert reasons["the accuracy budget keeps it in floating point"] == "blocks.0.mlp.fc1, blocks.2.mlp.fc2"
    assert reasons["attention products stay in floating point"] == "blocks.0.attn.qk to blocks.11.attn.av (24)"
    assert second.rows[0][1][0].text == "W4"


def test_attention_products_have_columns_where_one_is_quantized():
    entries = sample.plan([])
    entries[2] |= {"decision": "int8"}
    artifact = {"subject": "students/small", "target": "onnx-int8", "plan": {"224": entries}}
    (plan,) = view({"artifacts": [artifact], "pruned": {}}, Book(sample.rows())).plans
    assert plan.columns[:3] == ["attn.qkv", "attn.qk", "attn.av"]
    assert "1 of 24 attention products" in plan.counts


def test_budget_tells_what_was_asked_reached_and_kept(shown):
    (budget,) = shown.budgets
    assert budget.met
    assert "cosine of at least 0.9965 and at most 0.3 kNN points lost" in budget.sentence
    assert "Met with 2 of 48 layers in floating point (least cosine 0.99777; kNN points lost 0.08)" in budget.sentence
    assert "These cosines are of images that the search did not see." in budget.sentence
    assert "2 kept: least cosine 0.99797, 0.99777 on other images" in dict(budget.panels)["Least cosine"]
    assert "Quantizing any single one of them again was measured to break the budget." in budget.sentence
    assert budget.kept == "blocks.0.mlp.fc1 (0.99375), blocks.2.mlp.fc2 (0.99862)"
    assert [title for title, _ in budget.panels] == ["Least cosine", "kNN points lost", "Latency at batch 1, ms"]
    naive, nothing, ours = budget.table
    assert naive[0].startswith("Naive")
    assert naive[1:3] == ("0.31200", "71.30")
    assert nothing[2] == "not measured"  # the cosine was too low for it to be worth measuring
    assert ours[3] == "25.1 (24.8 to 25.5)"
    chart = budget.charts[0]
    assert chart.count('class="fill"') == 48
    assert chart.count('<g class="c0">') == 2


def test_a_budget_that_was_missed_says_so():
    missed = sample.budget(cosine_min=0.99999)
    (found,) = budget_views([{"subject": "students/a", "target": "onnx-int8", "budget": missed}])
    assert not found.met
    assert "Not met: the best found is kept, with" in found.sentence
    assert "again was measured" not in found.sentence


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"minimal": False, "confirmed": True}, "Fewer met it on the images of the search, and did not on the others."),
        ({"minimal": False, "confirmed": False}, "The search ran out before it had tried to give each of them back."),
    ],
)
def test_what_is_not_proved_minimal_says_why(how, sentence):
    value = {"asked": {"cosine_min": 0.9}, "met": True, "reached": {"cosine_min": 0.95}, "kept": ["a", "b"], "layers": 4, **how}
    value["curve"] = [
        {"kept": ["a"], "met": how["confirmed"], "cosine_min": 0.91},
        {"kept": ["a", "b"], "met": True, "cosine_min": 0.95},
    ]
    (found,) = budget_views([{"subject": "students/a", "target": "onnx-int8", "budget": value}])
    assert sentence in found.sentence


def test_lint_groups_what_several_files_share(shown):
    (finding,) = shown.lint
    assert finding.files == "small, TensorRT-RTX FP16; small, TensorRT-RTX FP8"
    assert shown.linted == "7 graphs checked: 0 errors, 2 warnings and 1 note. The notes are in report.json."


def test_pruned_models_before_and_after(shown):
    (half,) = shown.pruned
    assert half.sentence.startswith(
        "50\u00a0% of the multiply-adds of small; asked were 0.5 of them; importance by taylor; cut in 2"
    )
    labels = ["Distilled student small", "Pruned half, before recovery", "Pruned half, recovered", "Control half, from scratch"]
    assert [m[0] for m in half.models] == labels
    assert [m[1] for m in half.models] == [5.5e9, 2.75e9, 2.75e9, 2.75e9]
    assert [m[4] and m[4].value for m in half.models] == [-2.3, 27.5, None, 2.6]
    assert half.widths[1] == (1, "5 of 6", "1440 of 1536")


def test_qad_stands_beside_quantization_after_training(shown):
    (row,) = shown.qad
    assert (row.target, row.ptq_label, row.qad_label) == ("ONNX INT8", "small", "QAD small8")
    assert (row.ptq.value, row.qad.value, row.difference.value) == (81.7, 81.9, 0.2)


def test_page_holds_every_part_and_can_be_read(page, run):
    text = words(page.text)
    for part in ("The fastest file on this machine", "What runs in which precision", "Quantization plans", "Accuracy budget", "Lint",
                 "Pruning", "Trained for quantization", "Where quantization is not faster here, and why"):  # fmt: skip
        assert part in text
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(a.get("scope") for a in page.all("th"))
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or len(svg["aria-label"]) > 20
    numbers = [int(n) for n in re.findall(r"Table (\d+)\.", page.text)]
    assert numbers == list(range(1, len(numbers) + 1))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    found = json.loads((run / "report" / "report.json").read_text())
    assert {(a["subject"], a["target"]) for a in found["compression"]["artifacts"]} >= {("students/small", "onnx-int8")}
    assert found["compression"]["pruned"]["pruned/half"]["macs_after"] == 2.75e9


def test_files_of_an_earlier_recipe_are_left_out(run):
    rows = [r for r in sample.rows() if r.target != "onnx-w4" and r.subject != "pruned/half"]
    facts = collect(run, rows)
    assert "onnx-w4" not in {a["target"] for a in facts["artifacts"]}
    assert not facts["pruned"]


def test_damaged_and_half_written_files_are_left_out(tmp_path):
    folder = sample.run(tmp_path / "r")
    (folder / "export" / "small" / "onnx-int8" / "artifact.json").write_text("{")
    write_json(
        folder / "export" / "small" / "onnx-w4" / "artifact.json",
        {"details": {"plan": {}, "lint": [], "budget": {"met": True}}},
    )
    (folder / "pruned" / "half" / "pruning.json").write_text("[]")
    page = page_of(write_report(folder, folder / "report", sample.rows()).parent)
    assert "Accuracy budget" not in page.text
    assert "Pruning" not in page.text
    assert "small: OpenVINO INT8" in page.text


def test_names_in_artifacts_are_text_and_not_markup(tmp_path):
    bad = "<script>alert(1)</script>"
    details = {
        "plan": {"224": [sample.entry(f"blocks.0.{bad}", "Linear", "int8", bad, 1.0), sample.entry(bad, "Conv", "keep", bad, 1.0)]},
        "proof": {"224": sample.proof({bad: 1.0}, notes=[bad])},
        "lint": {"224": [{**sample.FINDING, "message": bad, "where": bad, "cure": bad, "rule": bad}]},
        "budget": {
            "asked": {"cosine_min": 0.9}, "met": True, "reached": {"cosine_min": 0.95}, "kept": [bad], "layers": 1,
            "sensitivity": [{"layer": bad, "cosine_min": 0.5, "cosine_mean": 0.6, "flops_share": 1.0}],
            "curve": [{"kept": [bad], "met": True, "cosine_min": 0.95}],
        },
    }  # fmt: skip
    write_json(tmp_path / "export" / "small" / "onnx-int8" / "artifact.json", {"details": details})
    text = write_report(tmp_path, tmp_path / "report", sample.rows()).read_text()
    assert bad not in text
    assert text.count("<script>") == 1
    assert len(Page(text).all("script")) == 1


def test_a_run_without_compression_has_no_such_part(tmp_path):
    rows = [r for r in sample.rows() if r.subject in ("teacher", "raw")]
    page = page_of(write_report(tmp_path, tmp_path / "report", rows).parent)
    assert "Compression" not in page.text
    assert "3 What the features see" in words(page.text)


def test_logs_of_pruning_in_rounds_follow_one_another(tmp_path):
    for round_ in (1, 2, 10):
        write_text(
            tmp_path / "pruned" / "half" / f"round-{round_}" / "recovered" / "train.jsonl",
            "".join(json.dumps({"images": i * 64, "loss": round_}) + "\n" for i in (1, 2)),
        )
    found = training_curves(tmp_path)
    assert list(found) == ["pruned/half"]
    assert [(r["images"], r["loss"]) for r in found["pruned/half"]] == [
        (64, 1), (128, 1), (192, 2), (256, 2), (320, 10), (384, 10),
    ]  # fmt: skip


def test_summary_stays_short_and_honest():
    said = summary(sample.rows())
    text = " ".join(said).replace("\u00a0", " ")
    assert (
        "Pruned half reaches 79.6 % (78.5–80.7): 2.3 points (paired 95 % interval 1.9 to 2.7) below the model that it" in text
    )
    assert "2.6 points (paired 95 % interval 2.2 to 3.0) above its control" in text
    assert "0.2 points (paired 95 % interval −0.2 to 0.6, so perhaps not at all) above small quantized after training" in text
    assert "Of 7 converted files of small the one with the smallest median latency is OpenVINO INT8." in text
    assert "TensorRT-RTX FP16 and TensorRT-RTX FP8 of small were not run on this machine" in text
    assert len(said) == 6
    many = [not_measured("knn_top1", "students/small", f"trt-{p}", "no GPU") for p in ("fp16", "bf16", "int8", "fp8")]
    assert "6 files of small were not run" in " ".join(summary([*sample.rows(), *many]))


# Charts.


def test_crowded_charts_name_the_frontier_and_cover_nothing():
    points = [
        plots.Point(10 + i % 5, 70 + 0.1 * i, f"small, ONNX INT8 {i}", "", y_interval=(69 + 0.1 * i, 71 + 0.1 * i))
        for i in range(24)
    ]
    best = plots.frontier(points)
    canvas = plots.Canvas(364, 400, plots.padded([p.x for p in points], log=True), (68, 75), log_x=True, font=13)
    labels = plots.place_labels(canvas, points, best, drop=True)
    assert all(labels[points.index(p)] is not None for p in best)
    assert any(label is None for label in labels)
    boxes = [plots._label_box(canvas, p, *lab[:3]) for p, lab in zip(points, labels, strict=True) if lab and p not in best]
    marks = [(canvas.x(p.x) - 7, canvas.y(p.y) - 7, canvas.x(p.x) + 7, canvas.y(p.y) + 7) for p in points]
    assert all(plots._overlap(b, m) == 0 for b in boxes for m in marks)
    svg = plots.scatter(points, "T", "x", "y", 364, 400)
    assert svg.count("<title>") == 24  # hovering names them all
    assert svg.count('class="name"') < 24


def test_axis_of_cosines_is_not_rounded_to_what_is_wrong():
    assert plots.tick_texts([0.99, 0.9925, 0.995, 0.9975]) == ["0.9900", "0.9925", "0.9950", "0.9975"]
    assert plots.tick_texts([0, 20000, 40000]) == ["0", "20k", "40k"]
    assert plots.tick_texts([1e-5, 1e-4]) == ["1e−5", "1e−4"]


def test_bars_are_as_high_as_the_damage_and_an_infinite_one_fills_the_frame():
    found = [bars.Damage("a", "0", 0.1, True, "a"), bars.Damage("b", "0", 0.001, False, "b"), bars.Damage("c", "1", None, False, "c"),
             bars.Damage("d", "1", 0.0, False, "d")]  # fmt: skip
    svg = bars.damage_bars(found, "T", bars.WIDE, "wide")
    heights = [float(h) for h in re.findall(r'class="fill"[^>]*height="([\d.]+)"', svg)]
    assert heights[2] >= heights[0] > heights[1] > heights[3]
    assert heights[3] == 0
    assert svg.count("<circle") == 1


def test_search_panel_shows_the_limit_and_the_choice():
    tried = [bars.Tried(0, 0.95, False, False, "0"), bars.Tried(3, 0.99, True, True, "3", (0.98, 0.995))]
    svg = bars.search_panel(tried, "Least cosine", 0.98)
    assert svg.count('class="limit"') == svg.count('class="ring"') == svg.count('class="whisker"') == 1
    assert svg.count("dot hollow") == 1
    assert not re.search(r">\d+\.5<", svg)  # no half layers on the axis


def test_table_of_artifacts_holds_pruned_and_qad_files():
    found = {(a.subject, a.target): a for a in tables.artifact_table(Book(sample.rows()))}
    assert found["pruned/half", "onnx-int8"].ratio.value == pytest.approx(0.55 * 24.9 / 61.0)
    assert found["qad/small8", "onnx-int8"].difference.value == 0.1
