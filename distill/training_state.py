"""Checkpoints of a training in progress: one safetensors file, replaced whole."""

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from distill.errors import UserError
from distill.files import replacing


def save_state(path: Path, step: int, students: dict[str, dict[str, Tensor]], centrings: dict[str, Tensor]) -> None:
    """Write every tensor under `student/<name>/...` and `centring/...`, with the step in the metadata."""
    from safetensors.torch import save_file

    tensors = {f"student/{n}/{k}": v for n, state in students.items() for k, v in state.items()}
    tensors |= {f"centring/{k}": v for k, v in centrings.items()}
    with replacing(path) as part:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part, metadata={"step": str(step)})


def load_state(path: Path) -> tuple[int, dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(steps done, state by student, state of the centrings)."""
    students: dict[str, dict[str, Tensor]] = {}
    centrings: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as f:
            step = int(f.metadata()["step"])
            for key in f.keys():  # noqa: SIM118 (safe_open is no mapping)
                kind, _, rest = key.partition("/")
                if kind == "centring":
                    centrings[rest] = f.get_tensor(key)
                else:
                    name, _, tensor = rest.partition("/")
                    students.setdefault(name, {})[tensor] = f.get_tensor(key)
    except Exception as e:
        raise UserError(
            f"{path} is not a readable checkpoint ({e}). Delete it to start this stage again from its beginning."
        ) from e
    return step, students, centrings
