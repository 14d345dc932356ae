"""A recipe file and `--set` overrides -> a validated Recipe. Every problem is reported at once, with its line."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from distill.errors import UserError
from recipes.explain import at, dotted, explain, shorten, stand_in
from recipes.yaml_lines import Lines, Path, dump

M = TypeVar("M", bound=BaseModel)
SHIPPED = File(__file__).parent


def shipped_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(p.stem for p in SHIPPED.glob("*.yaml"))


def find_recipe(path_or_name: str) -> File:
    """A recipe file, or the shipped recipe of that name.

    Raises:
        UserError: there is neither.
    """
    path = File(path_or_name)
    try:
        found = path.is_file()
    except OSError as e:  # a name that no file can have
        raise UserError(f"There is no recipe {path_or_name[:60]!r}... ({e.strerror}).") from e
    if found:
        return path
    if path_or_name in shipped_names():
        return SHIPPED / f"{path_or_name}.yaml"
    if path_or_name and path.is_dir():
        raise UserError(f"{path_or_name} is a folder. Name a recipe file, or a shipped recipe: {', '.join(shipped_names())}.")
    near = difflib.get_close_matches(path_or_name.removesuffix(".yaml"), shipped_names(), 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"There is no recipe {path_or_name!r}, neither as a file nor among the shipped ones. {hint.capitalize()}"
        f"Shipped are {', '.join(shipped_names()) or 'none'}."
    )


def load_recipe(path_or_name: str, overrides: Sequence[str], model: type[M]) -> tuple[M, str]:
    """Read, override, validate.

    Args:
        path_or_name: a file, or the name of a shipped recipe.
        overrides: texts `a.b=v`, v in YAML; later ones win.
        model: what the recipe must be. If it has a method `problems() -> [(dotted path, sentence)]`, it is asked too.

    Returns:
        The recipe and its YAML text with every setting, defaults included.

    Raises:
        UserError: one line per problem, such as `my.yaml:12: teacher.backbone.hedas: unknown key; did you mean heads?`
    """
    file = find_recipe(path_or_name)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"The recipe {file} cannot be read: {e}.") from e
    shown = path_or_name if File(path_or_name).is_file() else file.name
    draft = Draft(shown, text)
    for override in overrides:
        draft.set(override)
    recipe = None if draft.unreadable else draft.validated(model)
    if draft.problems:
        raise UserError("\n".join(draft.sentences()))
    assert recipe is not None
    return recipe, dump(recipe.model_dump(mode="json"))


@dataclass
class Problem:
    """One problem; `rank` orders them: by line, those of the command line last."""

    rank: int
    where: str
    path: Path
    sentence: str


@dataclass
class Origin:
    """Where a value was written."""

    rank: int
    where: str


@dataclass
class Draft:
    """A recipe on its way to validity: plain values, where each was written, and what is wrong with them."""

    shown: str
    text: str
    value: dict[str, Any] = field(default_factory=dict)
    origins: dict[Path, Origin] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unreadable: bool = False
    sets: int = 0

    def __post_init__(self) -> None:
        read = Lines(self.text)
        self.origins = {path: Origin(line, f"{self.shown}:{line}") for path, line in read.lines.items()}
        self.origins[()] = Origin(1, f"{self.shown}:1")
        self.problems = [Problem(line, f"{self.shown}:{line}", path, sentence) for line, path, sentence in read.problems]
        if isinstance(read.value, dict):
            self.value = read.value
        elif read.value is not None:
            self.problems.append(Problem(1, f"{self.shown}:1", (), "a recipe must be sections of `name: value` lines"))
        self.unreadable = not isinstance(read.value, dict) and bool(self.problems)

    def set(self, override: str) -> None:
        """Apply `a.b=v`; sections on the way are made, lists are entered by number."""
        name, equals, text = override.partition("=")
        self.sets += 1
        origin = Origin(10**9 + self.sets, f"--set {name}")
        path = tuple(name.strip().split("."))
        if not equals or not all(path):
            self._note(
                origin, (), f"{override!r} must look like section.key=value" if not equals else "a part of the name is empty"
            )
            return
        read = Lines(text)
        for _, _, sentence in read.problems:
            self._note(origin, (), sentence)
        if read.problems:
            return
        here: Any = self.value
        real: Path = ()
        for i, part in enumerate(path):
            step: str | int = part
            if isinstance(here, list):
                if not part.isdigit() or int(part) >= len(here):
                    self._note(
                        origin, (), f"{dotted(real)} is a list of {len(here)}: {part!r} is not one of its numbers, from 0"
                    )
                    return
                step = int(part)
            elif not isinstance(here, dict):
                self._note(origin, (), f"{dotted(real)} is {shorten(here)}, not a section")
                return
            real = (*real, step)
            if i == len(path) - 1:
                here[step] = read.value
                break
            if isinstance(here, dict) and here.get(part) is None:
                here[part] = {}
                self.origins[real] = origin
            here = here[step]
        self.origins = {p: o for p, o in self.origins.items() if p[: len(real)] != real} | {real: origin}

    def origin(self, path: Path) -> Origin:
        """Where `path` was written, or the innermost section around it that was."""
        while path not in self.origins:
            path = path[:-1]
        return self.origins[path]

    def _note(self, origin: Origin, path: Path, sentence: str) -> None:
        self.problems.append(Problem(origin.rank, origin.where, path, sentence))

    def sentences(self) -> list[str]:
        """`where: path: sentence`, sorted by line; the path is left out where `--set path` says it."""
        lines = []
        for p in sorted(self.problems, key=lambda p: p.rank):
            said = p.where.removeprefix("--set ") if p.where.startswith("--set ") else None
            path = "" if not p.path or dotted(p.path) == said else f"{dotted(p.path)}: "
            lines.append(f"{p.where}: {path}{p.sentence}")
        return list(dict.fromkeys(lines))

    def validated(self, model: type[M]) -> M | None:
        """The recipe, or None; what is wrong is added to `problems`."""
        try:
            recipe = model.model_validate_json(json.dumps(self.value))
        except ValidationError as e:
            wrong = explain(model, self.value, e)
            # The rest is asked for contradictions too. They count if they hold whatever the wrong values should have been.
            contradictions = set.intersection(
                *(_contradictions(model, self.value, [p for p, _ in wrong], n) for n in (1, 10**6))
            )
            self._note_all([*wrong, *contradictions])
            return None
        asked = recipe.problems() if hasattr(recipe, "problems") else []
        self._note_all([(as_path(name, self.value), sentence) for name, sentence in asked])
        return recipe

    def _note_all(self, found: list[tuple[Path, str]]) -> None:
        for path, sentence in found:
            self._note(self.origin(path), path, sentence)


def _contradictions(model: type[BaseModel], value: Any, wrong: list[Path], size: int) -> set[tuple[Path, str]]:
    """What contradicts itself in a recipe when what is wrong in it is replaced by stand-ins, outside their sections."""
    touched: list[Path] = []
    recipe: Any = None
    for _ in range(10):  # what is replaced can uncover more, but only so much
        touched += wrong
        value = without(value, wrong)
        for path in wrong:
            put(value, path, stand_in(model, path, value, size))
        try:
            recipe = model.model_validate_json(json.dumps(value))
            break
        except ValidationError as e:
            wrong = [path for path, _ in explain(model, value, e)]
    try:
        asked = recipe.problems() if hasattr(recipe, "problems") else []
    except Exception:  # stand-ins may be beyond anything that a check was written for
        return set()
    found = {(as_path(name, value), sentence) for name, sentence in asked}
    return {(path, sentence) for path, sentence in found if not any(related(path, other) for other in touched)}


def as_path(name: str, value: Any) -> Path:
    """`students.0.dim` -> path; numbers become indices where there is a list."""
    path: Path = ()
    for part in name.split(".") if name else []:
        step: str | int = int(part) if isinstance(value, list) and part.isdigit() else part
        path = (*path, step)
        value = at(value, (step,))
    return path


def without(value: Any, paths: list[Path], here: Path = ()) -> Any:
    """A copy without what stands at `paths`."""
    if isinstance(value, dict):
        return {k: without(v, paths, (*here, k)) for k, v in value.items() if (*here, k) not in paths}
    if isinstance(value, list):
        return [without(v, paths, (*here, i)) for i, v in enumerate(value) if (*here, i) not in paths]
    return value


def put(value: Any, path: Path, new: Any) -> None:
    """Set a setting, if there is something to set and its section exists."""
    section = at(value, path[:-1])
    if new is not None and path and isinstance(section, dict):
        section[path[-1]] = new


def related(path: Path, lost: Path) -> bool:
    """Whether a contradiction at `path` may come from `lost` having been taken out: one is around or beside the other."""
    section = lost[:-1] if len(lost) > 1 else lost
    return path[: len(section)] == section or lost[: len(path)] == path
