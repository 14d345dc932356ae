"""What a graph of unknown origin is fed: its inputs' names, types and shapes, open dimensions resolved, and values to go with them.

Time hardly depends on values, but indices must lie inside tables and masks must let something pass: whole numbers are 0, masks 1.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto, helper

from distill.errors import UserError

SIDE = 224  # of pictures whose size is open and not asked for
CHANNELS = (1, 3, 4)
CHANNEL_NAME = re.compile(r"^(c|ch|channels?|num_channels|in_channels)$", re.IGNORECASE)
FEEDABLE = ("float16", "float32", "float64", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "bool")


@dataclass(frozen=True)
class Port:
    """An input: `shape` mixes sizes, names of open dimensions, and None for open ones without a name."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    def shown(self) -> str:
        """`x float32 [batch, 3, 224, 224]`."""
        return f"{self.name} {self.dtype} [{', '.join('?' if d is None else str(d) for d in self.shape)}]"

    def sides(self) -> tuple[int, int] | None:
        """Where height and width are, if this is a picture: [B, C, H, W] or [B, H, W, C]."""
        if len(self.shape) != 4:
            return None
        second, last = self.shape[1], self.shape[3]
        if second in CHANNELS or (isinstance(second, str) and CHANNEL_NAME.match(second)):
            return 2, 3
        if last in CHANNELS or (isinstance(last, str) and CHANNEL_NAME.match(last)):
            return 1, 2
        return None


def onnx_ports(model: ModelProto, name: str) -> list[Port]:
    """The inputs of an ONNX graph.

    Raises:
        UserError: one of them is no tensor, or of a type that NumPy cannot make.
    """
    constants = {t.name for t in model.graph.initializer}
    found = []
    for value in model.graph.input:
        if value.name in constants:
            continue
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not tensor.elem_type:
            raise UserError(
                f"{name} takes {value.name}, which is no tensor (a sequence, map or optional); such graphs cannot be fed."
            )
        if not tensor.HasField("shape"):
            raise UserError(f"{name} does not say the shape of its input {value.name}; run onnx.shape_inference on it first.")
        dtype = "bfloat16"
        if tensor.elem_type != TensorProto.BFLOAT16:
            dtype = str(np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
        dims = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
        found.append(Port(value.name, dtype, dims))
    return checked(found, name)


def checked(ports: list[Port], name: str) -> list[Port]:
    """The same ports.

    Raises:
        UserError: there are none, or one of them cannot be fed from NumPy.
    """
    if not ports:
        raise UserError(f"{name} takes no inputs, so there is nothing to time it on.")
    for port in ports:
        if port.dtype not in FEEDABLE:
            raise UserError(f"{name} takes {port.shown()}, a type that NumPy cannot make; export it with float32 inputs.")
    return ports


def only_batch(ports: Sequence[Port]) -> int | None:
    """The batch of a graph whose first dimension is fixed; None where it is open.

    It is that of the first picture, else of the first input that has a dimension. Where nothing is open and no input is a picture
    or has several dimensions, a call is one example.
    """
    leading = next((p for p in ports if p.sides()), next((p for p in ports if p.shape), None))
    if leading is None:
        return 1
    first = leading.shape[0]
    if not isinstance(first, int):
        return None
    return first if len(leading.shape) > 1 else 1


def resolution_of(ports: Sequence[Port], asked: int | None, name: str) -> int | None:
    """Height in pixels of the picture that the graph is fed; None where it takes none.

    Raises:
        UserError: another size was asked for than it is fixed at.
    """
    for port in ports:
        if sides := port.sides():
            fixed = [d for s in sides if isinstance(d := port.shape[s], int)]
            if asked is not None and fixed and set(fixed) != {asked}:
                raise UserError(f"{name} takes pictures of {' x '.join(map(str, fixed))} px only, not --resolution {asked}.")
            return fixed[0] if fixed else asked or SIDE
    return None


def shape_of(port: Port, batch: int, resolution: int | None, batch_name: str | None, name: str) -> tuple[int, ...]:
    """The shape that a port is fed at that batch; `batch_name`: what the graph calls that dimension.

    Raises:
        UserError: a dimension is open and cannot be guessed.
    """
    sides, shape = port.sides() or (), []
    for i, dim in enumerate(port.shape):
        if isinstance(dim, int):
            shape.append(dim)
        elif i == 0 or (dim is not None and dim == batch_name):
            shape.append(batch)
        elif i in sides:
            shape.append(resolution or SIDE)
        elif sides and isinstance(dim, str) and CHANNEL_NAME.match(dim):
            shape.append(3)
        else:
            which = f"dimension {i}" + (f" ({dim})" if dim else "")
            raise UserError(
                f"{name} leaves {which} of its input {port.name} open, and nothing says how large it is; fix it with "
                f"`python -m onnxruntime.tools.make_dynamic_shape_fixed --dim_param {dim or 'NAME'} --dim_value N`."
            )
    return tuple(shape)


def feed(ports: Sequence[Port], batch: int, resolution: int | None, name: str) -> dict[str, np.ndarray]:
    """Values for every input at that batch, always the same.

    Raises:
        UserError: a dimension is open and cannot be guessed.
    """
    first = next((p.shape[0] for p in ports if p.shape and not isinstance(p.shape[0], int)), None)
    batch_name = first if isinstance(first, str) else None
    random = np.random.default_rng(0)
    return {p.name: values(p, shape_of(p, batch, resolution, batch_name, name), random) for p in ports}


def values(port: Port, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Normal noise for floats, any bytes for pictures in uint8; 0 for other whole numbers, as no vocabulary is known; 1 for masks."""
    dtype = np.dtype(port.dtype)
    if dtype.kind == "f":
        return random.standard_normal(shape).astype(dtype)
    if port.sides() and dtype == np.uint8:
        return random.integers(0, 256, shape, dtype=np.uint8)
    return np.full(shape, dtype.kind == "b" or "mask" in port.name.lower(), dtype)
