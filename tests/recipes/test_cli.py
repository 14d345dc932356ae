"""The command: exit codes, sentences instead of tracebacks, what it prints at the end. The stages here are small stand-ins."""

import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distill.config import Config
from distill.errors import EnvironmentFailed, GateFailed
from distill.files import write_text
from distill.rows import Row, write_rows
from recipes import cli
from recipes.marks import Stage


class Recipe(Config):
    name: str = "soup"
    salt: int = 1


class Kitchen:
    """What the stand-in stages do, and how often."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.errors: dict[str, BaseException] = {}

    def plan(self, recipe: Recipe, run: Path) -> list[Stage]:
        def stage(name: str, folder: str, *inputs: str, **more) -> Stage:
            def work(where: Path, progress) -> None:
                self.calls.append(name)
                write_rows(where / "rows.jsonl", [Row(metric="knn_top1", value=recipe.salt, subject=name, target="torch-fp32")])
                write_text(where / {"report": "index.html", "bundle/small": "small.tar.gz"}.get(name, "out.txt"), name)
                if name in self.errors:
                    raise self.errors[name]

            return Stage(name, Path(folder), {"salt": recipe.salt}, work, inputs, **more)

        return [
            stage("pretrain", "teacher"),
            stage("evaluate", "evaluate", "pretrain"),
            stage("report", "report", "evaluate"),
            stage("bundle/small", "bundles/small", "report", needs_gates=True),
        ]


@pytest.fixture
def kitchen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kitchen:
    kitchen = Kitchen()

    def module(**content: object) -> types.SimpleNamespace:
        return types.SimpleNamespace(**content)

    monkeypatch.setitem(sys.modules, "recipes.schema", module(Recipe=Recipe))
    monkeypatch.setitem(sys.modules, "recipes.stages", module(plan=kitchen.plan))
    monkeypatch.setitem(
        sys.modules, "recipes.describe", module(describe=lambda recipe, run, processes: f"plan of {recipe.name} in {run}")
    )
    table = module(console_table=lambda rows: "TABLE " + ", ".join(f"{r.subject} {r.value:g}" for r in rows))
    monkeypatch.setitem(sys.modules, "export.report", table)
    monkeypatch.delenv("DECANT_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("soup.yaml").write_text("salt: 2\n")
    return kitchen


def decant(*args: str, code: int = 0):
    result = CliRunner().invoke(cli.app, args)
    assert result.exit_code == code, result.output
    assert code == 0 or "Traceback" not in result.output
    return result


def test_run_ends_with_table_report_and_next_command(kitchen: Kitchen):
    done = decant("run", "soup.yaml")
    assert kitchen.calls == ["pretrain", "evaluate", "report", "bundle/small"]
    assert done.stdout.splitlines() == [
        "TABLE pretrain 2, evaluate 2, report 2, bundle/small 2",
        "Report: runs/soup/report/index.html",
        "Next:   decant selftest runs/soup/bundles/small/small.tar.gz",
    ]
    assert "[1/4] pretrain: done" in done.stderr
    kitchen.calls.clear()
    again = decant("run", "soup.yaml")
    assert kitchen.calls == []
    assert again.stdout == done.stdout


def test_run_takes_settings_a_folder_and_a_last_stage(kitchen: Kitchen):
    done = decant("run", "soup.yaml", "--set", "salt=7", "--out", "pot", "--until", "evaluate")
    assert kitchen.calls == ["pretrain", "evaluate"]
    assert "Stopped after evaluate" in done.stdout
    assert "salt: 7" in Path("pot/recipe.yaml").read_text()
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["run", "nothing"], "There is no recipe 'nothing'"),
        (["run", "soup.yaml", "--set", "slat=1"], "--set slat: unknown key; did you mean salt?"),
        (["run", "soup.yaml", "--until", "evalute"], "did you mean evaluate?"),
        (["run", "soup.yaml", "--bogus"], "No such option"),
        (["run"], "Missing argument"),
        (["bogus"], "No such command"),
        (["check", "soup.yaml", "--set", "salt=x"], '--set salt: must be a whole number, got "x"'),
        (["eval", "nowhere"], "nowhere is not a run's folder"),
        (["verify", "nowhere.tar.gz"], "nowhere.tar.gz is not a file"),
    ],
)
def test_bad_usage_and_bad_recipes_exit_with_2(kitchen: Kitchen, args: list[str], sentence: str):
    assert sentence in decant(*args, code=2).output
    assert kitchen.calls == []


def test_a_failed_gate_exits_with_1_after_the_table(kitchen: Kitchen):
    kitchen.errors = {"evaluate": GateFailed("int8 is 3 points below fp32; 1 is allowed.")}
    done = decant("run", "soup.yaml", code=1)
    assert kitchen.calls == ["pretrain", "evaluate", "report"]
    assert "TABLE pretrain 2, evaluate 2, report 2" in done.stdout
    assert done.stderr.splitlines()[-1] == "evaluate: int8 is 3 points below fp32; 1 is allowed."


def test_what_the_machine_lacks_exits_with_3(kitchen: Kitchen):
    kitchen.errors = {"pretrain": EnvironmentFailed("There is no GPU.")}
    done = decant("run", "soup.yaml", code=3)
    assert done.stderr.splitlines()[-1] == "There is no GPU."
    assert done.stdout == ""


def test_an_interruption_says_that_the_same_command_continues(kitchen: Kitchen):
    kitchen.errors = {"evaluate": KeyboardInterrupt()}
    assert "the same command continues" in decant("run", "soup.yaml", code=130).stderr
    kitchen.errors = {}
    kitchen.calls.clear()
    decant("run", "soup.yaml")
    assert kitchen.calls == ["evaluate", "report", "bundle/small"]


def test_a_defect_leaves_a_traceback_in_a_file(kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch):
    kitchen.errors = {"evaluate": ZeroDivisionError("three / zero")}
    done = decant("run", "soup.yaml", code=1)
    last = done.stderr.splitlines()[-1]
    assert "ZeroDivisionError: three / zero" in last
    assert "runs/soup/crash.txt" in last
    assert "raise self.errors[name]" in Path("runs/soup/crash.txt").read_text()
    monkeypatch.setenv("DECANT_DEBUG", "1")
    result = CliRunner().invoke(cli.app, ["run", "soup.yaml"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_a_defect_without_a_run_folder_goes_to_a_temporary_file(
    kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(sys.modules["recipes.stages"], "plan", lambda recipe, run: 1 / 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    last = decant("run", "soup.yaml", code=1).stderr.splitlines()[-1]
    path = next(tmp_path.glob("decant-*/crash.txt"))
    assert str(path) in last
    assert not Path("runs").exists()


def test_check_prints_the_plan_and_does_nothing(kitchen: Kitchen):
    before = sorted(Path().rglob("*"))
    assert decant("check", "soup.yaml").stdout == "plan of soup in runs/soup\n"
    assert decant("check", "soup.yaml", "--out", "pot").stdout == "plan of soup in pot\n"
    assert sorted(Path().rglob("*")) == before


def test_a_stage_of_a_finished_run_is_done_again(kitchen: Kitchen):
    decant("run", "soup.yaml", "--set", "salt=5")
    kitchen.calls.clear()
    done = decant("eval", "runs/soup")
    assert kitchen.calls == ["evaluate"]  # the same bytes: the report stands
    assert "TABLE pretrain 5" in done.stdout  # the run's own settings
    decant("bundle", "runs/soup")
    assert kitchen.calls == ["evaluate", "bundle/small"]


def test_an_unfinished_run_is_not_finished_by_the_way(kitchen: Kitchen):
    decant("run", "soup.yaml", "--until", "pretrain")
    kitchen.calls.clear()
    assert "its stage evaluate is not done (not done yet)" in decant("report", "runs/soup", code=2).stderr
    assert kitchen.calls == []


def test_schema_is_json(kitchen: Kitchen):
    assert json.loads(decant("schema").stdout)["properties"].keys() == {"name", "salt"}


def test_doctor_says_what_is_there_and_exits_with_3_only_for_what_is_needed(monkeypatch: pytest.MonkeyPatch):
    done = decant("doctor")
    for name in ("torch", "onnxruntime", "processor", "bf16", "GPU", "tensorrt_rtx", "openvino", "disk"):
        assert name in done.stdout

    def broken() -> str:
        raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr("recipes.doctor._onnxruntime_works", broken)
    assert "libcudart.so.12" in " ".join(decant("doctor", code=3).stdout.split())


def test_version_and_help():
    assert decant("--version").stdout.startswith("decant 0.")
    helped = decant("--help").stdout
    for command in (
        "run",
        "check",
        "eval",
        "export",
        "bench",
        "report",
        "bundle",
        "keygen",
        "sign",
        "verify",
        "layout",
        "selftest",
        "doctor",
        "schema",
    ):
        assert f"\n  {command} " in helped


def imported(*args: str) -> tuple[set[str], float]:
    """The modules that a command imports, and its seconds."""
    code = (
        "import sys; sys.argv = ['decant', *sys.argv[1:]]\nfrom recipes import cli\ntry: cli.main()\nexcept SystemExit: pass\n"
    )
    began = time.monotonic()
    command = [sys.executable, "-c", code + "print('MODULES', *sys.modules)", *args]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(out.split("MODULES")[1].split()), time.monotonic() - began


def test_help_is_quick_and_imports_nothing_heavy():
    runs = [imported("--help") for _ in range(3)]
    assert not runs[0][0] & {"torch", "numpy", "pydantic", "timm", "export.fingerprint"}
    assert min(seconds for _, seconds in runs) < 1  # 0.25 s where nothing else is going on


def test_check_imports_no_more_than_it_needs():
    modules, _ = imported("check", "quickstart")
    assert "recipes.describe" in modules
    heavy = {
        "datasets",
        "sklearn",
        "matplotlib",
        "tensorrt",
        "tensorrt_rtx",
        "openvino",
        "onnxscript",
        "pandas",
        "transformers",
    }
    assert not modules & (heavy | {"scipy.stats", "torch.utils.tensorboard", "torch_pruning"})
