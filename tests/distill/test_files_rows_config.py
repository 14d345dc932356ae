"""Files that are whole or absent, rows that say what they are, settings that are never guessed."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from distill import files
from distill.config import Config
from distill.errors import DecantError, EnvironmentFailed, GateFailed, UserError
from distill.files import read_json, replacing, sha256_file, sha256_json, write_bytes, write_json, write_text
from distill.rows import Row, not_measured, read_rows, write_rows


class Killed(BaseException):
    pass


def test_replacing_writes_beside_and_renames(tmp_path):
    path = tmp_path / "deep" / "er" / "model.onnx"
    with replacing(path) as part:
        assert part.parent == path.parent
        assert part.suffix == ".onnx"
        assert part.name.startswith(".part-")  # what the run folder sweeps
        part.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["model.onnx"]


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.EIO, "io"), KeyboardInterrupt(), Killed()], ids=repr)
@pytest.mark.parametrize("there", [True, False])
def test_a_failure_leaves_neither_the_part_nor_a_damaged_target(tmp_path, error, there):
    path = tmp_path / "a.json"
    if there:
        path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as part:  # noqa: PT012
        part.write_text("half of the ne")
        raise error
    assert (path.read_text() if there else None) == ("old" if there else None)
    assert os.listdir(tmp_path) == (["a.json"] if there else [])


@pytest.mark.parametrize("at", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch, at, code):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, at, full)
    with pytest.raises(EnvironmentFailed, match="disk is full") as e:
        write_text(path, "new")
    assert str(path) in str(e.value)
    assert "run the same command again" in str(e.value)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_while_writing_is_a_sentence(tmp_path):
    with pytest.raises(EnvironmentFailed, match="disk is full"), replacing(tmp_path / "a") as part:  # noqa: PT012
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_parts_of_killed_processes_are_swept_and_those_of_living_ones_are_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, running, foreign = (tmp_path / f".part-{n}" for n in (f"{dead.pid}-a.txt", f"{os.getppid()}-a.txt", "notes-a.txt"))
    for path in (left, running, foreign):
        path.write_text("half")
    write_text(tmp_path / "a.txt", "new")
    assert not left.exists()
    assert running.exists()
    assert foreign.exists()
    assert (tmp_path / "a.txt").read_text() == "new"


def test_other_errors_of_the_system_pass_through(tmp_path, monkeypatch):
    def broken(*args: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output") as e:
        write_text(tmp_path / "a", "x")
    assert not isinstance(e.value, DecantError)
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_permissions(tmp_path, monkeypatch):
    def refused(*args: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.os, "chmod", refused)
    write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


def test_what_is_written_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    order: list[str] = []
    sync, move = os.fsync, os.replace

    def noting(name: str, function: Any) -> Any:
        def noted(*args: Any) -> None:
            order.append(name)
            function(*args)

        return noted

    monkeypatch.setattr(files.os, "fsync", noting("fsync", sync))
    monkeypatch.setattr(files.os, "replace", noting("replace", move))
    write_bytes(tmp_path / "a", b"x")
    assert order == ["fsync", "replace"]


def test_json_is_stable_and_readable(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": {"ü": "–"}}
    write_json(tmp_path / "a.json", value)
    write_json(tmp_path / "b.json", dict(reversed(value.items())))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert '"ü": "–"' in text
    assert text.endswith("}\n")
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_holds_no_nan(tmp_path, value):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": value})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_hashes(tmp_path):
    data = os.urandom(3_000_000)
    write_bytes(tmp_path / "a", data)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    assert sha256_json({"a": 1, "b": [2]}) == sha256_json({"b": [2], "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 1.5})
    assert sha256_json([1, 2]) != sha256_json([2, 1])


ROW: dict[str, Any] = {"metric": "knn_top1", "subject": "teacher", "target": "torch-fp32"}


def test_rows_round_trip(tmp_path):
    rows = [
        Row(**ROW, value=78.5, low=76.6, high=80.4, n=2000, conditions={"k": 20, "data": "scenes", "threads": None}),
        not_measured("latency_p50_ms", "students/small", "rtx-int8", "no GPU here", batch=1),
        Row(**ROW, value=0.0),
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert "value" not in json.loads(lines[1])
    write_rows(tmp_path / "rows.jsonl", [])
    assert read_rows(tmp_path / "rows.jsonl") == []
    assert read_rows(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), -float("inf")])
def test_a_measured_row_has_a_finite_value(value):
    with pytest.raises(ValidationError, match="needs a finite value"):
        Row(**ROW, value=value)


@pytest.mark.parametrize("given", [{"reason": None}, {"reason": ""}, {"reason": "no GPU", "value": 1.0}])
def test_a_row_that_is_not_measured_has_a_reason_and_no_value(given):
    with pytest.raises(ValidationError, match="needs a reason and no value"):
        Row(**ROW, status="not measured", **given)


@pytest.mark.parametrize(
    "given", [{"value": "78"}, {"value": 1.0, "n": 1.5}, {"value": 1.0, "unit": "%"}, {"value": 1.0, "status": "guessed"}]
)
def test_rows_are_strict(given):
    with pytest.raises(ValidationError):
        Row(**ROW, **given)


@pytest.mark.parametrize("end", ["low", "high"])
def test_the_ends_of_an_interval_are_finite(end):
    with pytest.raises(ValidationError):
        Row(**(ROW | {"value": 1.0, end: float("nan")}))


def test_rows_do_not_share_their_conditions():
    a, b = Row(**ROW, value=1.0), Row(**ROW, value=2.0)
    a.conditions["k"] = 20
    assert b.conditions == {}


class Inner(Config):
    rate: float = 0.5
    sides: tuple[int, int] = (1, 2)


class Outer(Config):
    name: str
    count: int = 3
    inner: Inner = Inner()
    limit: int | None = None


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"name": 3},
        {"name": "x", "count": "3"},
        {"name": "x", "count": 3.0},
        {"name": "x", "count": True},
        {"name": "x", "cuont": 3},
        {"name": "x", "inner": {"rate": "0.5"}},
        {"name": "x", "inner": {"sides": [1, 2, 3]}},
        {"name": "x", "inner": {"extra": 1}},
        {"name": "x", "limit": "none"},
    ],
    ids=str,
)
def test_settings_are_never_guessed(given):
    with pytest.raises(ValidationError):
        Outer.model_validate_json(json.dumps(given))


def test_settings_from_json():
    made = Outer.model_validate_json('{"name": "x", "inner": {"rate": 1, "sides": [3, 4]}}')
    assert (made.inner.rate, made.inner.sides, made.count) == (1.0, (3, 4), 3)
    assert Outer.model_validate_json(made.model_dump_json()) == made


def test_settings_cannot_be_changed():
    made = Outer(name="x")
    with pytest.raises(ValidationError):
        made.count = 4  # type: ignore[misc]
    with pytest.raises(ValidationError):
        made.inner.rate = 0.1  # type: ignore[misc]


def test_exit_codes():
    assert [e.exit_code for e in (GateFailed, UserError, EnvironmentFailed)] == [1, 2, 3]
    assert all(issubclass(e, DecantError) for e in (GateFailed, UserError, EnvironmentFailed))


def test_paths_with_odd_names(tmp_path: Path):
    for name in ("ünï cödé.json", "a'b\"c.json", ".hidden"):
        write_json(tmp_path / name, 1)
        assert read_json(tmp_path / name) == 1
    assert len(os.listdir(tmp_path)) == 3
