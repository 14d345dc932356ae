"""Rules of the whole code, read from its syntax: imports point one way, no cycles, no shadowing, no unread setting."""

import ast
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("distill", "export", "recipes")  # each may import itself and those before it
# imported inside functions only
OPTIONAL = {
    "tensorrt",
    "tensorrt_rtx",
    "openvino",
    "nvidia",
    "gradio",
    "faiss",
    "av",
    "mlflow",
    "trackio",
    "tensorboard",
    "pynvml",
}

Sources = dict[str, str]  # module name -> its text


def read_sources() -> Sources:
    found = {}
    for floor in FLOORS:
        for path in sorted((ROOT / floor).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def imports(name: str, text: str, known: Sources) -> Iterator[str]:
    """Every module that `text` imports, wherever in it; of our own packages the exact file."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


class WithoutTyping(ast.NodeTransformer):
    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def wrong_directions(sources: Sources) -> list[str]:
    found = []
    for name, text in sources.items():
        floor = FLOORS.index(name.split(".")[0])
        for other in imports(name, text, sources):
            if other.split(".")[0] in FLOORS[floor + 1 :]:
                found.append(f"{name} imports {other}")
    return found


def cycles(sources: Sources) -> list[list[str]]:
    """Cycles of imports between files, each once. What only type checkers see is left out."""
    running = {n: ast.unparse(WithoutTyping().visit(ast.parse(t))) for n, t in sources.items()}
    graph = {n: sorted({o for o in imports(n, t, sources) if o in sources and o != n}) for n, t in running.items()}
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> None:
        if name in way:
            found.append([*way[way.index(name) :], name])
        elif name not in done:
            for other in graph[name]:
                visit(other, [*way, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    return found


def outer_imports(tree: ast.Module) -> Iterator[str]:
    """Top-level packages that are imported as soon as the module is: outside functions."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)


def config_fields(sources: Sources) -> dict[str, list[str]]:
    """`module.Class` -> its own fields, for every class that is a Config, directly or through another."""
    classes = {}
    for module, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                bases = {
                    b.id if isinstance(b, ast.Name) else b.attr for b in node.bases if isinstance(b, ast.Name | ast.Attribute)
                }
                fields = [s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]
                classes[f"{module}.{node.name}"] = (node.name, bases, [f for f in fields if f != "model_config"])
    configs = {"Config"}
    while more := {name for name, bases, _ in classes.values() if bases & configs} - configs:
        configs |= more
    return {path: fields for path, (name, _, fields) in classes.items() if name in configs and fields}


def reads(sources: Sources) -> set[str]:
    """Names read as attributes, `x.name`. What only `problems()` reads is checked but has no effect, so it does not count.

    pydantic itself reads what `discriminator=` and `include=` name.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef) and node.name == "problems":
            return
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        if isinstance(node, ast.keyword) and node.arg == "discriminator" and isinstance(node.value, ast.Constant):
            found.add(node.value.value)
        if isinstance(node, ast.keyword) and node.arg == "include" and isinstance(node.value, ast.Set):
            found.update(e.value for e in node.value.elts if isinstance(e, ast.Constant))
        for child in ast.iter_child_nodes(node):
            visit(child)

    for text in sources.values():
        visit(ast.parse(text))
    return found


def unread(sources: Sources) -> list[str]:
    used = reads(sources)
    return [f"{path}.{field}" for path, fields in config_fields(sources).items() for field in fields if field not in used]


@pytest.fixture(scope="module")
def sources() -> Sources:
    found = read_sources()
    assert {"distill.config", "distill.rows", "export.artifact", "recipes.run"} <= found.keys()
    return found


def test_imports_point_one_way(sources: Sources):
    assert wrong_directions(sources) == []


def test_a_planted_import_upwards_is_found(sources: Sources):
    planted = sources | {"distill.bad": "def f():\n    from recipes import run\n", "export.bad": "import recipes.cli"}
    assert wrong_directions(planted) == ["distill.bad imports recipes.run", "export.bad imports recipes.cli"]


def test_no_cycles_between_files(sources: Sources):
    assert cycles(sources) == []


def test_a_planted_cycle_is_found():
    found = cycles(
        {
            "distill": "",
            "distill.a": "from distill import b",
            "distill.b": "import distill.c",
            "distill.c": "from distill.a import x",
        }
    )
    assert found == [["distill.a", "distill.b", "distill.c", "distill.a"]]


def test_optional_packages_are_imported_inside_functions(sources: Sources):
    found = {name: OPTIONAL & set(outer_imports(ast.parse(text))) for name, text in sources.items()}
    assert {name: packages for name, packages in found.items() if packages} == {}
    assert set(outer_imports(ast.parse("try:\n    import openvino\nexcept ImportError: pass"))) == {"openvino"}


def test_no_file_is_named_like_a_package(sources: Sources):
    """`onnx.py` inside a package is imported in place of onnx when that folder is on the path, as it is for a script in it."""
    taken = set(packages_distributions()) - set(FLOORS) | set(sys.stdlib_module_names)
    files = {name for name in sources if name not in FLOORS}
    assert {name for name in files if name.split(".")[-1] in taken} == set()


def test_every_setting_is_read(sources: Sources):
    fields = config_fields(sources)
    assert "dim" in fields["distill.models.backbone.BackboneConfig"]
    assert unread(sources) == []


def test_a_planted_setting_that_nothing_reads_is_found(sources: Sources):
    planted = '''
class PlantedConfig(TrainConfig):
    """A setting like others, and one that only its check looks at."""
    planted_unread: int = 3
    planted_checked: float = 0.5
    planted_read: bool = False

    def problems(self):
        return ["too large"] if self.planted_checked > 1 else []

def use(config):
    config.planted_unread = 4  # written, not read
    return config.planted_read
'''
    assert [u for u in unread(sources | {"distill.planted": planted}) if u.startswith("distill.planted")] == [
        "distill.planted.PlantedConfig.planted_unread",
        "distill.planted.PlantedConfig.planted_checked",
    ]


def test_names_of_test_files_differ():
    """pytest imports them by their bare names: two of one name, and no test runs at all."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
