"""The base of schemas that read hostile files: no unknown keys, no conversions, no NaN, the first wrong element ends it."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field

T = TypeVar("T")
Several = Annotated[list[T], FailFast()]  # a million wrong elements are one error, not a million
Size = Annotated[int, Field(ge=1, le=1 << 31)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
