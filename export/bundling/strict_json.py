"""JSON of hostile files: what two readers could understand in two ways is refused."""

import json
from typing import Any

from export.bundling.archive import Refused, shown

MAX_KEYS = 1_000  # of one object: each unknown one is an error of its own to the schema, which costs a hundred times its bytes


def parse_json(text: bytes, name: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, objects of very many keys, and NaN.

    Args:
        text: short, as it is held in memory. name: of the file, for the sentence.
    Raises:
        Refused: it is not such an object.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(result := dict(items)) < len(items):
            raise ValueError("a key appears twice")
        if len(items) > MAX_KEYS:
            raise ValueError(f"an object has more than {MAX_KEYS} keys")
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
