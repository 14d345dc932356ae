"""What the page shows of patch features, as pure functions of arrays: principal components, similarity, masks, and their pictures.

Shape legend: N patches row by row, D width, h w patch grid, H W pixels of a picture, C = 3 colours or components.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

TAILS = 1.0  # percent of patches at each end of a component that are clipped, so that one outlier does not grey all others
# Viridis at nine places. Its lightness rises steadily, so that it reads without colour vision and in grey.
VIRIDIS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
# Okabe and Ito's colours, told apart by every kind of colour vision; classes beyond them begin again, darker.
PALETTE = ("e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7", "999999")
MASK_RGB = (0, 114, 178)
GREY_RGB = (96, 96, 96)  # patches that are not foreground

Point = tuple[int, int, bool]  # row, column, whether it belongs to what is looked for


@dataclass(frozen=True)
class Projection:
    """Principal components of one set of patches, to colour others alike.

    Attributes:
        mean_D, directions_DC: scores are `(patches - mean) @ directions`; unit columns, or zeros where there is no spread.
        low_C, high_C: scores that become 0 and 1.
        cut: mean, direction and threshold of the first component that parts foreground from background; None without that.
    """

    mean_D: np.ndarray
    directions_DC: np.ndarray
    low_C: np.ndarray
    high_C: np.ndarray
    cut: tuple[np.ndarray, np.ndarray, float] | None = None

    def foreground(self, patches_ND: np.ndarray) -> np.ndarray:
        """-> bool [N]; all of them where nothing was cut away."""
        if self.cut is None:
            return np.ones(len(patches_ND), bool)
        mean_D, direction_D, threshold = self.cut
        return (patches_ND - mean_D) @ direction_D > threshold

    def colours(self, patches_ND: np.ndarray) -> np.ndarray:
        """-> [N, C] in 0..1; 0.5 in components that do not exist."""
        scores_NC = (patches_ND.astype(np.float64) - self.mean_D) @ self.directions_DC
        spread_C = self.high_C - self.low_C
        exists_C = spread_C > 1e-9
        return np.where(exists_C, np.clip((scores_NC - self.low_C) / np.where(exists_C, spread_C, 1), 0, 1), 0.5)


def fit_projection(patches_ND: np.ndarray, grid: tuple[int, int], foreground: bool = False, swap: bool = False) -> Projection:
    """The first three principal components of an image's patches (DINOv2, section 8, figure 1).

    With `foreground` the first component is cut in two at Otsu's threshold and the components are of one side alone: the one that touches
    the picture's border less, or with `swap` the other.
    """
    patches_ND = patches_ND.astype(np.float64)
    cut = None
    kept_N = np.ones(len(patches_ND), bool)
    if foreground:
        mean_D, directions_DC = components(patches_ND, 1)
        direction_D = directions_DC[:, 0]
        score_N = (patches_ND - mean_D) @ direction_D
        threshold = otsu(score_N)
        if border_share(score_N > threshold, grid) > border_share(score_N <= threshold, grid):
            direction_D, threshold = -direction_D, -threshold
        if swap:
            direction_D, threshold = -direction_D, -threshold
        kept_N = (patches_ND - mean_D) @ direction_D > threshold
        if kept_N.sum() >= 3:  # fewer patches have no components to show
            cut = (mean_D, direction_D, threshold)
        else:
            kept_N[:] = True
    mean_D, directions_DC = components(patches_ND[kept_N], 3)
    scores_NC = (patches_ND[kept_N] - mean_D) @ directions_DC
    low_C, high_C = np.percentile(scores_NC, [TAILS, 100 - TAILS], axis=0)
    return Projection(mean_D, directions_DC, low_C, high_C, cut)


def components(patches_ND: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """-> mean [D], directions [D, count], largest variance first; zeros where there are fewer. The largest loading is positive."""
    mean_D = patches_ND.mean(0)
    _, _, rows_KD = np.linalg.svd(patches_ND - mean_D, full_matrices=False)
    directions_DC = np.zeros((len(mean_D), count))
    for i, direction_D in enumerate(rows_KD[:count]):
        directions_DC[:, i] = direction_D * np.sign(direction_D[np.abs(direction_D).argmax()])
    return mean_D, directions_DC


def border_share(mask_N: np.ndarray, grid: tuple[int, int]) -> float:
    """How much of a mask lies on the picture's border; 1 for an empty mask."""
    mask_hw = mask_N.reshape(grid)
    inside = mask_hw[1:-1, 1:-1].sum()
    return float(1 - inside / mask_hw.sum()) if mask_hw.any() else 1.0


def otsu(values: np.ndarray) -> float:
    """Otsu's threshold (1979): the value that parts `values` in two groups, of which each varies least. The largest where all are equal."""
    ordered = np.sort(values.ravel().astype(np.float64))
    n = len(ordered)
    below = np.arange(1, n)
    sums = np.cumsum(ordered)
    mean_low, mean_high = sums[:-1] / below, (sums[-1] - sums[:-1]) / (n - below)
    between = below * (n - below) * (mean_high - mean_low) ** 2
    if n < 2 or between.max() <= 1e-12:
        return float(ordered[-1])
    i = int(between.argmax())
    return float((ordered[i] + ordered[i + 1]) / 2)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors [..., D] of length 1; a zero vector stays one."""
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norm > 0, norm, 1)


def similarity(patches_ND: np.ndarray, grid: tuple[int, int], points: Sequence[Point], positive: bool = True) -> np.ndarray:
    """The largest cosine of every patch to any chosen patch of one sign -> [h, w]; -1 without such a patch."""
    chosen = [row * grid[1] + column for row, column, sign in points if sign is positive]
    if not chosen:
        return np.full(grid, -1.0)
    units_ND = unit(patches_ND.astype(np.float64))
    return (units_ND @ units_ND[chosen].T).max(1).reshape(grid)


@dataclass(frozen=True)
class Mask:
    """`inside` [H, W] bool, and the threshold that made it."""

    inside: np.ndarray
    threshold: float


def mask_from(
    patches_ND: np.ndarray,
    grid: tuple[int, int],
    points: Sequence[Point],
    size: int,
    threshold: float | None = None,
    connected: bool = False,
    smooth: bool = True,
) -> Mask:
    """Where the similarity to the positive patches is above a threshold and above that to the negative ones.

    Args:
        size: side of the mask in pixels; maps are resampled first and cut then, so that the outline is as smooth as the map.
        threshold: a cosine; Otsu's of the map without one.
        connected: keep only what hangs together with a positive patch.
    """
    like_hw, unlike_hw = (similarity(patches_ND, grid, points, sign) for sign in (True, False))
    cut = otsu(like_hw) if threshold is None else threshold
    like_HW, unlike_HW = (resample(m, size, smooth) for m in (like_hw, unlike_hw))
    inside = (like_HW >= cut) & (like_HW > unlike_HW)
    if connected:
        labels, _ = ndimage.label(inside)
        h, w = grid
        seeds = {
            int(labels[(2 * row + 1) * size // (2 * h), (2 * column + 1) * size // (2 * w)])
            for row, column, sign in points
            if sign
        }
        inside = np.isin(labels, sorted(seeds - {0}))
    return Mask(inside, cut)


def resample(map_hw: np.ndarray, size: int, smooth: bool = True) -> np.ndarray:
    """[h, w] -> [size, size]: bicubic within the map's own range, or every patch as a block."""
    how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    big = np.asarray(Image.fromarray(map_hw.astype(np.float32)).resize((size, size), how))
    return np.clip(big, map_hw.min(), map_hw.max())


# --- pictures ---


def rgb(names: Sequence[str]) -> np.ndarray:
    """Hexadecimal colours -> [n, 3] uint8."""
    return np.array([[int(name[i : i + 2], 16) for i in (0, 2, 4)] for name in names], np.uint8)


def heat_colours(values: np.ndarray) -> np.ndarray:
    """[...] in 0..1 -> [..., 3] in 0..255."""
    stops = rgb(VIRIDIS).astype(np.float64)
    places = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(values, places, stops[:, i]) for i in range(3)], -1)


def class_colours(ids: np.ndarray) -> np.ndarray:
    """Class ids [...] -> [..., 3] in 0..255."""
    colours = rgb(PALETTE).astype(np.float64)
    return colours[ids % len(colours)] * (0.6 ** np.minimum(ids // len(colours), 3))[..., None]


def as_picture(values_HWC: np.ndarray) -> Image.Image:
    """[H, W, 3] in 0..255 -> Pillow image."""
    return Image.fromarray(np.clip(values_HWC + 0.5, 0, 255).astype(np.uint8))


def pca_picture(
    colours_NC: np.ndarray, kept_N: np.ndarray, grid: tuple[int, int], size: int, component: int | None, smooth: bool
):
    """Colours of patches as a picture; one component alone goes through the colour-blind-safe scale, background is grey."""
    colours_NC = colours_NC * 255 if component is None else heat_colours(colours_NC[:, component])
    values_NC = np.where(kept_N[:, None], colours_NC, GREY_RGB)
    maps = [resample(values_NC[:, i].reshape(grid), size, smooth) for i in range(3)]
    return as_picture(np.stack(maps, -1))


def heat_picture(
    map_hw: np.ndarray, under: Image.Image, low: float, high: float, smooth: bool, opacity: float = 0.65
) -> Image.Image:
    """A map over its picture in grey; `low` and `high` are the ends of the colour scale."""
    values = (resample(map_hw, under.width, smooth) - low) / max(high - low, 1e-9)
    grey = np.asarray(under.convert("L").convert("RGB"), np.float64)
    return as_picture(grey * (1 - opacity) + heat_colours(np.clip(values, 0, 1)) * opacity)


def mask_picture(inside_HW: np.ndarray, under: Image.Image) -> Image.Image:
    """What is outside fades, what is inside is tinted, and a white and black line runs between: told apart without colour too."""
    pixels = np.asarray(under, np.float64)
    faded = pixels * 0.35 + 255 * 0.65 * 0.5
    tinted = pixels * 0.75 + np.array(MASK_RGB) * 0.25
    values = np.where(inside_HW[..., None], tinted, faded)
    width = max(1, under.width // 220)
    values[ndimage.binary_dilation(inside_HW, iterations=width) & ~inside_HW] = 0
    values[inside_HW & ~ndimage.binary_erosion(inside_HW, iterations=width, border_value=1)] = 255
    return as_picture(values)


def marked(picture: Image.Image, points: Sequence[Point], grid: tuple[int, int]) -> Image.Image:
    """The picture with a frame around every chosen patch: a cross in the positive ones, a bar in the negative ones."""
    from PIL import ImageDraw

    picture = picture.copy()
    draw = ImageDraw.Draw(picture)
    h, w = grid
    for row, column, positive in points:
        x0, y0 = column * picture.width // w, row * picture.height // h
        x1, y1 = (column + 1) * picture.width // w - 1, (row + 1) * picture.height // h - 1
        x, y, arm = (x0 + x1) // 2, (y0 + y1) // 2, max(3, (x1 - x0) // 4)
        strokes = [(x - arm, y, x + arm, y)] + [(x, y - arm, x, y + arm)] * positive
        draw.rectangle((x0 - 2, y0 - 2, x1 + 2, y1 + 2), outline="black", width=2)
        draw.rectangle((x0, y0, x1, y1), outline="white", width=2)
        for stroke, colour in [(s, "black") for s in strokes] + [(s, "white") for s in strokes]:
            draw.line(stroke, fill=colour, width=6 if colour == "black" else 2)
    return picture


def display_size(grid: tuple[int, int], least: int = 448) -> int:
    """A side of at least so many pixels in which patches are whole pixels."""
    return grid[0] * -(-least // grid[0])
