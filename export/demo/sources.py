"""What the command was given becomes a list of models: a run, a bundle (unpacked already), artifact folders. Nothing is opened yet."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from distill.errors import EnvironmentFailed, UserError
from export.artifact import NAME, Artifact, ArtifactFile, Unrunnable, read_artifact
from export.demo.heads import kind_of
from export.demo.models import Model, first_line, open_model, open_teacher

TEACHER = "teacher (torch)"


@dataclass
class Choice:
    """A model that may be chosen: `open` loads it, or raises Unrunnable with the reason."""

    name: str
    open: Callable[[str], Model]


@dataclass
class Found:
    """What lies where the command was pointed.

    Attributes:
        choices: models, students before the teacher. heads: files of trained heads. examples: pictures that came along.
        index: where an index of images is kept unless told otherwise.
    """

    choices: list[Choice] = field(default_factory=list)
    heads: list[Path] = field(default_factory=list)
    examples: list[Path] = field(default_factory=list)
    index: Path | None = None


def artifact_choices(folder: Path, torch_allowed: bool) -> list[Choice]:
    """One model a file of an artifact's folder."""
    artifact = read_artifact(folder)

    def opener(entry: ArtifactFile, artifact: Artifact = artifact) -> Callable[[str], Model]:
        return lambda name: open_model(artifact, entry, name, torch_allowed)

    return [Choice(f"{artifact.student} {artifact.target} {e.resolution} px", opener(e)) for e in artifact.files]


def find(path: Path, unpacked: Path | None = None) -> Found:
    """A run's folder, an artifact's folder, or a bundle (`unpacked` is where its files lie).

    Raises:
        UserError: it is nothing of these, or holds no artifact.
    """
    if unpacked is not None:
        found = Found(index=path.with_name(path.name.removesuffix(".gz").removesuffix(".tar") + ".index"))
        folders = sorted((p.parent for p in (unpacked / "artifacts").glob(f"*/{NAME}")), key=order)
        found.choices = [c for folder in folders for c in artifact_choices(folder, torch_allowed=False)]
        found.heads = head_files(unpacked)
        found.examples = sorted((unpacked / "golden").glob("*.png"))
    elif (path / NAME).is_file():
        found = Found(artifact_choices(path, torch_allowed=True), head_files(path), index=path.with_name(path.name + ".index"))
    elif (path / "run.json").is_file() or (path / "export").is_dir():
        found = Found(index=path / "demo-index", heads=head_files(path))
        folders = sorted((p.parent for p in (path / "export").glob(f"*/*/{NAME}")), key=order)
        found.choices = [c for folder in folders for c in artifact_choices(folder, torch_allowed=True)]
        if (path / "teacher" / "model.json").is_file():
            found.choices.append(Choice(TEACHER, lambda name: open_teacher(path / "teacher", name)))
    elif path.exists():
        raise UserError(
            f"{path} is no run's folder, no bundle and no artifact's folder; name e.g. runs/quickstart or its bundle."
        )
    else:
        raise UserError(
            f"There is no {path}; name a run's folder, a bundle such as RUN/bundles/small.tar.gz, or an artifact's folder."
        )
    if not found.choices:
        raise UserError(f"{path} holds no exported artifact; `decant export {path}` makes them.")
    return found


def order(folder: Path) -> tuple[str, bool, str]:
    """EXPORT/STUDENT/TARGET by student, FP32 first: what the others are compared with."""
    return folder.parent.name, not folder.name.endswith("-fp32"), folder.name


def head_files(folder: Path) -> list[Path]:
    """Files of trained heads for maps in a run, a bundle or an artifact's folder: the page has no use for classifiers."""
    patterns = ("heads/*.safetensors", "heads/*.onnx", "evaluate/tasks/*/head-*.safetensors")
    return [p for pattern in patterns for p in sorted(folder.glob(pattern)) if kind_of(p) != "classification"]


def joined(paths: list[Path], found: list[Found]) -> Found:
    """All that was found, under names that differ; the index lies where the first one's does."""
    choices: list[Choice] = []
    for path, one in zip(paths, found, strict=True):
        taken = {c.name for c in choices}
        choices += [Choice(f"{c.name} ({path.name})" if c.name in taken else c.name, c.open) for c in one.choices]
    names = [c.name for c in choices]
    if twice := {n for n in names if names.count(n) > 1}:
        raise UserError(f"{', '.join(sorted(twice))} would appear twice; name each run, bundle or artifact once.")
    heads = list(dict.fromkeys(h for one in found for h in one.heads))
    return Found(choices, heads, [e for one in found for e in one.examples], found[0].index)


class Models:
    """The choices by name, opened when they are first asked for."""

    def __init__(self, choices: list[Choice]):
        self.choices = {c.name: c for c in choices}
        self.opened: dict[str, Model] = {}
        self.reasons: dict[str, str] = {}

    def __getitem__(self, name: str) -> Model:
        """Raises: UserError: this machine cannot run it; the sentence says why."""
        if name in self.reasons:
            raise UserError(f"{name} cannot run here: {self.reasons[name]}.")
        if name not in self.opened:
            try:
                self.opened[name] = self.choices[name].open(name)
            except Unrunnable as e:
                self.reasons[name] = first_line(e).rstrip(".")
                raise UserError(f"{name} cannot run here: {self.reasons[name]}.") from e
        return self.opened[name]

    def try_all(self) -> None:
        """Open everything; what cannot run here leaves `names` and has its reason.

        Raises:
            EnvironmentFailed: nothing can run here.
        """
        for name in self.choices:
            try:
                self[name]
            except UserError:
                if name not in self.reasons:  # a file that was changed is no matter of this machine
                    raise
        if not self.opened:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items())
            raise EnvironmentFailed(f"Nothing can run on this machine ({reasons}).")

    def names(self) -> list[str]:
        """What can run here, as far as it was tried."""
        return [name for name in self.choices if name not in self.reasons]
