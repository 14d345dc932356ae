"""The work of `decant convert`: a model folder becomes a file or folder that another library loads."""

from pathlib import Path

from distill.errors import UserError
from distill.models.exchange import export_weights


def convert(folder: Path, to: str, out: Path, heads: bool) -> list[str]:
    """Write the model and return the lines to print: files, how to load them, what differs.

    Args:
        folder: a model folder, or a run folder with one student.

    Raises:
        UserError: no model there, several, or one that the format cannot hold.
    """
    written = export_weights(model_folder(folder), to, out, heads)
    lines = [f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB)" for path in written.files]
    return [*lines, f"Load:  {written.load}", *(f"Note:  {note}" for note in written.notes)]


def model_folder(folder: Path) -> Path:
    """The model that is meant: the folder itself, or the only student of a run."""
    if (folder / "model.json").exists():
        return folder
    models = sorted(p.parent for p in folder.glob("students/*/model.json"))
    if len(models) > 1:
        raise UserError(f"{folder} is a run with several students; name one: {', '.join(str(m) for m in models)}.")
    return models[0] if models else folder
