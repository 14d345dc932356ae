"""`decant layout`: a bundle as Triton, an OCI registry, Docker or a device want it."""

from collections.abc import Sequence
from pathlib import Path

from export.bundling.layouts import layout as write_layout
from recipes.signing import trust_in


def layout(bundle: Path, to: str, out: Path, keys: Sequence[Path], required: bool) -> list[str]:
    """Write the layout and return the lines to print.

    Raises:
        UserError: no such bundle, layout or key, the folder exists, or nothing in the bundle fits.
        GateFailed: the bundle is damaged, or not signed by one of the keys.
    """
    return write_layout(bundle, to, out, trust_in(keys, required))
