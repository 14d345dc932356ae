"""Pictures of what models predict, composed for the report: segmentation, depth and retrieval, model beside model, with their words.

A panel is one compact picture (WebP, at most MOST_BYTES) with a caption and a text for those who do not see it. Right and wrong are told by
a mark as well as by colour, and maps of depth use a scale whose brightness ascends, so that they read in grey.

Shape legend: H W pixels, h w cells of a map (any size; cells are enlarged without smoothing).
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MOST_BYTES = 250_000
QUALITY = 80
SIDE, GAP, HEAD = 128, 6, 22  # pixels: a tile, between tiles, a heading's height
MOST_CLASSES = 12  # in a legend
PAPER, INK = (255, 255, 255), (29, 27, 24)
RIGHT, WRONG, QUERY = (11, 106, 143), (179, 97, 11), (29, 27, 24)  # blue and orange: told apart by most colour-blind readers
MIMES = {b"\x89PNG": "image/png", b"RIFF": "image/webp", b"\xff\xd8\xff": "image/jpeg"}
# Anchors of a scale with ascending brightness, dark blue to light yellow (after Matplotlib's cividis).
SCALE = np.array(
    [(0, 32, 76), (35, 62, 108), (87, 93, 109), (124, 123, 120), (165, 154, 114), (209, 188, 93), (255, 233, 69)], float
)

# Twelve class colours, bright and dark in turn, so that neighbours differ in grey too.
CLASS_COLOURS = (
    (11, 106, 143), (240, 200, 80), (122, 35, 55), (150, 205, 130), (90, 60, 140), (245, 150, 120),
    (40, 90, 60), (150, 200, 235), (140, 80, 20), (225, 160, 210), (60, 60, 60), (215, 215, 205),
)  # fmt: skip
IGNORED_COLOUR = (128, 128, 128)


@dataclass(frozen=True)
class Panel:
    """One picture of the page.

    Attributes:
        name: heading, unique in a report. image: PNG, WebP or JPEG bytes.
        caption: below it. alt: what it shows, for those who do not see it.
    """

    name: str
    image: bytes
    caption: str
    alt: str

    @property
    def mime(self) -> str:
        """Raises ValueError for bytes that are none of the three."""
        found = next((mime for start, mime in MIMES.items() if self.image.startswith(start)), None)
        if found is None:
            raise ValueError(f"picture {self.name!r} is no PNG, WebP or JPEG")
        return found

    @property
    def size(self) -> tuple[int, int]:
        with Image.open(io.BytesIO(self.image)) as picture:
            return picture.size


def segmentation_panel(
    name: str,
    images: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    predicted: Mapping[str, Sequence[np.ndarray]],
    classes: Sequence[str],
    ignore: int = 255,
) -> Panel:
    """A row a picture: the picture, the truth, and every model's map; a legend of the classes that occur.

    Args:
        images: [H, W, 3] uint8. truth, predicted: whole numbers [h, w], indices of `classes`; `ignore` is shown in grey.
        predicted: model's name -> a map a picture, e.g. teacher, student, INT8.
    """
    columns = {"picture": [_picture(i) for i in images], "truth": [_classes(t, ignore) for t in truth]}
    columns |= {model: [_classes(m, ignore) for m in maps] for model, maps in predicted.items()}
    there = sorted(
        {int(v) for t in [*truth, *(m for maps in predicted.values() for m in maps)] for v in np.unique(t)} - {ignore}
    )
    legend = [(classes[v], CLASS_COLOURS[v % len(CLASS_COLOURS)]) for v in there[:MOST_CLASSES] if v < len(classes)]
    agreeing = [f"{model} {_agreement(maps, truth, ignore):.0f} %" for model, maps in predicted.items()]
    alt = (
        f"{len(images)} pictures beside their true segmentation and that of {_and(list(predicted))}. "
        f"Classes: {', '.join(n for n, _ in legend)}. Pixels of these pictures named as in the truth: {', '.join(agreeing)}."
    )
    return Panel(name, encoded(_grid(columns, legend)), "Columns: " + ", ".join(columns) + ".", alt)


def depth_panel(
    name: str,
    images: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    predicted: Mapping[str, Sequence[np.ndarray]],
    unit: str = "m",
) -> Panel:
    """As `segmentation_panel` for depth: one scale for truth and models of all pictures, from near (dark) to far (bright).

    Args:
        truth, predicted: float [h, w]; 0 or less and what is not finite is no measurement, and grey.
    """
    values = np.concatenate([t[np.isfinite(t) & (t > 0)].ravel() for t in map(np.asarray, truth)])
    if not values.size:
        raise ValueError(f"picture {name!r}: no pixel of the true depth is measured")
    low, high = (float(v) for v in np.percentile(values, [1, 99]))
    high = high if high > low else low + 1e-6
    columns = {"picture": [_picture(i) for i in images], "truth": [_depth(t, low, high) for t in truth]}
    columns |= {model: [_depth(m, low, high) for m in maps] for model, maps in predicted.items()}
    legend = [(f"{v:.1f} {unit}", _colour_of(s)) for s, v in ((s, low + s * (high - low)) for s in (0.0, 0.25, 0.5, 0.75, 1.0))]
    alt = (
        f"{len(images)} pictures beside their true depth and that of {_and(list(predicted))}; "
        f"dark is near ({low:.1f} {unit}), bright is far ({high:.1f} {unit}), grey was not measured."
    )
    return Panel(
        name, encoded(_grid(columns, legend)), "Columns: " + ", ".join(columns) + ". Dark is near, bright is far.", alt
    )


def retrieval_panel(
    name: str,
    queries: Sequence[np.ndarray],
    found: Mapping[str, Sequence[Sequence[np.ndarray]]],
    right: Mapping[str, Sequence[Sequence[bool]]],
) -> Panel:
    """A row a query and model: the query, then what the model ranks nearest, each with a tick or a cross and a frame.

    Args:
        queries: [H, W, 3] uint8. found: model -> a list a query of ranked pictures [H, W, 3]. right: the same shape, whether it is one.
    """
    ranks = max((len(r) for lists in found.values() for r in lists), default=0)
    columns: dict[str, list[Image.Image]] = {name: [] for name in ("query", *map(str, range(1, ranks + 1)))}
    labels = []
    for q, query in enumerate(queries):
        for model in found:
            columns["query"].append(_framed(_picture(query), QUERY))
            labels.append(model)
            for k in range(ranks):
                there = k < len(found[model][q])
                tile = _marked(_picture(found[model][q][k]), bool(right[model][q][k])) if there else _blank()
                columns[f"{k + 1}"].append(tile)
    counts = []
    for model in found:
        hits = [bool(v) for r in right[model] for v in r]
        counts.append(f"{model} {sum(hits)} of {len(hits)} right")
    alt = f"{len(queries)} query pictures, each with the {ranks} nearest by {_and(list(found))}: {'; '.join(counts)}."
    caption = "A tick marks a neighbour that is right, a cross one that is wrong. Rows by query: " + ", ".join(found) + "."
    return Panel(name, encoded(_grid(columns, [], labels)), caption, alt)


def encoded(picture: Image.Image) -> bytes:
    """WebP of at most MOST_BYTES: at QUALITY, then at less, then smaller."""
    while True:
        for quality in (QUALITY, 60, 40):
            out = io.BytesIO()
            picture.convert("RGB").save(out, "WEBP", quality=quality, method=4)
            if out.tell() <= MOST_BYTES:
                return out.getvalue()
        picture = picture.resize((max(1, picture.width * 3 // 4), max(1, picture.height * 3 // 4)), Image.Resampling.LANCZOS)


# Tiles.


def _fitted(picture: Image.Image, resample: Image.Resampling) -> Image.Image:
    """Cropped to the middle square and scaled to a tile."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), resample)


def _picture(image: np.ndarray) -> Image.Image:
    return _fitted(Image.fromarray(np.asarray(image, np.uint8)).convert("RGB"), Image.Resampling.BICUBIC)


def _classes(indices: np.ndarray, ignore: int) -> Image.Image:
    indices = np.asarray(indices).astype(np.int64)
    colours = np.array(CLASS_COLOURS, np.uint8)[indices % len(CLASS_COLOURS)]
    colours[indices == ignore] = IGNORED_COLOUR
    return _fitted(Image.fromarray(colours), Image.Resampling.NEAREST)


def _depth(metres: np.ndarray, low: float, high: float) -> Image.Image:
    metres = np.asarray(metres, float)
    known = np.isfinite(metres) & (metres > 0)
    share = np.clip((np.where(known, metres, low) - low) / (high - low), 0, 1)
    colours = np.stack([np.interp(share, np.linspace(0, 1, len(SCALE)), SCALE[:, c]) for c in range(3)], -1)
    colours[~known] = IGNORED_COLOUR
    return _fitted(Image.fromarray(colours.astype(np.uint8)), Image.Resampling.NEAREST)


def _colour_of(share: float) -> tuple[int, int, int]:
    r, g, b = (int(np.interp(share, np.linspace(0, 1, len(SCALE)), SCALE[:, c])) for c in range(3))
    return r, g, b


def _framed(tile: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    ImageDraw.Draw(tile).rectangle((0, 0, SIDE - 1, SIDE - 1), outline=colour, width=4)
    return tile


def _marked(tile: Image.Image, right: bool) -> Image.Image:
    """A frame, and a badge in the corner: a tick on a disc for right, a cross on a square for wrong."""
    colour = RIGHT if right else WRONG
    tile = _framed(tile, colour)
    draw, x, y, r = ImageDraw.Draw(tile), SIDE - 17, 17, 12
    if right:
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline=PAPER, width=2)
        draw.line([(x - 6, y), (x - 2, y + 5), (x + 6, y - 5)], fill=PAPER, width=3)
    else:
        draw.rectangle((x - r, y - r, x + r, y + r), fill=colour, outline=PAPER, width=2)
        for sign in (1, -1):
            draw.line([(x - 5, y - 5 * sign), (x + 5, y + 5 * sign)], fill=PAPER, width=3)
    return tile


def _blank() -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), PAPER)


def _grid(
    columns: Mapping[str, Sequence[Image.Image]], legend: Sequence[tuple[str, tuple[int, int, int]]], labels: Sequence[str] = ()
) -> Image.Image:
    """Headed columns on white, labels before the rows, a legend below."""
    font = ImageFont.load_default(14)
    rows = max(len(tiles) for tiles in columns.values())
    left = int(max((font.getlength(label) for label in labels), default=-8) + 8)
    width = left + len(columns) * (SIDE + GAP) - GAP
    entries = _legend_places(legend, font, width)
    bottom = (entries[-1][3] + 22) if entries else 0
    height = HEAD + rows * (SIDE + GAP) - GAP + (8 + bottom if entries else 0)
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    for c, (title, tiles) in enumerate(columns.items()):
        x = left + c * (SIDE + GAP)
        draw.text((x, HEAD - 6), _shortened(title, font, SIDE), fill=INK, font=font, anchor="ls")
        for r, tile in enumerate(tiles):
            picture.paste(tile, (x, HEAD + r * (SIDE + GAP)))
    for r, label in enumerate(labels):
        draw.text((0, HEAD + r * (SIDE + GAP) + SIDE // 2), label, fill=INK, font=font, anchor="lm")
    top = HEAD + rows * (SIDE + GAP) - GAP + 8
    for text, colour, x, y in entries:
        draw.rectangle((x, top + y + 3, x + 14, top + y + 17), fill=colour, outline=INK)
        draw.text((x + 20, top + y + 15), text, fill=INK, font=font, anchor="ls")
    return picture


def _legend_places(
    legend: Sequence[tuple[str, tuple[int, int, int]]], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[tuple[str, tuple[int, int, int], int, int]]:
    """Text, colour, x and y of the entries, wrapped to the picture's width."""
    found, x, y = [], 0, 0
    for text, colour in legend:
        wide = int(font.getlength(text)) + 36
        if x and x + wide > width:
            x, y = 0, y + 22
        found.append((text, colour, x, y))
        x += wide
    return found


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    while len(text) > 2 and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text


def _agreement(maps: Sequence[np.ndarray], truth: Sequence[np.ndarray], ignore: int) -> float:
    """Percent of pixels, over all pictures; maps of another size than the truth are read at its nearest cells."""
    right = total = 0
    for found, true in zip(maps, truth, strict=True):
        h, w = true.shape
        rows, cols = (np.arange(h) * found.shape[0] // h), (np.arange(w) * found.shape[1] // w)
        known = true != ignore
        right += int((found[rows][:, cols] == true)[known].sum())
        total += int(known.sum())
    return 100 * right / max(1, total)


def _and(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)
