"""pydantic's validation errors in a recipe's terms: what was written, what is expected there, what was probably meant."""

import difflib
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path as File
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from recipes.yaml_lines import Path

# pydantic's error types that say what was expected, in a user's words.
EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "none_required": "null",
    "list_type": "a list, as in [1, 2]",
    "tuple_type": "a list, as in [1, 2]",
    "set_type": "a list, as in [1, 2]",
    "dict_type": "a section of its own settings",
    "model_type": "a section of its own settings",
    "model_attributes_type": "a section of its own settings",
    "dataclass_type": "a section of its own settings",
}


def explain(model: type[BaseModel], value: Any, error: ValidationError) -> list[tuple[Path, str]]:
    """pydantic's errors as (path, sentence); several members of a union that all refuse a value become one sentence."""
    expected: dict[Path, list[str]] = {}
    found: list[tuple[Path, str]] = []
    for e in error.errors(include_url=False):
        path = path_of(e["loc"], value, e["type"])
        if e["type"] in EXPECTED or e["type"] == "literal_error":
            wanted = EXPECTED.get(e["type"]) or e["ctx"]["expected"].replace(" or ", ", ")
            expected.setdefault(path, []).append(wanted)
        else:
            found.append((path, sentence_of(e, path, model, value)))
    inside = [path for path, _ in found]
    for path, wants in expected.items():
        if isinstance(at(value, path), dict | list) and any(
            other[: len(path)] == path for other in [*inside, *(expected.keys() - {path})]
        ):
            continue  # a union's member that takes no section: what is wrong inside the section says more
        found.append((path, _must_be(list(dict.fromkeys(wants)), at(value, path))))
    return found


def _must_be(wants: list[str], got: Any) -> str:
    choices = [c for w in wants for c in re.findall(r"'([^']*)'", w)]
    near = difflib.get_close_matches(got, choices, 1) if isinstance(got, str) else []
    hint = f"; did you mean {near[0]}?" if near else ""
    if isinstance(got, str) and got.lower() in ("yes", "no", "on", "off") and "true or false" in wants:
        hint = f"; write {'true' if got.lower() in ('yes', 'on') else 'false'}"
    several = "one of " if len(choices) > 1 and len(wants) == 1 else ""
    return f"must be {several}{' or '.join(wants)}, got {shorten(got)}{hint}"


def sentence_of(e: Any, path: Path, model: type[BaseModel], value: Any) -> str:
    """A sentence for one of pydantic's errors."""
    kind, ctx = e["type"], e.get("ctx", {})
    if kind == "missing":
        return "is missing; it has no default"
    if kind == "extra_forbidden":
        return unknown_key(model, path, value)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = ctx["discriminator"].strip("'")
        choices = re.findall(r"'([^']*)'", ctx.get("expected_tags", ""))
        choices = choices or sorted(c for m in models_at(model, path, value, kinds=False) for c in kinds_of(m, tag))
        if kind == "union_tag_not_found":
            got = at(value, path)
            if not isinstance(got, dict):
                return f"must be a section with a {tag} ({', '.join(choices)}), got {shorten(got)}"
            return f"its {tag} is missing; {tag} is one of {', '.join(choices)}"
        near = difflib.get_close_matches(str(ctx["tag"]), choices, 1)
        return f"{tag} must be one of {', '.join(choices)}, got {ctx['tag']!r}" + (f"; did you mean {near[0]}?" if near else "")
    message = e["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message.removeprefix("Input should be ")
    return f"must be {message}, got {shorten(e['input'])}" if message != e["msg"] and kind != "value_error" else message


def unknown_key(model: type[BaseModel], path: Path, value: Any) -> str:
    """Names what was probably meant: a near name in this section, the section that has this very key, or the section's keys."""
    *section, name = path
    fields = sorted({f for m in models_at(model, tuple(section), value) for f in m.model_fields})
    if near := difflib.get_close_matches(str(name), fields, 1):
        return f"unknown key; did you mean {near[0]}?"
    known = list(all_paths(model))
    elsewhere = [p for p in known if p.split(".")[-1] == name] if dotted(path) not in known else []  # or: of another kind here
    if elsewhere:
        return f"unknown key; did you mean {' or '.join(elsewhere[:3])}?"
    return f"unknown key; {dotted(tuple(section)) or 'a recipe'} has {', '.join(fields)}"


def all_paths(model: type[BaseModel], above: str = "", seen: tuple[type, ...] = ()) -> Iterator[str]:
    """Dotted paths of all settings; `<name>` stands for the free keys of a dict."""
    for name, info in model.model_fields.items():
        path = f"{above}{name}"
        yield path
        for below, free in classes_in(info.annotation):
            if below not in seen:
                yield from all_paths(below, f"{path}.{'<name>.' if free else ''}", (*seen, model))


def classes_in(annotation: Any, free: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    """The settings classes inside an annotation, and whether a dict or list stands between."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        if issubclass(annotation, BaseModel):
            yield annotation, free
        return
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from classes_in(args[0], free)
    elif origin is not Literal:
        for arg in args:
            yield from classes_in(arg, free or origin not in (Union, types.UnionType))


def models_at(model: type[BaseModel], path: Path, value: Any, kinds: bool = True) -> list[type[BaseModel]]:
    """The settings classes that the section at `path` may be; if `kinds`, only those of the kind that it names."""
    here: list[tuple[type[BaseModel], bool]] = [(model, False)]
    for i, step in enumerate(path):
        if all(free for _, free in here):  # this step is a free key or a number
            here = [(m, False) for m, _ in here]
            continue
        inside = [m.model_fields[step].annotation for m, free in here if not free and step in m.model_fields]
        here = [pair for annotation in inside for pair in classes_in(annotation)]
        if i < len(path) - 1 or kinds:
            here = [(m, f) for m, f in here if f or _fits(m, at(value, path[: i + 1]))]
    return [m for m, _ in here]


def _fits(model: type[BaseModel], section: Any) -> bool:
    if not isinstance(section, dict):
        return True
    return all(section.get(tag) in kinds for tag in ("kind", "type") if tag in section and (kinds := kinds_of(model, tag)))


def kinds_of(model: type[BaseModel], tag: str) -> tuple[str, ...]:
    info = model.model_fields.get(tag)
    return get_args(info.annotation) if info is not None and get_origin(info.annotation) is Literal else ()


def stand_in(model: type[BaseModel], path: Path, value: Any, size: int) -> Any:
    """Some value of the right type for a setting; numbers are `size`. None where the type tells too little."""
    *section, name = path
    for m in models_at(model, tuple(section), value):
        if name in m.model_fields:
            return _sample(m.model_fields[name].annotation, size)
    return None


def _sample(annotation: Any, size: int) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return args[0]
    if origin in (Union, types.UnionType, Annotated):
        return _sample(args[0], size)
    simple = {int: size, float: float(size), bool: False, str: "x", File: "x", list: [], tuple: [], dict: {}}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        tags = {tag: kinds_of(annotation, tag)[0] for tag in ("kind", "type") if kinds_of(annotation, tag)}
        return tags | {
            n: _sample(f.annotation, size) for n, f in annotation.model_fields.items() if f.is_required() and n not in tags
        }
    return simple.get(origin or annotation)


def path_of(loc: tuple[str | int, ...], value: Any, kind: str) -> Path:
    """pydantic's location without the names of union members that stand between."""
    path: Path = ()
    for i, step in enumerate(loc):
        inside = (
            step in value
            if isinstance(value, dict)
            else isinstance(value, list) and isinstance(step, int) and step < len(value)
        )
        if inside:
            path, value = (*path, step), value[step]  # type: ignore[index]
        elif i == len(loc) - 1 and kind in ("missing", "extra_forbidden"):
            path = (*path, step)
    return path


def at(value: Any, path: Path) -> Any:
    """The value there, or None."""
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def dotted(path: Path) -> str:
    return ".".join(str(p) for p in path)


def shorten(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 50 else text[:47] + "..."
