"""The base of every settings class. A stage's class lives beside the code that reads it; `recipes/schema.py` composes them."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Strict and immutable: unknown keys and wrong types are errors, never guesses ("3" is not 3)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
