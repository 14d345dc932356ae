"""A folder of derived data remembers the settings it was made with, and says which ones differ."""

from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.files import read_json, write_json

FORMAT = "decant-targets-1"


def same_settings(folder: Path, settings: dict[str, Any], writes: bool) -> None:
    """Compare with the folder's meta.json; a new folder gets one (if this process `writes`).

    Raises:
        UserError: they differ (the sentence names up to six, with both values), or the folder holds something else.
    """
    path = folder / "meta.json"
    if not path.exists():
        if folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise UserError(f"{folder} holds files but no cache of targets (no meta.json). Name a new folder for the cache.")
        if writes:
            write_json(path, {"format": FORMAT, "settings": settings})
        return
    try:
        meta = read_json(path)
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']!r}, not {FORMAT!r}")
        before = _flat(meta["settings"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path} does not describe a cache of targets ({' '.join(str(e).split())[:200]}). Delete {folder}."
        ) from e
    now = _flat(settings)
    different = [k for k in sorted(before | now) if before.get(k, "absent") != now.get(k, "absent")]
    if different:
        shown = ", ".join(
            f"{k} ({_brief(before.get(k, 'absent'))} there, {_brief(now.get(k, 'absent'))} here)" for k in different[:6]
        )
        more = f" and {len(different) - 6} more" if len(different) > 6 else ""
        raise UserError(
            f"The targets in {folder} were made with other settings: {shown}{more}. Delete the folder, or leave the cache out."
        )


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """{"crops": {"size": 48}} -> {"crops.size": 48}."""
    if not isinstance(settings, dict) or not settings:
        return {prefix: settings}
    return {k: v for name, value in settings.items() for k, v in _flat(value, f"{prefix}.{name}" if prefix else name).items()}


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
