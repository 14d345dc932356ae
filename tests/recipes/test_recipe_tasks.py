"""A recipe's tasks: their data are part of the evaluate stage's key, and missing data are a sentence before anything is done."""

from pathlib import Path

import pytest
from test_schema import recipe

from distill.errors import UserError
from recipes.data import Data
from recipes.stages import plan

SCENES = {"kind": "scenes", "count": 40, "size": 48}
TASK = {"kind": "classification", "train": SCENES, "test": SCENES | {"split": "test"}}


def evaluate_stage(**task):
    return next(s for s in plan(recipe(evaluate={"tasks": {"fine": TASK | task}}), Path("no/such/run")) if s.name == "evaluate")


def test_data_and_settings_of_tasks_are_in_the_key():
    plain = next(s for s in plan(recipe(), Path("no/such/run")) if s.name == "evaluate")
    first, other = evaluate_stage(), evaluate_stage(test=SCENES | {"split": "test", "count": 41})
    assert first.data.keys() - plain.data.keys() == {"fine.train", "fine.test"}
    assert first.data["fine.train"] == other.data["fine.train"]
    assert first.data["fine.test"] != other.data["fine.test"]
    assert first.config != evaluate_stage(probe_steps=7).config
    r = recipe(evaluate={"tasks": {"fine": TASK}})
    assert len(Data(r.data, r.evaluate.tasks).tasks["fine"]["train"]) == 40


def test_missing_and_streaming_data_are_sentences_of_the_plan(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        evaluate_stage(test=str(tmp_path / "nowhere"))
    import datasets
    from PIL import Image

    table = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * 2}).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "a.parquet")
    streams = {"kind": "datasets", "name": "parquet", "data_files": str(tmp_path / "a.parquet"), "streaming": True}
    with pytest.raises(UserError, match=r"evaluate\.tasks\.fine\.train streams"):
        evaluate_stage(train=streams)
