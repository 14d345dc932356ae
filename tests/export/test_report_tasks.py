"""Tables of evaluations beside kNN and linear probe, from rows alone."""

from distill.rows import Row, not_measured
from export.report import write_report
from export.reporting import tables
from export.reporting.tables import Book
from export.reporting.task_report import task_views
from tests.export.test_report import Page, believable_rows, words

SEG = {"task": "camvid", "kind": "segmentation", "data": "camvid-test", "resolution": 48}
SMALL = "students/small"


def row(metric, value, target="torch-fp32", subject=SMALL, n=101, half=2.0, **more):
    interval = {"low": value - half, "high": value + half}
    return Row(metric=metric, value=value, n=n, subject=subject, target=target, conditions=more, **interval)


def rows():
    few = {"task": "cups", "kind": "retrieval", "data": "cups", "resolution": 48}
    return [
        row("miou", 61.2, subject="teacher", **SEG),
        row("miou", 55.1, "onnx-int8", **SEG),
        row("class_iou", 91.0, "onnx-int8", **SEG, class_name="road"),
        row("class_iou", 12.5, "onnx-int8", **SEG, class_name="pole"),
        row("miou_difference", -6.1, "onnx-int8", half=1.0, **SEG, versus="teacher/torch-fp32"),
        row("rmse_m", 0.512, half=0.02, task="nyu", kind="depth", data="nyu", resolution=48),
        row("rmse_m_difference", 0.031, half=0.01, task="nyu", kind="depth", data="nyu", versus="teacher/torch-fp32"),
        not_measured("delta1", SMALL, "torch-fp32", "no depth", task="nyu", kind="depth", data="nyu", resolution=48),
        row("recall_at_k", 80.0, n=20, k=10, few_samples=True, **few),
        row("recall_at_k", 60.0, n=20, k=1, few_samples=True, **few),
        row("few_shot_top1", 40.0, shots=5, **few),
        row("strange_new_score", 0.25, half=0.01, **few),
    ]


def test_a_table_a_task_with_columns_by_metric_and_setting():
    seg, depth, cups = task_views(Book(rows()))
    assert (seg.name, seg.kind, seg.about) == ("camvid", "segmentation", "on camvid-test; n = 101")
    assert seg.columns == [("mIoU, %", False)]
    assert [(label, cells[0].value) for label, cells in seg.lines] == [("Teacher", 61.2), ("small, ONNX INT8", 55.1)]
    assert seg.difference_columns == ["mIoU, points"]
    assert [(a, b, c[0].value) for a, b, c in seg.differences] == [("small, ONNX INT8", "Teacher", -6.1)]
    assert seg.classes == ["road", "pole"]
    assert [r.value for r in seg.class_lines[0][1]] == [91.0, 12.5]
    assert depth.columns == [("RMSE, m", True), ("δ < 1.25, %", False)]
    assert depth.lines[0][1][1].reason == "no depth"
    assert [c for c, _ in cups.columns] == ["recall@1, %", "recall@10, %", "5-shot, %", "strange new score"]
    assert (seg.few, cups.few) == (False, True)


def test_task_rows_stay_out_of_the_general_tables():
    """A kNN on other data, as a task, must not stand for the run's own."""
    other = row("knn_top1", 1.0, subject="teacher", task="other", resolution=48)
    book = Book([other, *believable_rows()])
    assert book.one("knn_top1", "teacher", "torch-fp32").value == 78.6
    assert len(book.rows) == len(believable_rows()) + 1


def test_few_samples_are_said_wherever_a_number_is_written():
    few = row("knn_top1", 80.0, n=20, few_samples=True)
    assert tables.percent(few) == "80.0 (78.0–82.0), few samples"
    assert tables.plus_minus(few) == "80.0 ±2.0, few samples"
    assert tables.points(few).endswith(", few samples")
    assert tables.difference(row("rmse_m_difference", -0.0312, half=0.01)) == "−0.0312 (−0.0412 to −0.0212)"


def test_the_page_shows_them(tmp_path):
    text = write_report(tmp_path, tmp_path / "report", believable_rows() + rows()).read_text()
    page = Page(text)
    shown = words(page.text)
    for part in (
        "Other tasks",
        "camvid",
        "Less is better: RMSE, m.",
        "recall@10, %",
        "few samples",
        "IoU of each class",
        "strange new score",
    ):
        assert part in shown
    assert "−6.1 (−7.1 to −5.1)" in shown
    assert "+0.0310 (+0.0210 to +0.0410)" in shown
    assert all(a.get("scope") for a in page.all("th"))
    assert "Other tasks" not in Page(write_report(tmp_path, tmp_path / "b", believable_rows()).read_text()).text
