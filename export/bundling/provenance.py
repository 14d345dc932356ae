"""What a bundle was made from, as SLSA provenance v1 (slsa.dev/provenance/v1): the predicate of the statement that is signed.

Everything in it follows from `manifest.json` and `lineage.json`, so `decant sign` makes the same statement as the run that built
the bundle. There is no time in it: the same run gives the same bytes.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

BUILDER = "pkg:pypi/decant-vision"
BUILD_TYPE = f"{BUILDER}#decant-bundle-1"
DATA_DIGEST = "decant-data"  # a fingerprint of distill/data/sources.py, which is no hash of one file

Json = dict[str, Any]


def provenance(manifest: Mapping[str, Any], lineage: Mapping[str, Any]) -> Json:
    """The predicate.

    Args:
        manifest, lineage: the values of manifest.json and lineage.json.
    """
    made_from = _mapping(lineage.get("lineage"))
    recipe = made_from.get("recipe")
    parameters: Json = {"student": manifest["student"], "layout": manifest["layout"], "run": lineage.get("run")}
    if isinstance(recipe, str):
        parameters["recipe"] = {"digest": {"sha256": hashlib.sha256(recipe.encode()).hexdigest()}}
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": parameters,
            "resolvedDependencies": dependencies(_mapping(lineage.get("model")), made_from),
        },
        "runDetails": {
            "builder": {
                "id": f"{BUILDER}@{manifest['decant']}",
                "version": {**manifest["built_with"], "decant-vision": manifest["decant"]},
            },
        },
    }


def dependencies(model: Mapping[str, Any], made_from: Mapping[str, Any]) -> list[Json]:
    """ResourceDescriptors of the weights, the teacher, the training data and the code; what is not known is left out."""
    found: list[Json] = []
    for name, value in (("student weights", model.get("weights_sha256")), ("teacher weights", made_from.get("teacher_sha256"))):
        if isinstance(value, str):
            found.append({"name": name, "digest": {"sha256": value}})
    train = _mapping(made_from.get("train"))
    if isinstance(fingerprint := train.get("fingerprint"), str):
        found.append({"name": f"training data: {train.get('name')}", "digest": {DATA_DIGEST: fingerprint}})
    if commit := re.fullmatch(r"([0-9a-f]{40,64})(-modified)?", str(made_from.get("commit"))):
        found.append(
            {
                "name": "decant's code",
                "digest": {"gitCommit": commit[1]},
                "annotations": {"modified": commit[2] is not None},
            }
        )
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    """lineage.json of a bundle that is signed may be anyone's; what is no object there says nothing."""
    return value if isinstance(value, dict) else {}
