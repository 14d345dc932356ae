"""YAML -> plain values and the line that each came from.

Scalars follow YAML 1.2's core schema where 1.1 (PyYAML's) holds traps: `1e-3` is a number; `on`, `off`, `yes`, `no` and `1:30`
are text; `010` is ten. Quoted scalars are always text.
"""

import math
import re
from typing import Any

import yaml

Path = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_HALVES = re.compile(r"[\ud800-\udfff]")  # which no file can hold, and escapes make
HALF = "an escape that is no character of Unicode; write the character itself"
_WORDS = {"": None, "~": None} | {
    form: meaning
    for word, meaning in (("null", None), ("true", True), ("false", False))
    for form in (word, word.title(), word.upper())
}
_STANDARD = "tag:yaml.org,2002:"


class Lines:
    """A YAML text, read.

    Attributes:
        value: what it says; an empty text is None.
        lines: path -> line (from 1) of its key, or of the item itself in a list.
        problems: (line, path, sentence) for what YAML lets pass or cannot read.
    """

    def __init__(self, text: str):
        self.lines: dict[Path, int] = {}
        self.problems: list[tuple[int, Path, str]] = []
        self.value: Any = None
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as e:
            where = e.problem_mark or e.context_mark
            what = (e.problem or "not YAML").removeprefix("found ").replace("'", "`")
            self.problems.append((where.line + 1 if where else 1, (), f"not valid YAML: {what}"))
        except yaml.YAMLError as e:  # characters that YAML does not allow
            self.problems.append((1, (), f"not valid YAML: {str(e).splitlines()[0]}"))
        else:
            self.value = None if node is None else self._read(node, (), ())

    def _read(self, node: yaml.Node, path: Path, above: tuple[yaml.Node, ...]) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if node in above:
            self._problem(node, path, "an alias (*) inside what it stands for")
            return None
        if not node.tag.startswith(_STANDARD):
            self._problem(node, path, f"the tag {node.tag} means nothing here")
        if isinstance(node, yaml.SequenceNode):
            return [self._read(item, (*path, i), (*above, node)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, above)
        assert isinstance(node, yaml.ScalarNode)
        if _HALVES.search(node.value):
            self._problem(node, path, HALF)
            return _HALVES.sub("?", node.value)
        return scalar(node.value) if node.style is None else node.value

    def _mapping(self, node: yaml.MappingNode, path: Path, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                self._problem(key, path, "a key must be one plain word; lists, sections and `<<` cannot be keys here")
                continue
            if _HALVES.search(key.value):
                self._problem(key, path, HALF)
                continue
            name, line = key.value, key.start_mark.line + 1
            if name in found:
                self.problems.append((line, (*path, name), f"stands twice, first on line {self.lines[(*path, name)]}"))
                continue
            self.lines[(*path, name)] = line
            found[name] = self._read(value, (*path, name), (*above, node))
        return found

    def _problem(self, node: yaml.Node, path: Path, sentence: str) -> None:
        self.problems.append((node.start_mark.line + 1, path, sentence))


def scalar(text: str) -> str | int | float | bool | None:
    """What an unquoted scalar means."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(number := float(text)):
        return number
    return text


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    """Quote what would be read back as something else than text."""
    quoted = "'" if not isinstance(scalar(value), str) else None
    return dumper.represent_scalar(f"{_STANDARD}str", value, style=quoted)


def _sequence(dumper: _Dumper, value: list) -> yaml.SequenceNode:
    """Lists of plain values on one line, others one item a line."""
    flat = not any(isinstance(item, dict | list) for item in value)
    return dumper.represent_sequence(f"{_STANDARD}seq", value, flow_style=flat)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _sequence)


def dump(value: Any) -> str:
    """Plain values -> YAML that `Lines` reads back as the same values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
