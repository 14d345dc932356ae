"""Where a run's teacher came from and under which licence, as far as anybody said so: for the model card and the bill of materials."""

from pathlib import PurePath
from typing import Any

Json = dict[str, Any]
NOT_STATED = "not stated"


def teacher_origin(lineage: Json, stated: str | None = None) -> Json:
    """What lineage.json says of a teacher.

    Args:
        lineage: of the teacher's model.json. stated: the licence that the recipe names.

    Returns:
        `kind` (`loaded` or `trained`), and of a loaded one `name`, `licence` (None: not stated) and `licence_from`.
    """
    inner = lineage.get("of")
    if lineage.get("kind") != "loaded":
        return {"kind": "trained"}
    own = {"licence": lineage.get("licence"), "licence_from": "timm" if lineage.get("licence") else None}
    if isinstance(inner, dict) and inner.get("kind") == "loaded":  # a run of ours that loaded it in its turn
        found = teacher_origin(inner)
    else:
        found = {"kind": "loaded", "name": lineage.get("model") or PurePath(str(lineage.get("source"))).name, **own}
    return found if stated is None else found | {"licence": stated, "licence_from": "the recipe"}


def said(origin: Json | None) -> str:
    """A sentence on the teacher's licence; of a teacher that was trained in the run, on the data's."""
    if origin is None:
        return "The licence of the teacher is not stated."
    if origin["kind"] == "trained":
        return "The teacher was trained in the run itself; the licence of the training data is not stated."
    if origin["licence"] is None:
        return f"The teacher is {origin['name']}, whose licence is not stated: find it out before you use or pass on these weights."
    return (
        f"The teacher is {origin['name']}, whose licence is {origin['licence']} according to {origin['licence_from']}; "
        "that of the training data is not stated."
    )
