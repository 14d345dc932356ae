"""Two runs compared: pairs, intervals, machines, gates, and what is written for people and CI."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from distill.errors import UserError
from distill.evaluate.intervals import paired, wilson
from distill.evaluate.pairs import Predictions
from distill.evaluate.scores import ScoreBook, percent_right
from distill.files import write_json
from distill.rows import Row, write_rows
from export.compare import Side, compare, read_side, settings_changed
from export.reporting.compare_gates import Gate, judge
from export.reporting.compare_report import change_table, junit, markdown

MACHINE = {"cpu": {"model": "A", "cores": 2, "usable_threads": 2}, "gpus": [], "packages": {"torch": "2.11"}}
N = 400


def row(metric, value, low=None, high=None, target="onnx-int8", **conditions):
    conditions = {"resolution": 48, **conditions}
    return Row(
        metric=metric, value=value, low=low, high=high, n=N, subject="students/small", target=target, conditions=conditions
    )


def accuracy(right, fingerprint="d1", predictions=True):
    """A side that got these of N test images right."""
    low, high = (float(v) for v in wilson(int(right.sum()), N))
    data = {"data": "set", "data_fingerprint": fingerprint, "resolution": 48}
    rows = [row("knn_top1", 100 * right.mean(), low, high, data_fingerprint=fingerprint)]
    if not predictions:
        return Side("x", rows, machine=MACHINE)
    truth = torch.zeros(N, dtype=torch.int64)
    book = Predictions(torch.arange(N), truth)
    book.add("students/small", "onnx-int8", "knn_top1", torch.from_numpy(np.where(right, 0, 1)), data)
    return Side("x", rows, machine=MACHINE, predictions=book)


GENERATOR = np.random.default_rng(0)
BASE = GENERATOR.random(N) < 0.8
SLIGHTLY_BETTER = BASE | (GENERATOR.random(N) < 0.1)


def test_the_same_images_are_compared_in_pairs():
    (change,) = compare(accuracy(BASE), accuracy(SLIGHTLY_BETTER)).changes
    wanted = paired(SLIGHTLY_BETTER, BASE)
    assert (change.low, change.high, change.how, change.verdict) == (wanted.low, wanted.high, "paired", "BETTER")
    assert change.difference == pytest.approx(wanted.difference)


def test_without_the_answers_both_intervals_count_and_less_is_known():
    (change,) = compare(accuracy(BASE, predictions=False), accuracy(SLIGHTLY_BETTER, predictions=False)).changes
    assert change.how == "intervals"
    assert change.verdict == "INCONCLUSIVE"
    assert change.high - change.low > 2 * (paired(SLIGHTLY_BETTER, BASE).high - paired(SLIGHTLY_BETTER, BASE).low)


def test_other_test_images_are_not_compared():
    found = compare(accuracy(BASE, "d1"), accuracy(SLIGHTLY_BETTER, "d2"))
    assert found.changes[0].verdict == "NOT COMPARED"
    assert "other test or gallery images" in " ".join(found.notes)
    assert not judge(found, [Gate.parse("knn>=-50")])[0].passed


def test_threads_and_batch_tell_times_apart_and_no_accuracies():
    a, b = (row("knn_top1", v, v - 1, v + 1, threads=t, batch=t) for v, t in ((80.0, 2), (70.0, 16)))
    (change,) = compare(Side("a", [a]), Side("b", [b])).changes
    assert change.verdict == "WORSE"


def test_a_number_that_disappears_fails_its_gate():
    torch_row, int8 = row("knn_top1", 80.0, 79.0, 81.0, target="torch-fp32"), row("knn_top1", 80.0, 79.0, 81.0)
    found = compare(Side("a", [torch_row, int8]), Side("b", [torch_row]))
    judged = judge(found, [Gate.parse("knn>=-1")])
    assert [j.passed for j in judged] == [True, False]
    assert "the second run has no knn_top1 of students/small on onnx-int8" in judged[1].why
    assert ElementTree.fromstring(junit(found, judged)).get("failures") == "1"


@pytest.mark.parametrize(("name", "said"), [("queries_fingerprint", "other data"), ("max_depth", "other max_depth")])
def test_other_queries_or_another_protocol_are_not_compared(name, said):
    a, b = (row("map", v, v - 1, v + 1, task="t", **{name: str(v)}) for v in (80.0, 70.0))
    (change,) = compare(Side("a", [a]), Side("b", [b])).changes
    assert (change.verdict, change.how, change.low) == ("NOT COMPARED", said, None)


def test_a_run_against_itself_is_equal():
    assert compare(accuracy(BASE), accuracy(BASE)).changes[0].difference == 0
    assert (
        compare(accuracy(BASE), accuracy(BASE)).changes[0].verdict == "INCONCLUSIVE"
    )  # equal answers do not prove equal models
    size = Side("x", [row("size_mb", 5.0)])
    assert compare(size, size).changes[0].verdict == "EQUAL"


def test_times_need_the_same_machine():
    fast, slow = row("latency_p50_ms", 10.0, 9.9, 10.1, batch=1), row("latency_p50_ms", 12.0, 11.9, 12.1, batch=1)
    (change,) = compare(Side("a", [slow], machine=MACHINE), Side("b", [fast], machine=MACHINE)).changes
    assert change.verdict == "BETTER"
    assert change.low < -2 < change.high < 0
    other = MACHINE | {"cpu": MACHINE["cpu"] | {"model": "B"}}
    found = compare(Side("a", [slow], machine=MACHINE), Side("b", [fast], machine=other))
    assert found.changes[0].verdict == "NOT COMPARED"
    assert "different machines" in found.notes[0]
    assert compare(Side("a", [slow]), Side("b", [fast])).changes[0].how == "the machine is not known"


def test_conditions_tell_rows_apart_and_what_one_run_lacks_is_named():
    a = Side("a", [row("latency_p50_ms", 1.0, batch=1), row("latency_p50_ms", 5.0, batch=8)], machine=MACHINE)
    b = Side("b", [row("latency_p50_ms", 5.5, batch=8), row("size_mb", 3.0)], machine=MACHINE)
    found = compare(a, b)
    assert [(c.where["batch"], c.a, c.b) for c in found.changes] == [(8, 5.0, 5.5)]
    assert found.only_a == ["latency_p50_ms of students/small on onnx-int8"]
    assert found.only_b == ["size_mb of students/small on onnx-int8"]


def test_scores_of_tasks_are_compared_in_pairs_too():
    sides = []
    for right in (BASE, SLIGHTLY_BETTER):
        book = ScoreBook()
        conditions = {"task": "copies", "kind": "retrieval", "data_fingerprint": "d", "resolution": 48}
        rows = book.rows("students/small", "onnx-int8", conditions, [percent_right("map", right)])
        sides.append(Side("x", rows, machine=MACHINE, scores=book))
    (change,) = compare(*sides).changes
    assert (change.how, change.verdict) == ("paired", "BETTER")
    assert change.where["task"] == "copies"


def test_gates_read_their_text():
    gate = Gate.parse("knn@students/small/onnx-int8 >= -0.3")
    assert (gate.metric, gate.who, gate.at_least, gate.bound, gate.relative) == (
        "knn_top1",
        "students/small/onnx-int8",
        True,
        -0.3,
        False,
    )
    assert Gate.parse("latency<=+5%").relative
    for text, said in (
        ("knn", "cannot be read"),
        ("knn>-1", "cannot be read"),
        ("beauty>=1", "no metric"),
        ("latency>=5", "better when lower"),
        ("knn<=1", "better when higher"),
    ):
        with pytest.raises(UserError, match=said):
            Gate.parse(text)


def test_gates_hold_by_value_or_strictly_by_interval():
    found = compare(accuracy(BASE), accuracy(SLIGHTLY_BETTER))
    (change,) = found.changes
    between = f"knn>={(change.low + change.difference) / 2}"
    loose, strict = (judge(found, [Gate.parse(between)], s)[0] for s in (False, True))
    assert loose.passed
    assert not strict.passed
    assert "its interval reaches" in loose.why
    assert judge(found, [Gate.parse("knn>=0")], strict=True)[0].passed
    assert not judge(found, [Gate.parse("knn>=99")])[0].passed


def test_relative_gates_and_gates_on_nothing():
    a, b = Side("a", [row("size_mb", 10.0)]), Side("b", [row("size_mb", 10.4)])
    found = compare(a, b)
    assert judge(found, [Gate.parse("size<=5%")])[0].passed
    assert not judge(found, [Gate.parse("size<=3%")], strict=True)[0].passed
    (nothing,) = judge(found, [Gate.parse("knn>=-1")])
    assert not nothing.passed
    assert nothing.change is None
    assert not judge(found, [Gate.parse("size@teacher<=5%")])[0].passed


def test_markdown_and_junit_say_the_same():
    found = compare(accuracy(BASE), accuracy(SLIGHTLY_BETTER))
    judged = judge(found, [Gate.parse("knn>=0"), Gate.parse("knn>=50"), Gate.parse("size<=0")])
    text = markdown(found, judged, ["distill.images: 10 → 20"])
    assert "| `knn>=0` | kNN of small, ONNX INT8 | passed |" in text
    assert text.count("**FAILED**") == 2
    assert "better" in text
    assert "- distill.images: 10 → 20" in text
    suite = ElementTree.fromstring(junit(found, judged))
    assert (suite.get("tests"), suite.get("failures")) == ("3", "2")
    assert [c.find("failure") is None for c in suite] == [True, False, False]
    plain = ElementTree.fromstring(junit(found, []))
    assert (plain.get("tests"), plain.get("failures")) == ("1", "0")


def test_the_table_shows_what_changed_and_all_when_asked():
    found = compare(Side("a", [row("size_mb", 10.0)]), Side("b", [row("size_mb", 10.0)]))
    assert change_table(found, [], everything=False) is None
    assert change_table(found, [], everything=True).row_count == 1


def test_names_cannot_break_the_markdown():
    a = Side("a|<b>", [row("size_mb", 1.0)])
    assert "<b>" not in markdown(compare(a, a), [], [], everything=True)


def test_sides_are_read_from_runs_reports_and_rows(tmp_path):
    rows = [row("size_mb", 5.0)]
    write_rows(tmp_path / "run" / "rows.jsonl", rows)
    (tmp_path / "run" / "recipe.yaml").write_text("name: x\nseed: 1\n")
    stored = {
        "rows": [r.model_dump(exclude_none=True) for r in rows],
        "run": {"name": "kept"},
        "recipe": "seed: 2\n",
        "fingerprint": MACHINE,
    }
    write_json(tmp_path / "report.json", stored)
    run, report, plain = (read_side(tmp_path / p) for p in ("run", "report.json", "run/rows.jsonl"))
    assert run.rows == report.rows == plain.rows == rows
    assert (run.name, report.name) == ("run", "kept")
    assert settings_changed(run, report) == ["seed: 1 → 2"]
    assert settings_changed(run, plain) == []


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"rows": 3}', b"\xff\xfe"])
def test_files_that_are_no_results_are_a_sentence(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError):
        read_side(tmp_path / "x.json")
    with pytest.raises(UserError, match="There is no"):
        read_side(tmp_path / "absent.json")
    with pytest.raises(UserError, match="no run folder"):
        read_side(tmp_path)


def test_the_command_writes_everything_before_it_fails(tmp_path, capsys):
    from distill.errors import GateFailed
    from recipes.compare import compare as command

    for name, size in (("a", 10.0), ("b", 12.0)):
        write_rows(tmp_path / name / "rows.jsonl", [row("size_mb", size)])
    out = {f"{kind}_file": tmp_path / f"out.{kind}" for kind in ("markdown", "junit", "json")}
    with pytest.raises(GateFailed, match="size<=10% failed on students/small onnx-int8"):
        command(tmp_path / "a", tmp_path / "b", ["size<=10%"], **out)
    assert all(path.stat().st_size for path in out.values())
    assert json.loads((tmp_path / "out.json").read_text())["changes"][0]["verdict"] == "WORSE"
    assert "FAILED  size<=10%" in capsys.readouterr().out
