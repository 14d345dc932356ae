"""What an evaluation of one subject gave, kept until the whole evaluation is done: a killed one trains no head twice."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from distill.evaluate.reader import Subject
from distill.files import replacing, sha256_json

FORMAT = 1  # raise it when the same settings come to give other results


@dataclass(frozen=True)
class Outcome:
    """Records of one subject and evaluation: what is said in JSON, and an array or nothing; and the encoder's conditions."""

    conditions: dict[str, Any]
    records: Sequence[tuple[dict[str, Any], np.ndarray | None]]


class Judged:
    """Outcomes in a folder, one file each, named by the hash of all that they depend on."""

    def __init__(self, folder: Path):
        self.folder = folder

    @staticmethod
    def key(subject: Subject, data: dict[str, str], settings: dict[str, Any]) -> dict[str, Any] | None:
        """None for a subject without weights: what it is nobody knows. `data`: role -> fingerprint."""
        if subject.weights is None:
            return None
        seen = {"preprocess": subject.preprocess.to_json(), "weights": subject.weights, "target": subject.target}
        return {"format": FORMAT, "data": data, "settings": settings, **seen}

    def get(self, key: dict[str, Any] | None) -> Outcome | None:
        """None where there is none, or a file that is damaged or of something else."""
        if key is None:
            return None
        try:
            with safe_open(self._path(key), "np") as f:
                about = json.loads((f.metadata() or {})["about"])
                if about["key"] != json.loads(json.dumps(key)):
                    return None
                arrays = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
            return Outcome(about["conditions"], [(said, arrays.get(str(i))) for i, said in enumerate(about["records"])])
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError):
            return None

    def put(self, key: dict[str, Any] | None, outcome: Outcome) -> None:
        if key is None:
            return
        arrays = {str(i): np.ascontiguousarray(a) for i, (_, a) in enumerate(outcome.records) if a is not None}
        about = {"key": key, "conditions": outcome.conditions, "records": [said for said, _ in outcome.records]}
        with replacing(self._path(key)) as part:
            save_file(arrays, part, metadata={"about": json.dumps(about, sort_keys=True)})

    def head(self, key: dict[str, Any]) -> Path:
        """Where the head that was trained for an outcome is kept."""
        return self._path(key).with_suffix(".head.safetensors")

    def _path(self, key: dict[str, Any]) -> Path:
        return self.folder / f"{sha256_json(key)[:24]}.safetensors"
