"""Decoding: every kind of image becomes RGB of the right colours, every kind of broken one a BadImage with its reason."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from distill.data.encoded import seeded_order
from distill.data.folders import files_fingerprint, image_files
from distill.data.images import FORMATS, BadImage, decode

RED = (200, 30, 60)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def photo(size=(64, 48), seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def centre(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)[image.height // 2, image.width // 2].astype(int)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims any size; its pixels are a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_common_formats_keep_the_colour(format):
    image = decode(encoded(Image.new("RGB", (20, 10), RED), format))
    assert image.size == (20, 10)
    assert abs(centre(image) - RED).max() <= 6


def test_greyscale_palette_and_one_bit():
    assert tuple(centre(decode(encoded(Image.new("L", (9, 9), 77))))) == (77, 77, 77)
    assert tuple(centre(decode(encoded(Image.new("RGB", (9, 9), RED).quantize(4))))) == RED
    assert tuple(centre(decode(encoded(Image.new("1", (9, 9), 1))))) == (255, 255, 255)


def test_alpha_is_laid_over_white():
    assert tuple(centre(decode(encoded(Image.new("RGBA", (9, 9), (0, 0, 0, 0)))))) == (255, 255, 255)
    assert tuple(centre(decode(encoded(Image.new("RGBA", (9, 9), (*RED, 255)))))) == RED
    assert tuple(centre(decode(encoded(Image.new("LA", (9, 9), (0, 0)))))) == (255, 255, 255)
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, *RED])
    assert tuple(centre(decode(encoded(palette, transparency=1)))) == (255, 255, 255)


def test_cmyk_is_converted():
    assert abs(centre(decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))) - (255, 0, 0)).max() < 25
    assert abs(centre(decode(encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 255)), "TIFF"))) - (0, 0, 0)).max() < 40


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_is_scaled_not_clipped(format):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    pixels = np.asarray(decode(encoded(Image.fromarray(ramp), format)))[..., 0].ravel().astype(int)
    assert abs(pixels - np.arange(256)).max() <= 1


def test_16_bit_colour_png():
    """Pillow cannot write one, so it is made by hand: a single pixel of 48 bits."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = b"\0" + struct.pack(">HHH", 0xFFFF, 0x8000, 0x0000)
    data = (
        chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    )
    assert tuple(centre(decode(b"\x89PNG\r\n\x1a\n" + data))) == (255, 128, 0)


def test_one_pixel_and_animated():
    assert decode(encoded(Image.new("RGB", (1, 1), RED))).size == (1, 1)
    frames = [Image.new("RGB", (8, 8), c) for c in [RED, (0, 0, 255)]]
    assert abs(centre(decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))) - RED).max() <= 6


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn
    image = Image.new("RGB", (40, 20), "black")
    image.paste((255, 255, 255), (0, 0, 20, 20))
    turned = decode(encoded(image, "JPEG", exif=exif, quality=95))
    assert turned.size == (20, 40)
    assert np.asarray(turned)[:15].mean() > 240
    assert np.asarray(turned)[25:].mean() < 15


def test_broken_exif_costs_neither_the_picture_nor_its_rotation():
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.0)}
    three_bytes = b"\x00\x02\x00\x01\x00\x00\x00\x03"  # a latitude of three bytes, not of three fractions
    broken = exif.tobytes().replace(b"\x00\x02\x00\x05\x00\x00\x00\x03", three_bytes)
    assert broken != exif.tobytes()
    image = decode(encoded(Image.new("RGB", (32, 16), RED), "JPEG", exif=broken))
    assert image.size == (16, 32)
    assert abs(centre(image) - RED).max() <= 6


@pytest.mark.parametrize("profile", ["zz", "\nexif\n 10\nzzzz", "\nexif\n  4\n45786966"])
def test_broken_exif_of_a_png(profile):
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", profile)
    assert tuple(centre(decode(encoded(Image.new("RGB", (16, 16), RED), pnginfo=info)))) == RED


def test_file_and_bytes_agree(tmp_path):
    data = encoded(photo(), "JPEG")
    (tmp_path / "a.jpg").write_bytes(data)
    assert decode(tmp_path / "a.jpg").tobytes() == decode(data).tobytes()


def test_result_outlives_its_file(tmp_path):
    (tmp_path / "a.bmp").write_bytes(encoded(photo(), "BMP"))
    image = decode(tmp_path / "a.bmp")
    (tmp_path / "a.bmp").unlink()
    assert image.resize((5, 5)).size == (5, 5)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "not an image"),
        (b"<html>404</html>" * 100, "not an image"),
        (encoded(photo(), "JPEG")[:-400], "truncated"),
        (encoded(photo(), "PNG")[:900], "truncated"),
        (encoded(photo(), "PNG")[:20], ""),
        (encoded(photo(), "WEBP")[:200], ""),
        (encoded(photo(), "TIFF")[:300], ""),
        (encoded(photo(), "GIF")[:30], ""),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "not an image"),
        (png_header(20_000, 5_001), "million pixels"),
        (png_header(60_000, 60_000), "million pixels"),
        (png_header(0, 5), ""),
        (png_header(3, 3_000), "too narrow"),
    ],
    ids=[
        "empty",
        "text",
        "html",
        "cut_jpeg",
        "cut_png",
        "cut_header",
        "cut_webp",
        "cut_tiff",
        "cut_gif",
        "eps",
        "large",
        "huge",
        "flat",
        "sliver",
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_say_why(data, reason, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(data)
    for source in (data, tmp_path / "bad.jpg"):
        with pytest.raises(BadImage) as e:
            decode(source)
        assert e.value.reason
        assert reason in e.value.reason
        assert "\n" not in e.value.reason


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_enormous_is_refused_by_its_header_without_unpacking():
    """A real bomb: 120 million white pixels in 120 kB. Unpacked it is 360 MB; the peak must stay far below."""
    import resource

    rows = zlib.compressobj(9)
    raw = b"".join(rows.compress(b"\0" * 36_001) for _ in range(10_000)) + rows.flush()
    header = struct.pack(">IIBBBBB", 12_000, 10_000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", raw), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in parts
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImage, match="million pixels"):
        decode(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_missing_unreadable_and_endless_files(tmp_path):
    with pytest.raises(BadImage, match="missing"):
        decode(tmp_path / "none.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    with pytest.raises(BadImage):
        decode(tmp_path / "loop.jpg")
    with pytest.raises(BadImage):
        decode(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_damage_gives_an_image_or_a_reason():
    """Random damage to every format: nothing but BadImage ever comes out."""
    g = np.random.default_rng(0)
    reasons = []
    for format in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"):
        data = np.frombuffer(encoded(photo(), format), np.uint8)
        for _ in range(60):
            broken = data.copy()
            broken[g.integers(0, min(len(data), 300), 6)] = g.integers(0, 256, 6)
            try:
                assert decode(broken.tobytes()).mode == "RGB"
            except BadImage as e:
                reasons.append(e.reason)
    assert len(reasons) > 50
    assert all(reasons)


def test_shorter_side_decodes_large_jpegs_smaller():
    large = photo((1600, 1200))
    data = encoded(large, "JPEG", quality=95)
    small = decode(data, shorter_side=100)
    assert small.size == (200, 150)  # 1/8
    small = decode(data, shorter_side=200)
    assert small.size == (400, 300)  # 1/8 would be below what is needed
    exact = large.resize((200, 150), Image.Resampling.BICUBIC)
    close = small.resize((200, 150), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(exact, int) - np.asarray(close, int)).mean() < 2
    assert decode(data, shorter_side=1000).size == (1600, 1200)
    assert decode(encoded(large, "PNG"), shorter_side=100).size == (1600, 1200)
    for mode in ("L", "CMYK"):
        assert decode(encoded(large.convert(mode), "JPEG"), shorter_side=100).mode == "RGB"


def test_only_listed_formats_are_tried():
    assert not {"EPS", "PDF", "WMF", "FITS"} & set(FORMATS)


def test_image_files_are_sorted_by_suffix_and_safe(tmp_path):
    outside = tmp_path / "outside"
    root = tmp_path / "root"
    for folder in (root / "b", root / "a" / "deep", root / ".hidden", outside):
        folder.mkdir(parents=True)
    for name in (
        "b/2.JPG",
        "b/1.jpeg",
        "a/deep/x.Png",
        "a/y.webp",
        "z.tif",
        ".hidden/h.jpg",
        "b/.h.jpg",
        "b/note.txt",
        "b/jpg",
    ):
        (root / name).write_bytes(b"x")
    (outside / "o.gif").write_bytes(b"x")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "above").symlink_to(tmp_path)
    (root / "c").symlink_to(outside)
    (outside / "back").symlink_to(root / "b")
    (root / "b" / "same").symlink_to(root / "a")
    (root / "b" / "linked.bmp").symlink_to(root / "z.tif")
    (root / "b" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "b" / "self").symlink_to(root / "b" / "self")
    os.mkfifo(root / "b" / "pipe.jpg")
    expected = ["a/deep/x.Png", "a/y.webp", "b/1.jpeg", "b/2.JPG", "b/gone.png", "b/linked.bmp", "c/o.gif", "z.tif"]
    assert list(image_files(str(root))) == expected


def test_fingerprint_sees_names_sizes_and_both_ends(tmp_path):
    def of(name: str, data: bytes) -> str:
        path = tmp_path / "f"
        path.write_bytes(data)
        return files_fingerprint([(name.encode(), path)])

    body = bytes(10_000)
    same = of("a", body)
    assert same == of("a", body)
    others = [of("b", body), of("a", body + b"\0"), of("a", b"\1" + body[1:]), of("a", body[:-1] + b"\1"), of("a", b"")]
    assert len({same, *others}) == 6
    assert files_fingerprint([(b"a", Path("/nowhere/f"))]) != of("a", b"")


def test_seeded_order_makes_prefixes():
    full = seeded_order(1000, None)
    assert sorted(full.tolist()) == list(range(1000))
    assert seeded_order(1000, 10).tolist() == full[:10].tolist()
    assert seeded_order(5, 100).tolist() == seeded_order(5, None).tolist()
    assert full[:100].mean() == pytest.approx(500, abs=100)
