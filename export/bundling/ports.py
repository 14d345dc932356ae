"""What the axes of a bundle's tensors are, in the manifest's words."""

from export.graphs.preprocess_graph import PIXELS

PATCH = "patch (row by row from the top left)"
LAYOUTS = {
    "images": "batch, channel (red, green, blue), row, column",
    PIXELS: "batch, row, column, channel (red, green, blue), 0..255",
    "cls": "batch, feature",
    "patches": f"batch, {PATCH}, feature",
    "metres": f"batch, {PATCH}",
}
