"""What the patch features see: sample pictures above their patches, coloured by the first three principal components."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from distill.data.preprocess import Preprocess
from distill.encoder import Encoder

GAP, CAPTION = 6, 34  # pixels between pictures, height of a row's caption
CAPTION_GREY = (122, 122, 122, 255)  # reads on white and on black alike: the strip's background is transparent
TAILS = 1.0  # percent of patches at each end of a component that are clipped, so that one outlier does not grey all others
BATCH = 16
CAPTIONS = "Captions"  # the PNG's text chunk with the rows' captions, for what cannot read them off the picture


def pca_strip(
    images: Sequence[Image.Image],
    encoders: Mapping[str, Encoder],
    preprocess: Preprocess | Mapping[str, Preprocess],
    side: int = 112,
    batch: int | Mapping[str, int] = BATCH,
) -> bytes:
    """A PNG: a row of the pictures as the network gets them, then one row an encoder, each with its caption.

    The components are of all patches of all pictures together, so a colour means the same in a whole row. Between encoders
    colours mean nothing by themselves; those of the later ones are swapped and flipped to be like the first one's.

    Args:
        images: pictures of any size and mode.
        encoders: caption -> encoder: models in PyTorch and files alike, so that INT8 can stand beside what it was made from.
        preprocess: of the images; one for all, or one an encoder (the pictures are shown as the last of them gets them).
        side: width and height of one picture in the strip, in pixels.
        batch: images a call; by caption where a file takes fewer than others.
    """
    if not images:
        raise ValueError("pca_strip needs at least one picture")
    own = preprocess if isinstance(preprocess, Mapping) else dict.fromkeys(encoders, preprocess)
    shown = replace(list(own.values())[-1], normalize="none")
    pictures = [Image.fromarray((shown(i).transpose(1, 2, 0) * 255 + 0.5).astype(np.uint8)) for i in images]
    rows = {"pictures": [p.resize((side, side), Image.Resampling.BICUBIC) for p in pictures]}
    first: np.ndarray | None = None
    for label, encoder in encoders.items():
        inputs = torch.stack([torch.from_numpy(own[label](i)) for i in images])
        at_once = batch.get(label, BATCH) if isinstance(batch, Mapping) else batch
        colours = pca_colours(torch.cat([encoder(x).patches.float().cpu() for x in inputs.split(at_once)]).numpy())
        if first is not None and first.shape == colours.shape:
            colours = like(colours, first)
        first = colours if first is None else first
        tiles = [Image.fromarray((grid * 255 + 0.5).astype(np.uint8)) for grid in colours]
        rows[label] = [tile.resize((side, side), Image.Resampling.NEAREST) for tile in tiles]
    return _png(rows, side)


def captions(strip: bytes) -> list[str]:
    """The captions of a strip's rows, top to bottom; empty for a picture that was not made by `pca_strip`."""
    with Image.open(io.BytesIO(strip)) as picture:
        return json.loads(picture.info.get(CAPTIONS, "[]"))


def pca_colours(patches: np.ndarray) -> np.ndarray:
    """Patch features [B, N, D] on square grids -> colours [B, h, h, 3] in 0..1: red, green, blue are components 1, 2, 3.

    Components that do not exist (fewer than three dimensions, or no spread) stay at 0.5. The sign, which a principal
    component leaves open, is chosen so that its largest loading is positive.
    """
    b, n, d = patches.shape
    side = round(n**0.5)
    if side * side != n:
        raise ValueError(f"{n} patches do not form a square grid")
    flat = np.nan_to_num(patches.reshape(b * n, d).astype(np.float64), posinf=0.0, neginf=0.0)
    centred = flat - flat.mean(0)
    _, directions = np.linalg.eigh(centred.T @ centred) if d <= b * n else _thin(centred)
    colours = np.full((b * n, 3), 0.5)
    for i, direction in enumerate(directions.T[::-1][:3]):
        score = centred @ direction * np.sign(direction[np.abs(direction).argmax()])
        low, high = np.percentile(score, [TAILS, 100 - TAILS])
        if high - low > 1e-9 * max(1.0, float(np.abs(flat).max())):
            colours[:, i] = np.clip((score - low) / (high - low), 0, 1)
    return colours.reshape(b, side, side, 3)


def _thin(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As eigh of the covariance, ascending, for fewer patches than dimensions (raw pixels of wide cells)."""
    _, values, rows = np.linalg.svd(centred, full_matrices=False)
    return values[::-1] ** 2, rows[::-1].T


def like(colours: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The same three components, permuted and flipped to correlate best with `target` (same shape); nothing else changes."""
    a, b = (c.reshape(-1, 3) - c.reshape(-1, 3).mean(0) for c in (colours, target))
    scale = np.outer(np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=0))
    correlation = np.divide(b.T @ a, scale, out=np.zeros((3, 3)), where=scale > 1e-12)
    result = np.empty_like(colours)
    free_target, free = [0, 1, 2], [0, 1, 2]
    while free:
        i, j = max(((i, j) for i in free_target for j in free), key=lambda ij: abs(correlation[ij]))
        result[..., i] = colours[..., j] if correlation[i, j] >= 0 else 1 - colours[..., j]
        free_target.remove(i)
        free.remove(j)
    return result


def _png(rows: dict[str, list[Image.Image]], side: int) -> bytes:
    """Captioned rows of square pictures on a transparent ground."""
    columns = len(next(iter(rows.values())))
    width = columns * (side + GAP) - GAP
    strip = Image.new("RGBA", (width, len(rows) * (CAPTION + side + GAP) - GAP), (0, 0, 0, 0))
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(20)
    for r, (label, pictures) in enumerate(rows.items()):
        top = r * (CAPTION + side + GAP)
        text = label
        while text and draw.textlength(text, font=font) > width:
            text = text[:-2] + "…" if len(text) > 2 else ""
        draw.text((0, top + CAPTION - 8), text, fill=CAPTION_GREY, font=font, anchor="ls")
        for c, picture in enumerate(pictures):
            strip.paste(picture, (c * (side + GAP), top + CAPTION))
    out = io.BytesIO()
    info = PngInfo()
    info.add_itxt(CAPTIONS, json.dumps(list(rows)))
    strip.save(out, "PNG", optimize=True, pnginfo=info)
    return out.getvalue()
