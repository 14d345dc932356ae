"""The report of a believable run: what it says, that it says nothing more, and that the page stands alone."""

import csv
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from distill.data.preprocess import Preprocess
from distill.encoder import Features, RawPixels, TorchEncoder
from distill.files import write_json, write_text
from distill.models.backbone import Backbone, BackboneConfig
from distill.rows import Row, not_measured, read_rows, write_rows
from export.report import ReportConfig, console_table, headline_table, write_report
from export.reporting import plots, tables
from export.reporting.pictures import like, pca_colours, pca_strip
from export.reporting.summary import summary

N = 5000
NO_GPU = "no CUDA GPU on this machine; the tensorrt_rtx engine is compiled for SM 8.6, 8.9"
DATA = {"data": "scenes", "data_fingerprint": "ab12", "gallery_size": 4000, "resolution": 48, "preprocess": {"size": 48}}


def accuracy(metric, value, subject, target="torch-fp32", n=N, **more):
    half = 1.96 * math.sqrt(value * (100 - value) / n)
    interval = {"low": value - half, "high": value + half}
    return Row(metric=metric, value=value, n=n, subject=subject, target=target, conditions={**DATA, **more}, **interval)


def difference(value, half, subject, target, versus, metric="knn_top1"):
    interval = {"low": value - half, "high": value + half}
    conditions = {**DATA, "versus": versus, "agreement_percent": 91.2}
    row = {"metric": f"{metric}_difference", "value": value, "n": N, "subject": subject, "target": target}
    return Row(**row, conditions=conditions, **interval)


def timing(metric, value, target, subject="students/small", batch=1, spread=0.04, resolution=48, **more):
    conditions = {"resolution": resolution, "batch": batch, "runtime": "onnxruntime 1.32.0", "threads": 2, "device": "cpu"}
    conditions |= {"load_average": 0.3, "other_cores_busy": 0.05, "settled": True, **more}
    interval = {"low": value * (1 - spread), "high": value * (1 + spread)}
    return Row(metric=metric, value=value, n=1400, subject=subject, target=target, conditions=conditions, **interval)


def believable_rows():
    """What the stages of a quickstart run on a machine without a GPU hand in."""
    knn = {
        ("raw", "pixels"): (58.3, 55.9),
        ("random/teacher", "torch-fp32"): (66.4, 61.7),
        ("random/small", "torch-fp32"): (59.8, 55.2),
        ("teacher", "torch-fp32"): (78.6, 81.9),
        ("students/small", "torch-fp32"): (73.4, 76.8),
        ("control/small", "torch-fp32"): (66.1, 70.4),
        ("students/small", "onnx-fp32"): (73.4, 76.8),
        ("students/small", "onnx-int8"): (73.1, 76.4),
    }
    rows = []
    for (subject, target), (k, linear) in knn.items():
        rows.append(accuracy("knn_top1", k, subject, target, k=20))
        rows.append(accuracy("linear_top1", linear, subject, target, lr=1.0))
    mine = "students/small/torch-fp32"
    rows += [
        difference(12.2, 1.3, "teacher", "torch-fp32", "random/teacher/torch-fp32"),
        difference(20.3, 1.6, "teacher", "torch-fp32", "raw/pixels"),
        difference(7.3, 1.4, "students/small", "torch-fp32", "control/small/torch-fp32"),
        difference(-5.2, 1.2, "students/small", "torch-fp32", "teacher/torch-fp32"),
        difference(0.0, 0.1, "students/small", "onnx-fp32", mine),
        difference(-0.3, 0.5, "students/small", "onnx-int8", mine),
    ]
    for target, size, p50, rate, cos in (
        ("torch-fp32", 0.284, 1.42, 2210.0, None),
        ("onnx-fp32", 0.296, 0.412, 3350.0, 0.9999994),
        ("onnx-int8", 0.121, 0.291, 5120.0, 0.9962),
    ):
        rows.append(Row(metric="size_mb", value=size, subject="students/small", target=target, conditions={"resolution": 48}))
        rows.append(timing("latency_p50_ms", p50, target))
        rows.append(timing("latency_p50_ms", p50 * 5.5, target, batch=8))
        rows.append(timing("images_per_s", rate / 2, target))
        rows.append(timing("images_per_s", rate, target, batch=8))
        rows.append(
            Row(metric="peak_memory_mb", value=3.1, n=1, subject="students/small", target=target, conditions={"batch": 8})
        )
        for output in ("cls", "patches") if cos else ():
            conditions = {"resolution": 48, "output": output, "source": "torch-fp32"}
            value = cos - (0.003 if output == "patches" and cos < 0.999 else 0)
            rows.append(
                Row(metric="cosine_min", value=value, n=64, subject="students/small", target=target, conditions=conditions)
            )
    rows.append(Row(metric="size_mb", value=0.61, subject="teacher", target="torch-fp32", conditions={"resolution": 48}))
    rows.append(timing("latency_p50_ms", 2.31, "torch-fp32", subject="teacher"))
    ratio = {"versus": "students/small/onnx-fp32", "verdict": "FASTER", "noise_floor_percent": 1.8}
    rows.append(timing("latency_ratio", 0.706, "onnx-int8", **ratio))
    rows.append(timing("latency_ratio", 3.45, "torch-fp32", **(ratio | {"verdict": "SLOWER"})))
    for target in ("rtx-fp16", "rtx-int8"):
        rows.append(
            Row(metric="size_mb", value=0.35, n=1, subject="students/small", target=target, conditions={"file": "engine"})
        )
        rows += [
            not_measured(metric, "students/small", target, NO_GPU, resolution=48, **more)
            for metric, more in (
                ("knn_top1", {}),
                ("linear_top1", {}),
                ("cosine_min", {"output": "cls"}),
                ("cosine_min", {"output": "patches"}),
                ("latency_p50_ms", {"batch": 1}),
                ("latency_p50_ms", {"batch": 8}),
                ("images_per_s", {"batch": 8}),
            )
        ]
    rows.append(Row(metric="noise_floor_percent", value=1.8, n=2, subject="all", target="all", conditions={"artifacts": "x"}))
    preprocess = {"photo": "640 x 480", "resolution": 48}
    rows.append(Row(metric="preprocess_p50_ms", value=1.9, subject="teacher", target="preprocess", conditions=preprocess))
    return rows


def believable_log(path, images, seed, floor):
    """A training log whose terms fall the way such terms fall, noise included."""
    random = np.random.default_rng(seed)
    steps = images // 64
    lines = []
    for step in range(0, steps, 5):
        t = step / steps
        terms = {
            "dino_global": 0.9 * (floor + (4.1 - floor) * math.exp(-4 * t)) + random.normal(0, 0.03),
            "ibot": 0.3 * (floor + 0.4 + 2.5 * math.exp(-3 * t)) + random.normal(0, 0.02),
            "koleo": 0.1 * (-1.2 + 2 * math.exp(-6 * t)) + random.normal(0, 0.004),
        }
        record = {"step": step, "images": (step + 1) * 64, "seconds": step * 0.3, "loss": sum(terms.values()), **terms}
        record["lr"] = 3e-3 * min(1, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * t))
        record["teacher_entropy"] = 1.4 + 2.2 * math.exp(-5 * t) + random.normal(0, 0.02)
        lines.append(json.dumps(record))
    write_text(path, "\n".join(lines) + "\n")


def believable_run(folder):
    write_json(folder / "run.json", {"format": "decant-run-1", "recipe": "quickstart", "made": "2026-01-31T10:00:00Z"})
    write_text(
        folder / "recipe.yaml", "# quickstart: rendered scenes\nname: quickstart\nseed: 0\nstudents:\n  small: {dim: 48}\n"
    )
    for subject, images, seed, floor in (
        ("teacher", 20000, 0, 1.9),
        ("students/small", 7680, 1, 2.2),
        ("control/small", 7680, 2, 2.6),
    ):
        believable_log(folder / subject / "train.jsonl", images, seed, floor)
    for stage, where, seconds in (("pretrain", "teacher", 71.4), ("distill", "students", 33.0), ("evaluate", "evaluate", 21.0)):
        write_json(folder / where / "done.json", {"stage": stage, "seconds": seconds, "attempts": 1})
    return folder


def believable_strip():
    random = np.random.default_rng(0)
    grid = np.arange(96)
    pictures = []
    for i in range(8):
        wave = (
            np.sin(grid / (3 + i))[None, :] * np.ones((96, 1)) if i % 2 else np.sin(grid / (3 + i))[:, None] * np.ones((1, 96))
        )
        base = 128 + 90 * wave[..., None] * random.uniform(0.3, 1, 3)
        base[20 : 50 + i, 30 : 70 - i] = random.uniform(0, 255, 3)
        pictures.append(Image.fromarray(np.clip(base, 0, 255).astype(np.uint8)))
    config = {"heads": 2, "patch": 8, "image_size": 48, "layer_scale": 1.0, "init": "fan_in"}
    torch.manual_seed(0)
    encoders = {
        "teacher": TorchEncoder(Backbone(BackboneConfig(dim=64, depth=3, **config))),
        "students/small": TorchEncoder(Backbone(BackboneConfig(dim=48, depth=2, **config))),
    }
    return pca_strip(pictures, encoders, Preprocess(size=48, resize=48, normalize="per_image"))


@pytest.fixture(scope="module")
def strip():
    return believable_strip()


@pytest.fixture(scope="module")
def report(tmp_path_factory, strip):
    """Folder of a written report, for the tests that only read it."""
    run = believable_run(tmp_path_factory.mktemp("runs") / "quickstart")
    page = write_report(run, run / "report", believable_rows(), ReportConfig(), strip=strip)
    assert page == run / "report" / "index.html"
    return run / "report"


class Page(HTMLParser):
    """What the tests look at: tags with attributes, and the visible text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._silent = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._silent = tag in ("style", "script", "title")

    def handle_endtag(self, tag):
        self._silent = False

    def handle_data(self, data):
        self.text += "" if self._silent else data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(folder):
    return Page((folder / "index.html").read_text(encoding="utf-8"))


def words(text):
    return re.sub(r"\s+", " ", text)


def test_page_needs_no_network_and_no_script(report):
    page = page_of(report)
    text = (report / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", text)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not page.all("link")
    assert all(a["src"].startswith("data:image/png") for a in page.all("img"))
    assert any("default-src 'none'" in a.get("content", "") for a in page.all("meta"))
    # All charts are there before any script runs.
    assert text.index("<svg") < text.index("<script>")
    assert len(page.all("svg")) > 10


def test_page_can_be_read_by_keyboard_and_screen_reader(report):
    page = page_of(report)
    assert page.all("html")[0]["lang"] == "en"
    assert all(a.get("scope") for a in page.all("th"))
    assert (
        len(page.all("caption")) == len(page.all("table")) == 11
    )  # six of the report, one in the details of each file and stages
    assert all(len(a["alt"]) > 40 for a in page.all("img"))
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or len(svg["aria-label"]) > 20
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for a in page.all("a") if not a["href"].startswith("data:")]
    assert set(targets) <= set(ids)
    assert next(t for t, _ in page.tags if t in ("h1", "h2", "h3")) == "h1"
    assert all("tabindex" in a for a in page.all("pre"))


def test_page_holds_every_part(report):
    text = words(page_of(report).text)
    for part in ("Raw pixels", "Random init., teacher", "Teacher", "Distilled student small", "Control small, from scratch"):
        assert part in text
    assert "78.6 (77.5–79.7)" in text
    assert "×0.706" in text
    assert "FASTER" in text
    assert NO_GPU in text
    assert "Linux" in text or "Darwin" in text or "Windows" in text
    assert "quickstart: rendered scenes" in text
    assert "decant run recipe.yaml --out runs/quickstart-again" in text
    assert "1 min 11 s" in text
    assert "Rows from the top: pictures, teacher, students/small." in text
    assert "differed from itself by 1.80 % at most" in text
    assert "takes 1.90 ms apart" in text
    for curve in ("DINO term, global crops", "iBOT term", "KoLeo term", "Entropy of the teacher's targets", "Learning rate"):
        assert curve in text


def test_json_is_the_whole_truth(report):
    found = json.loads((report / "report.json").read_text())
    assert found["schema"] == "decant-report-1"
    assert [Row(**r) for r in found["rows"]] == believable_rows()
    assert set(found["curves"]) == {"teacher", "students/small", "control/small"}
    assert len(found["curves"]["teacher"]) == 63
    assert [s["stage"] for s in found["stages"]] == ["pretrain", "distill", "evaluate"]
    assert found["recipe"].startswith("# quickstart")
    assert found["fingerprint"]["cpu"]["usable_threads"] >= 1
    assert found["summary"]


def test_csv_has_a_line_a_row(report):
    lines = list(csv.DictReader(io.StringIO((report / "report.csv").read_text())))
    rows = believable_rows()
    assert len(lines) == len(rows)
    assert float(lines[0]["value"]) == rows[0].value
    assert json.loads(lines[0]["preprocess"]) == {"size": 48}
    engine = next(line for line in lines if line["status"] == "not measured")
    assert engine["value"] == ""
    assert engine["reason"] == NO_GPU


def test_markdown_has_table_and_reasons(report):
    text = (report / "report.md").read_text()
    assert "| Teacher | 78.6 (77.5–79.7) | 81.9 (80.8–83.0) | 5,000 | 2.31 (2.22–2.40) | 0.610 |" in text
    assert "| small, TensorRT-RTX INT8 | not measured | not measured | not measured | not measured | 0.350 |" in text
    assert NO_GPU in text


def test_same_run_gives_the_same_bytes(report, strip, tmp_path):
    machine = json.loads((report / "report.json").read_text())["fingerprint"]
    texts = []
    for name in "ab":
        write_report(report.parent, tmp_path / name, believable_rows(), strip=strip, fingerprint=machine)
        texts.append([(tmp_path / name / f).read_bytes() for f in ("index.html", "report.json", "report.csv", "report.md")])
    assert texts[0] == texts[1]
    assert believable_strip() == strip


def test_summary_compares_honestly():
    text = " ".join(summary(believable_rows(), {"students/small": 7680, "control/small": 7680})).replace("\u00a0", " ")
    assert "78.6 % (77.5–79.7) of 5,000 test images" in text
    assert "12.2 points (paired 95 % interval 10.9 to 13.5) above the same network untrained" in text
    assert (
        "7.3 points (paired 95 % interval 5.9 to 8.7) above its control, trained from scratch on as many images (7,680)" in text
    )
    assert "5.2 points (paired 95 % interval 4.0 to 6.4) below the teacher" in text
    assert "loses 0.3 points (paired 95 % interval −0.2 to 0.8, so perhaps not at all)" in text
    assert "is faster than FP32 at batch 1 (×0.71 of its time" in text
    assert "0.121 MB instead of 0.296" in text
    assert "TensorRT-RTX FP16 and TensorRT-RTX INT8 of small were not run on this machine" in text


def test_summary_does_not_flatter():
    """A control that wins, a teacher below raw pixels, unequal numbers of images, an INT8 that is no faster: all are said."""
    rows = [
        accuracy("knn_top1", 50.0, "teacher"),
        accuracy("knn_top1", 58.3, "raw", "pixels"),
        accuracy("knn_top1", 60.0, "students/small"),
        accuracy("knn_top1", 61.0, "control/small"),
        difference(-1.0, 0.6, "students/small", "torch-fp32", "control/small/torch-fp32"),
        accuracy("knn_top1", 59.0, "students/small", "onnx-int8"),
        timing("latency_p50_ms", 1.0, "onnx-int8"),
        timing("latency_ratio", 0.97, "onnx-int8", versus="students/small/onnx-fp32", verdict="INCONCLUSIVE"),
    ]
    text = " ".join(summary(rows, {"students/small": 7680, "control/small": 9000})).replace("\u00a0", " ")
    assert "8.3 points (not paired, no interval) below raw pixels" in text
    assert "1.0 points (paired 95 % interval 0.4 to 1.6) below its control" in text
    assert "on 9,000 images where the student saw 7,680" in text
    assert "not measurably faster or slower than FP32 at batch 1" in text
    assert "FASTER" not in text
    even = difference(0.0, 2.3, "students/small", "onnx-int8", "students/small/torch-fp32")
    text = " ".join(summary([*rows, even])).replace("\u00a0", " ")
    assert "is as accurate as at full precision (paired 95 % interval −2.3 to 2.3 points)" in text


def test_summary_of_nothing_claims_nothing():
    assert summary([]) == ["The teacher's accuracy was not measured."]
    reason = "The recipe names no test set (data.test)."
    rows = [not_measured("knn_top1", s, "torch-fp32", reason) for s in ("teacher", "students/small")]
    assert all("not measured" in s and reason in s for s in summary(rows))


def test_headline_order_and_missing_numbers():
    lines = headline_table(list(reversed(believable_rows())))
    assert [line.label for line in lines] == [
        "Raw pixels",
        "Random init., teacher",
        "Random init., small",
        "Teacher",
        "Distilled student small",
        "Control small, from scratch",
        "small, ONNX FP32",
        "small, ONNX INT8",
        "small, TensorRT-RTX FP16",
        "small, TensorRT-RTX INT8",
    ]
    control, engine = lines[5], lines[-1]
    assert control.latency is None
    assert engine.knn is not None
    assert engine.knn.reason == NO_GPU
    assert engine.size is not None
    assert engine.size.value == 0.35


def test_numbers_of_other_resolutions_and_batches_stay_apart():
    rows = [
        accuracy("knn_top1", 73.0, "students/small"),
        accuracy("knn_top1", 70.0, "students/small", "onnx-fp32").model_copy(update={"conditions": {"resolution": 96}}),
        accuracy("knn_top1", 73.0, "students/small", "onnx-fp32"),
        timing("latency_p50_ms", 9.0, "onnx-fp32", batch=8),
        timing("latency_p50_ms", 4.0, "onnx-fp32", resolution=96),
        timing("latency_p50_ms", 1.0, "onnx-fp32"),
        timing("images_per_s", 800.0, "onnx-fp32"),
        timing("images_per_s", 999.0, "onnx-fp32", batch=8),
    ]
    line = headline_table(rows)[1]
    assert (line.knn.value, line.latency.value) == (73.0, 1.0)
    small, large = tables.artifact_table(tables.Book(rows))
    assert (small.resolution, small.accuracy.value, small.latency.value, small.throughput.value) == (48, 73.0, 1.0, 999.0)
    assert (large.resolution, large.accuracy.value, large.latency.value, large.throughput) == (96, 70.0, 4.0, None)


def test_missing_groups_by_reason_and_says_each_thing_once():
    (group,) = tables.missing_table(believable_rows())
    assert group.reason == NO_GPU
    assert group.items[0] == (
        "small, TensorRT-RTX FP16 at 48 px",
        "kNN, linear probe, parity, latency at batch 1, latency at batch 8, throughput at batch 8",
    )
    assert len(group.items) == 2


def test_numbers_are_written_as_promised():
    row = accuracy("knn_top1", 50.0, "teacher")
    assert tables.percent(None) == tables.significant(None) == tables.points(None) == tables.cosine(None) == "not measured"
    assert tables.cosine(row.model_copy(update={"value": 0.9999994})) == "0.99999"  # never rounded up to 1
    assert tables.cosine(row.model_copy(update={"value": 1.0})) == "1"
    assert [tables.digits(v) for v in (0, 0.01234, 1.0, 12.34, 123.4, 12345.6)] == [
        "0",
        "0.0123",
        "1.00",
        "12.3",
        "123",
        "12,346",
    ]
    assert (tables.signed(-0.04), tables.signed(0.3), tables.signed(-2.0)) == ("0.0", "+0.3", "−2.0")


def test_console_table_fits_a_terminal():
    console = Console(width=80, file=io.StringIO())
    console.print(console_table(believable_rows()))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"Teacher\s+78\.6 ±1\.1\s+81\.9 ±1\.1\s+2\.31\s+0\.610", text)
    assert re.search(r"TensorRT-RTX INT8\s+not measured\s+not measured\s+not measured\s+0\.350", text)
    assert "n = 5,000 test images" in text
    assert "batch 1" in text


def test_nothing_measured_still_gives_a_page(tmp_path):
    run = tmp_path / "empty"
    run.mkdir()
    page = page_of(write_report(run, run / "report", []).parent)
    text = words(page.text)
    assert text.count("not measured") >= 3
    assert "The run made no artifacts." in text
    Console(file=io.StringIO()).print(console_table([]))


def test_half_finished_and_damaged_run_folders(tmp_path):
    """A log line cut by a kill, a NaN, a done.json that is no JSON: left out, never a crash, never an invented number."""
    run = believable_run(tmp_path / "r")
    log = run / "teacher" / "train.jsonl"
    log.write_text(log.read_text() + '{"step": 9, "images": 99999, "loss": NaN}\n[1]\n{"step": 10, "ima')
    (run / "evaluate" / "done.json").write_text("{")
    replaced = run / "replaced" / "teacher" / "done.json"
    write_json(replaced, {"stage": "pretrain", "seconds": 9999.0})
    write_report(run, run / "report", believable_rows())
    found = json.loads((run / "report" / "report.json").read_text())
    assert found["curves"]["teacher"][-1]["loss"] is None
    assert len(found["curves"]["teacher"]) == 64
    assert [s["seconds"] for s in found["stages"]] == [71.4, 33.0]


def test_names_from_users_are_text_and_not_markup(tmp_path):
    run = tmp_path / "r"
    bad = "<script>alert(1)</script>|"
    write_text(run / "recipe.yaml", f"name: {bad}\n# {{{{ 7*7 }}}} </pre>\n")
    rows = [
        accuracy("knn_top1", 50.0, f"students/{bad}", "onnx-fp32", note=bad),
        timing("latency_p50_ms", 1.0, "onnx-fp32", subject=f"students/{bad}"),
        not_measured("knn_top1", f"students/{bad}", "rtx-int8", f"because {bad} | [red]x[/red]"),
    ]
    believable_log(run / "students" / "[bold]x" / "train.jsonl", 640, 0, 1.0)
    page = write_report(run, run / "report", rows, ReportConfig(title=bad))
    text = page.read_text()
    assert bad not in text
    assert text.count("<script>") == 1
    assert "{{ 7*7 }}" in text
    console = Console(width=120, file=io.StringIO())
    console.print(console_table(rows))
    assert bad.split("(")[0] in console.file.getvalue()
    markdown = (run / "report" / "report.md").read_text()
    assert "<" not in markdown
    assert all(line.replace("\\|", "").count("|") == 7 for line in markdown.splitlines() if line.startswith("| "))


def test_fingerprint_of_the_measuring_machine_wins(tmp_path):
    run = believable_run(tmp_path / "r")
    write_json(run / "benchmark" / "fingerprint.json", {"cpu": None, "gpus": [{"name": "Orin"}], "commit": "c0ffee"})
    write_report(run, run / "report", believable_rows())
    found = json.loads((run / "report" / "report.json").read_text())
    assert found["fingerprint"]["gpus"] == [{"name": "Orin"}]
    assert found["fingerprint_of"] == "the machine that measured"
    assert found["commands"][0] == "git checkout c0ffee"
    assert "Orin" in page_of(run / "report").text


def test_report_uses_the_accuracy_that_was_asked_for(tmp_path):
    run = believable_run(tmp_path / "r")
    write_report(run, run / "report", believable_rows(), ReportConfig(accuracy="linear_top1", title="My run"))
    page = page_of(run / "report")
    charts = [a["aria-label"] for a in page.all("svg") if a.get("class") in ("wide", "narrow")]
    assert len(charts) == 2
    assert all("linear probe 81.9" in label for label in charts)
    assert "My run" in page.text


def test_rows_from_disk_give_the_same_report(tmp_path):
    write_rows(tmp_path / "rows.jsonl", believable_rows())
    assert headline_table(read_rows(tmp_path / "rows.jsonl")) == headline_table(believable_rows())


# Charts.


def numbers(text, pattern):
    return [float(v) for v in re.findall(pattern, text)]


def test_scatter_shows_points_where_they_are():
    points = [plots.Point(1.0, 70.0, "a", "a tip"), plots.Point(10.0, 80.0, "b", "b", y_interval=(78.0, 82.0), shape="square")]
    svg = plots.scatter(points, "T", "x", "y", 700, 400)
    (ax,), (ay,) = (
        numbers(svg, r'<circle class="dot" cx="([\d.]+)"'),
        numbers(svg, r'<circle class="dot" cx="[\d.]+" cy="([\d.]+)"'),
    )
    (bx,) = (v + 5 for v in numbers(svg, r'<rect class="dot" x="([\d.]+)"'))
    assert 44 < ax < bx < 690
    assert ay > 200
    assert "<title>a tip</title>" in svg
    one, ten = (numbers(svg, rf'x="([\d.]+)" y="[\d.]+" text-anchor="middle">{v}<')[0] for v in (1, 10))
    assert (one, ten) == pytest.approx((ax, bx), abs=0.2)  # the axis says what the marks say


def test_frontier_keeps_what_nothing_beats():
    p = [plots.Point(x, y, "", "") for x, y in ((1, 50), (2, 70), (3, 60), (4, 70), (5, 90))]
    assert [(q.x, q.y) for q in plots.frontier(p)] == [(1, 50), (2, 70), (5, 90)]


@pytest.mark.parametrize("seed", range(5))
def test_labels_never_cover_each_other_or_leave_the_frame(seed):
    """Nine points with whiskers, some nearly on top of each other, on the narrow chart."""
    random = np.random.default_rng(seed)
    points = [
        plots.Point(float(x), float(y), f"small, ONNX {i}", "", y_interval=(y - 1, y + 1))
        for i, (x, y) in enumerate(zip(np.exp(random.normal(0, 0.7, 9)), random.normal(73, 2, 9), strict=True))
    ]
    canvas = plots.Canvas(
        364, 400, plots.padded([p.x for p in points], log=True), plots.padded([p.y for p in points]), log_x=True
    )
    boxes = []
    for p, (x, y, anchor, _) in zip(points, plots.place_labels(canvas, points, plots.frontier(points)), strict=True):
        width = len(p.label) * plots.LETTER * canvas.font
        left = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
        boxes.append((left, y - 0.85 * canvas.font, left + width, y + 0.3 * canvas.font))
    for i, a in enumerate(boxes):
        assert a[0] >= canvas.left - 2
        assert a[2] <= canvas.width - canvas.right + 2
        assert all(plots._overlap(a, b) < 20 for b in boxes[:i])


def test_axis_numbers_are_round_and_inside():
    assert plots.ticks(0, 10, most=5) == [0, 2, 4, 6, 8, 10]
    assert plots.ticks(0.9, 110, log=True, most=5) == [1, 3, 10, 30, 100]
    for low, high in ((0.29, 0.31), (1, 1000), (0.0123, 0.9)):
        found = plots.ticks(low, high, log=True)
        assert len(found) >= 2
        assert all(low <= v <= high for v in found)
    assert [plots.short(v) for v in (0, 20000, -0.1, 1.5e6, 3e-5, 1500)] == ["0", "20k", "−0.1", "1.5M", "3e−5", "1.5k"]


def test_line_panels_of_one_point_and_of_constant_values():
    assert "<circle" in plots.lines([plots.Line("a", [64], [1.0])], "T", "images")
    assert "NaN" not in plots.lines([plots.Line("a", [1, 2], [3.0, 3.0])], "T", "images")


# Pictures.


def test_strip_is_a_picture_of_the_promised_size(strip):
    picture = Image.open(io.BytesIO(strip))
    assert picture.size == (8 * 112 + 7 * 6, 3 * (34 + 112) + 2 * 6)
    assert picture.mode == "RGBA"
    assert len({picture.getpixel((x, 34 + 146 + 60)) for x in range(0, 900, 20)}) > 10  # coloured, not one grey


def test_patch_colours_tell_patches_apart():
    """Two kinds of patches along the strongest direction, noise elsewhere: red separates them, in every image alike."""
    random = np.random.default_rng(0)
    kind = random.integers(0, 2, (4, 36))
    patches = random.normal(0, 0.05, (4, 36, 16))
    patches[..., 3] += 5 * kind
    red = pca_colours(patches)[..., 0].reshape(4, 36)
    assert red[kind == 1].min() > red[kind == 0].max()
    assert red.min() == 0
    assert red.max() == 1


def test_colours_of_models_are_matched_without_distortion():
    random = np.random.default_rng(0)
    a = random.uniform(0, 1, (2, 6, 6, 3))
    shuffled = np.stack([1 - a[..., 2], a[..., 0], a[..., 1]], -1)
    assert np.allclose(like(shuffled, a), a)


def test_strip_takes_any_pictures_and_encoders():
    class Flat:
        target, conditions = "x", {}

        def __call__(self, images):
            return Features(torch.zeros(len(images), 2), torch.zeros(len(images), 16, 2))

    class Broken(Flat):
        def __call__(self, images):
            return Features(torch.zeros(len(images), 2), torch.full((len(images), 16, 2), float("nan")))

    pictures = [Image.new("L", (50, 20), 128), Image.new("CMYK", (1, 1)), Image.new("RGBA", (300, 400))]
    encoders = {"raw pixels": RawPixels(), "flat": Flat(), "broken": Broken(), "a caption " * 40: Flat()}
    picture = Image.open(io.BytesIO(pca_strip(pictures, encoders, Preprocess(size=32, resize=32))))
    assert picture.size[1] == 5 * (34 + 112) + 4 * 6
    with pytest.raises(ValueError, match="at least one"):
        pca_strip([], encoders, Preprocess(size=32, resize=32))
    with pytest.raises(ValueError, match="square"):
        pca_colours(np.zeros((1, 15, 4)))
