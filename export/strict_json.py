"""JSON of hostile files: what two readers could understand in two ways is refused."""

import json
from typing import Any

from export.archive import Refused, shown


def parse_json(text: bytes, name: str) -> dict[str, Any]:
    """A JSON object without duplicate keys and without NaN.

    Args:
        text: short, as it is held in memory. name: of the file, for the sentence.
    Raises:
        Refused: it is not such an object.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(result := dict(items)) < len(items):
            raise ValueError("a key appears twice")
        return result

    def constant(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as e:
        raise Refused(f"its {name} is not proper JSON ({shown(str(e))})") from e
    if not isinstance(value, dict):
        raise Refused(f"its {name} is not a JSON object")
    return value
