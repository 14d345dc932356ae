"""What a lint rule is, and the list of them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from export.artifact import Precision
from export.graphs.anatomy import Anatomy
from export.graphs.attention_blocks import AttentionBlock, attention_blocks
from export.proof import Proof, prove

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Hit:
    """A place where a rule does not hold.

    Attributes:
        place: node or tensor. detail: what is found there, the beginning of a sentence.
        kind: hits of a kind are one finding. severity: when it is not the rule's own.
    """

    place: str
    detail: str
    kind: str = ""
    severity: Severity | None = None


class Case:
    """What a rule judges: a graph, the precision that its name claims, the file's name."""

    def __init__(self, anatomy: Anatomy, precision: Precision | None, name: str):
        self.anatomy, self.precision, self.name = anatomy, precision, name

    @cached_property
    def proof(self) -> Proof:
        return prove(self.anatomy, self.precision)

    @cached_property
    def attention(self) -> list[AttentionBlock]:
        return attention_blocks(self.anatomy)

    @property
    def half(self) -> bool:
        """Whether anything is computed in FLOAT16."""
        return any(t == "FLOAT16" for n, t in self.anatomy.types.items() if n in self.anatomy.made)


@dataclass(frozen=True)
class Rule:
    """A rule: `reason` ends the message of a finding, `cure` says what to do. `tensorrt_only`: nobody else minds."""

    id: str
    severity: Severity
    reason: str
    cure: str
    tensorrt_only: bool
    check: Callable[[Case], Iterator[Hit]]

    @property
    def title(self) -> str:
        """The first sentence of the function's docstring."""
        return (self.check.__doc__ or self.id).strip().split(".")[0]


def rule(
    id: str, severity: Severity, reason: str, cure: str, tensorrt_only: bool = False
) -> Callable[[Callable[[Case], Iterator[Hit]]], Rule]:
    """Make a rule of a function that yields the places where it does not hold."""
    return lambda check: Rule(id, severity, reason, cure, tensorrt_only, check)


def rules_of(names: Mapping[str, object]) -> list[Rule]:
    """The rules among a module's names, in the order of their definition."""
    return [value for value in names.values() if isinstance(value, Rule)]
