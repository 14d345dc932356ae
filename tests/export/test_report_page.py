"""The page as a whole: small with hundreds of files, free of what axe finds, and its controls work in a browser."""

import itertools
import runpy
from pathlib import Path

import pytest

from distill.rows import Row
from export.report import write_report
from export.reporting.candidates import candidates_of
from export.reporting.page import MOST_ROWS, all_numbers
from export.reporting.tables import Book
from tests.export import compressed_run as sample
from tests.export.test_report import accuracy, believable_rows, believable_run, difference, timing
from tests.export.test_report_tasks import rows as task_rows

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "page.py"
TARGETS = [f"{r}-{p}" for r, p in itertools.product(("onnx", "openvino", "rtx", "trt"), ("fp32", "fp16", "bf16", "int8", "w8"))]


def many_rows(models=10):
    """20 files of each model, each with about as many rows and conditions as a real run's."""
    about = {"sha256": "0123456789abcdef" * 4, "versions": {"onnxruntime": "1.32.0", "onnx": "1.20.0"}, "artifact": "x" * 60}
    rows = [accuracy("knn_top1", 85.0, "teacher"), accuracy("linear_top1", 87.0, "teacher")]
    for m in range(models):
        subject = f"students/model{m}"
        rows += [accuracy("knn_top1", 70.0 + m, subject), accuracy("linear_top1", 72.0 + m, subject)]
        for i, target in enumerate(TARGETS):
            knn, ms = 70.0 + m - 0.13 * i, 0.3 * (1 + m) * (1 + 0.07 * i)
            rows.append(accuracy("knn_top1", knn, subject, target, **about))
            rows.append(accuracy("linear_top1", knn + 2, subject, target, **about))
            rows.append(difference(-0.13 * i, 0.4, subject, target, f"{subject}/torch-fp32"))
            rows.append(
                Row(metric="size_mb", value=1 + m / (1 + i), subject=subject, target=target, conditions={"resolution": 48})
            )
            for batch in (1, 8):
                for metric in (
                    "latency_p50_ms",
                    "latency_p90_ms",
                    "latency_p99_ms",
                    "latency_mean_ms",
                    "images_per_s",
                    "peak_memory_mb",
                ):
                    rows.append(timing(metric, ms * batch, target, subject, batch=batch, **about))
            for output, metric in itertools.product(
                ("cls", "patches"), ("cosine_min", "cosine_p1", "max_abs", "mean_abs", "nan_count")
            ):
                conditions = {"resolution": 48, "output": output, "source": "torch-fp32", **about}
                rows.append(Row(metric=metric, value=0.99, n=64, subject=subject, target=target, conditions=conditions))
    return rows


def test_two_hundred_files_fit_in_five_megabytes(tmp_path):
    rows = many_rows()
    page = write_report(tmp_path, tmp_path / "report", rows)
    assert len([c for c in candidates_of(Book(rows)) if c.ships]) == 200
    assert page.stat().st_size < 5e6
    shown = all_numbers(rows)
    assert sum(len(g.lines) for g in shown) == MOST_ROWS < len(rows)


def test_what_a_metrics_rows_share_is_said_once():
    (group,) = all_numbers([timing("load_s", 1.0, "onnx-fp32"), timing("load_s", 2.0, "onnx-int8", batch=8)])
    assert "runtime=onnxruntime 1.32.0" in group.shared
    assert [own for _, own in group.lines] == ["batch=1", "batch=8"]


@pytest.fixture(scope="module")
def tool():
    """The benchmark's browser, where there is one."""
    pytest.importorskip("playwright")
    found = runpy.run_path(str(BENCHMARK))
    if found["chromium"]() is None:
        pytest.skip("no Chromium on this machine")
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    run = believable_run(tmp_path_factory.mktemp("pages") / "quickstart")
    plain = write_report(run, run / "report", believable_rows() + task_rows())
    full = sample.run(tmp_path_factory.mktemp("pages") / "compressed")
    return [plain, write_report(full, full / "report", sample.rows())]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), itertools.product((400, 1280), ("light", "dark")))
def test_axe_finds_nothing_serious(tool, pages, width, scheme):
    axe = tool["axe_script"]()
    if axe is None:
        pytest.skip("axe-playwright-python is not installed")
    with tool["browser"]() as browser:
        for path in pages:
            page = tool["open_page"](browser, path.as_uri(), width, scheme)
            found = tool["findings"](page, axe)
            assert [f for f in found if f["impact"] in ("serious", "critical")] == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_the_controls_answer(tool, pages):
    with tool["browser"]() as browser:
        errors = []
        page = tool["open_page"](browser, pages[0].as_uri(), 1280, "light")
        page.on("pageerror", lambda error: errors.append(error))
        assert "small, ONNX FP32" in page.inner_text("#answer")
        page.fill("[name=latency_ms]", "0.3")
        assert "small, ONNX INT8" in page.inner_text("#answer")
        page.fill("[name=latency_ms]", "0.1")
        assert "Nothing measured meets this." in page.inner_text("#answer")
        marks = page.locator("#plot .point")
        assert marks.count() == 4
        marks.first.focus()
        assert "small, ONNX INT8" in page.inner_text(".card")
        page.keyboard.press("ArrowRight")
        assert "small, ONNX FP32" in page.inner_text(".card")
        page.keyboard.press("Escape")
        assert page.locator(".card").is_hidden()
        page.select_option("#plot [name=x]", "size")
        assert "size" in page.inner_text("figcaption >> nth=0")
        page.get_by_role("checkbox", name="Teacher").uncheck()
        assert "Teacher" not in page.inner_text("#plot .front")
        head = page.locator("table.sortable thead th").nth(1)
        head.locator("button").press("Enter")
        assert head.get_attribute("aria-sort") == "ascending"
        assert errors == []
        still = tool["open_page"](browser, pages[0].as_uri(), 1280, "light", script=False)
        assert still.locator("#pareto .static svg.wide").is_visible()
        assert still.locator("#ask").is_hidden()
