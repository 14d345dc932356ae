"""What the page can be asked: each view is a function of an image's Look and the controls' values. Knows nothing of Gradio.

Whatever a user can get wrong raises a DecantError with one sentence, which the page shows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from distill.data.images import BadImage, decode
from distill.data.scenes import ScenesConfig
from distill.errors import UserError
from export.demo import vision
from export.demo.heads import DenseHead
from export.demo.index import Index, build
from export.demo.models import Look, Model
from export.demo.vision import Point

LARGEST = 1024  # pixels of the shorter side that are kept of an upload
COMPONENTS = {"1, 2, 3 as red, green, blue": None, "1": 0, "2": 1, "3": 2}
EXAMPLES = 8


@dataclass(frozen=True)
class Figure:
    """A picture, what it shows for those who cannot see it, and the line beneath it."""

    image: Image.Image
    alt: str
    caption: str


def read_image(path: Path) -> Image.Image:
    """A file of any kind -> RGB, its shorter side at most LARGEST.

    Raises:
        UserError: it is no image, broken, or too large; the sentence says which.
    """
    try:
        image = decode(path, shorter_side=LARGEST)
    except BadImage as e:
        raise UserError(f"{path.name} cannot be shown: {e.reason}. Choose another image.") from e
    except MemoryError as e:
        raise UserError(f"{path.name} does not fit into this machine's memory. Choose a smaller image.") from e
    if (scale := LARGEST / min(image.size)) < 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return image


def examples(folder: Path | None, files: list[Path]) -> list[tuple[Image.Image, str]]:
    """A few images to begin with, and their names: of the folder, of what came with the bundle, or rendered scenes."""
    found: list[tuple[Image.Image, str]] = []
    paths = files
    if folder is not None:
        from export.demo.index import files_of

        paths = [folder / name for name, _, _ in files_of(folder)]
    for path in paths:
        if len(found) == EXAMPLES:
            break
        try:
            found.append((read_image(path), path.name))
        except UserError:
            continue
    scenes = ScenesConfig(count=6, size=224, seed=7, split="test").build()
    return found or [(scenes.image(i), f"rendered scene {i + 1}") for i in range(len(scenes))]


def timing(model: Model, look: Look) -> str:
    """The stopwatch's line."""
    calls = f"median of the last {look.calls} calls {look.median_ms:.1f} ms" if look.calls > 1 else "the first call"
    return (
        f"{model.name}: {look.model_ms:.1f} ms for this call ({calls}), preprocessing apart {look.preprocess_ms:.1f} ms. "
        f"{model.runtime}, {look.picture.width} px, {look.grid[0]} × {look.grid[1]} patches of width {look.patches_ND.shape[1]}."
    )


def enlarged(look: Look) -> Image.Image:
    """The network's input, large enough to look at and to click."""
    size = vision.display_size(look.grid)
    return look.picture.resize((size, size), Image.Resampling.BICUBIC)


def input_view(look: Look) -> Figure:
    return Figure(enlarged(look), "The image as the network gets it.", "The image as the network gets it.")


def source_view(look: Look, points: Sequence[Point]) -> Figure:
    """The picture to click on."""
    chosen = "; ".join(f"row {r + 1}, column {c + 1} {'wanted' if positive else 'unwanted'}" for r, c, positive in points)
    alt = f"The image as the network gets it, {look.grid[0]} by {look.grid[1]} patches. Chosen: {chosen or 'none'}."
    return Figure(vision.marked(enlarged(look), points, look.grid), alt, f"Chosen: {chosen or 'no patch'}.")


def patch_at(look: Look, x: int, y: int) -> tuple[int, int]:
    """A pixel of `source_view`'s picture -> row and column from 0."""
    size = vision.display_size(look.grid)
    h, w = look.grid
    return min(max(y * h // size, 0), h - 1), min(max(x * w // size, 0), w - 1)


def with_point(points: Sequence[Point], row: int, column: int, how: str) -> list[Point]:
    """Points after a patch was chosen: `anew` alone, or `add` as wanted, or `exclude` as unwanted; a second time takes it away."""
    if how == "anew":
        return [(row, column, True)]
    point = (row, column, how == "add")
    rest = [p for p in points if p[:2] != (row, column)]
    return rest if point in points else [*rest, point]


def pca_view(look: Look, component: str, foreground: bool, swap: bool, smooth: bool) -> Figure:
    projection = vision.fit_projection(look.patches_ND, look.grid, foreground, swap)
    return draw_pca(look, projection, component, smooth)


def draw_pca(look: Look, projection: vision.Projection, component: str, smooth: bool) -> Figure:
    kept_N = projection.foreground(look.patches_ND)
    colours_NC = projection.colours(look.patches_ND)
    image = vision.pca_picture(colours_NC, kept_N, look.grid, vision.display_size(look.grid), COMPONENTS[component], smooth)
    kept = "" if projection.cut is None else f" Foreground: {kept_N.sum()} of {len(kept_N)} patches, the rest is grey."
    return Figure(
        image, f"Principal components of the patches, {component}.{kept}", f"Patches of like features have like colours.{kept}"
    )


def similarity_view(look: Look, points: Sequence[Point], smooth: bool) -> Figure:
    """The heat map; its scale runs from the map's least to its largest value."""
    need_positive(points)
    map_hw = vision.similarity(look.patches_ND, look.grid, points)
    low, high = float(map_hw.min()), float(map_hw.max())
    image = vision.heat_picture(map_hw, enlarged(look), low, high, smooth)
    span = f"cosine {number(low)} (dark violet) to {number(high)} (yellow)"
    return Figure(image, f"Similarity of every patch to the chosen ones: {span}.", f"{span.capitalize()}.")


def number(value: float, digits: int = 2) -> str:
    """With a minus sign that is as wide as a plus."""
    return f"{value:.{digits}f}".replace("-", "−")


def mask_view(
    look: Look, points: Sequence[Point], threshold: float | None, connected: bool, smooth: bool
) -> tuple[Figure, float]:
    """The mask, and the threshold that was used."""
    need_positive(points)
    size = vision.display_size(look.grid)
    mask = vision.mask_from(look.patches_ND, look.grid, points, size, threshold, connected, smooth)
    share = f"{mask.inside.mean():.0%} of the picture"
    how = "by Otsu" if threshold is None else "as set"
    image = vision.mask_picture(mask.inside, enlarged(look))
    return Figure(image, f"Mask of {share}.", f"{share}, at cosine {number(mask.threshold)} ({how})."), mask.threshold


def need_positive(points: Sequence[Point]) -> None:
    if not any(positive for _, _, positive in points):
        raise UserError("Choose a patch: click the picture, or give its row and column.")


def similar_view(
    folder: Path | None, root: Path | None, model: Model, look: Look, count: int, progress: Callable[[int, int], None]
) -> tuple[list[tuple[Image.Image, str]], str]:
    """Pictures with captions, nearest first, and a line on the index."""
    if folder is None or root is None:
        raise UserError("There is no folder to search in: start the page with `decant demo PATH --images FOLDER`.")
    index: Index = build(root, folder, model, progress)
    found = []
    for name, cosine in index.search(look.cls_D, count):
        image = read_image(folder / name)
        image.thumbnail((320, 320))
        found.append((image, f"{name}, cosine {cosine:.3f}"))
    lost = len(index.broken)
    broken = f" {lost} {'files' if lost > 1 else 'file'} could not be read, such as {index.broken[0]}." if lost else ""
    return found, f"The nearest {len(found)} of {len(index.names)} images in {folder.name}, by {model.name}.{broken}"


def dense_view(look: Look, head: DenseHead) -> Figure:
    """A head's map over the picture."""
    size = vision.display_size(look.grid)
    predicted = head.predict(look, size)
    if head.kind == "depth":
        low, high = float(predicted.min()), float(predicted.max())
        image = vision.heat_picture(predicted, enlarged(look), low, high, smooth=True, opacity=1.0)
        text = f"Depth from {low:.1f} m (dark violet) to {high:.1f} m (yellow)."
        return Figure(image, text, text)
    ids, counts = np.unique(predicted, return_counts=True)
    order = np.argsort(-counts)
    names = [f"{head.name_of(int(ids[k]))} {counts[k] / predicted.size:.0%}" for k in order]
    under = np.asarray(enlarged(look), np.float64)
    image = vision.as_picture(under * 0.4 + vision.class_colours(predicted) * 0.6)
    text = f"Segmentation: {', '.join(names[:8])}."
    return Figure(image, text, text)


def compare_view(
    image: Image.Image, a: Model, b: Model, component: str, foreground: bool, smooth: bool
) -> tuple[list[Figure], str, list[tuple[str, ...]]]:
    """Two models on one image -> PCA of both by the first one's projection with a map of cosines, a line on the cosines, and rows
    (what, of a, of b) for a table.

    Features of other widths cannot share a projection: each has its own then, and a line says so.
    """
    looks = [a.look(image), b.look(image)]
    first, second = looks
    shared = first.patches_ND.shape[1] == second.patches_ND.shape[1]
    projection = vision.fit_projection(first.patches_ND, first.grid, foreground)
    other = projection if shared else vision.fit_projection(second.patches_ND, second.grid, foreground)
    figures = []
    for model, look, used in ((a, first, projection), (b, second, other)):
        drawn = draw_pca(look, used, component, smooth)
        figures.append(Figure(drawn.image, f"{model.name}: {drawn.alt}", model.name))
    rows: list[tuple[str, ...]] = [
        ("this call", f"{first.model_ms:.1f} ms", f"{second.model_ms:.1f} ms"),
        ("median", *(f"{look.median_ms:.1f} ms over {look.calls} calls" for look in looks)),
        ("preprocessing", f"{first.preprocess_ms:.1f} ms", f"{second.preprocess_ms:.1f} ms"),
        ("runtime", a.runtime, b.runtime),
        ("patches", *(f"{look.grid[0]} × {look.grid[1]}, width {look.patches_ND.shape[1]}" for look in looks)),
    ]
    if not shared:
        line = "Features of different widths have no cosine, and each picture has a projection of its own."
        return figures, line, rows
    line = f"Cosine of the CLS features {number(float(vision.unit(first.cls_D) @ vision.unit(second.cls_D)), 5)}"
    if first.grid == second.grid:
        per_patch = (vision.unit(first.patches_ND) * vision.unit(second.patches_ND)).sum(1).reshape(first.grid)
        low, high = float(per_patch.min()), float(per_patch.max())
        text = f"Cosine of each patch between the two: {number(low, 4)} (dark violet) to {number(high, 4)} (yellow)."
        figures.append(Figure(vision.heat_picture(per_patch, enlarged(first), low, high, smooth), text, text))
        line += f", of the patches {number(float(per_patch.mean()), 5)} in the mean and {number(low, 5)} at least"
    return figures, f"{line}. Both pictures have the first one's projection.", rows
