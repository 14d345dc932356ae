"""The one preprocessing: sizes, modes, normalisation; and that a device needs nothing but numpy and Pillow for it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.data import preprocess
from distill.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, load_rgb, normalize, to_rgb

LONE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("lone", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["lone"] = module
spec.loader.exec_module(module)
from PIL import Image
out = module.Preprocess(16, 18)(Image.new("RGB", (40, 30), (10, 20, 30)))
assert out.shape == (3, 16, 16), out.shape
known = set(sys.stdlib_module_names) | {"numpy", "PIL", "lone", "__main__"}
print(sorted({name.split(".")[0] for name in sys.modules} - known - before))
"""


def test_needs_nothing_but_numpy_and_pillow():
    """As a copy in a bundle: the file alone, in a process that has loaded nothing of ours."""
    script = "import sys; before = {n.split('.')[0] for n in sys.modules}\n" + LONE
    ran = subprocess.run([sys.executable, "-c", script, preprocess.__file__], capture_output=True, text=True, cwd="/")
    assert ran.returncode == 0, ran.stderr
    loaded = ran.stdout.strip()
    for package in ("torch", "distill", "pydantic", "timm"):
        assert package not in loaded
    assert set(eval(loaded)) <= {"defusedxml"}, loaded


SHAPES = [(1, 1), (1, 40), (40, 1), (33, 57), (500, 37), (16, 16), (17, 16), (18, 900)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sizes", [(16, 16), (16, 18), (15, 17), (16, 40)], ids=str)
def test_sizes(shape, sizes):
    pixels = np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 3), np.uint8)
    out = Preprocess(*sizes)(Image.fromarray(pixels))
    assert out.shape == (3, sizes[0], sizes[0])
    assert out.dtype == np.float32
    assert out.flags.c_contiguous
    assert np.isfinite(out).all()


def test_an_image_of_the_right_size_is_only_normalised():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    out = Preprocess(16, 16, normalize="none")(Image.fromarray(pixels))
    np.testing.assert_array_equal(out, pixels.transpose(2, 0, 1).astype(np.float32) / 255)


def test_the_crop_is_the_centre():
    ramp = np.tile(np.arange(100, dtype=np.uint8)[None, :, None], (20, 1, 3))
    out = Preprocess(20, 20, normalize="none")(Image.fromarray(ramp))
    np.testing.assert_array_equal(np.round(out[0, 0] * 255), np.arange(40, 60))
    out = Preprocess(20, 20, normalize="none")(Image.fromarray(ramp.transpose(1, 0, 2)))
    np.testing.assert_array_equal(np.round(out[0, :, 0] * 255), np.arange(40, 60))
    framed = np.zeros((24, 24, 3), np.uint8)
    framed[4:20, 4:20] = 255
    assert Preprocess(16, 24, normalize="none")(Image.fromarray(framed)).min() == 1


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_the_shorter_side_is_resized_with_the_aspect_kept(interpolation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
    want = image.resize((48, 32), preprocess.FILTERS[interpolation]).crop((8, 0, 40, 32))
    out = Preprocess(32, 32, interpolation, "none")(image)
    np.testing.assert_allclose(out, np.asarray(want).transpose(2, 0, 1) / 255, atol=1e-6)


def test_imagenet_normalisation():
    x = np.random.default_rng(0).random((2, 3, 4, 5), np.float32)
    want = (x - np.array(IMAGENET_MEAN)[:, None, None]) / np.array(IMAGENET_STD)[:, None, None]
    np.testing.assert_allclose(normalize(x, "imagenet"), want, rtol=1e-5, atol=1e-6)
    assert normalize(x, "imagenet").dtype == np.float32


def test_each_channel_of_each_image_by_itself():
    x = np.random.default_rng(0).random((4, 3, 20, 20), np.float32) * np.array([0.1, 0.5, 1])[:, None, None].astype(np.float32)
    out = normalize(x, "per_image")
    assert out.dtype == np.float32
    np.testing.assert_allclose(out.mean((2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(out.std((2, 3)), 1, atol=0.04)
    np.testing.assert_allclose(out[2], normalize(x[2], "per_image"), atol=1e-6)


@pytest.mark.parametrize("value", [0, 7, 128, 255])
def test_a_flat_channel_becomes_zero(value):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    pixels[..., 1] = value
    out = Preprocess(16, 16, normalize="per_image")(Image.fromarray(pixels))
    assert np.abs(out[1]).max() < 1e-3
    assert out[0].std() > 0.9


def test_unknown_normalisation():
    with pytest.raises(ValueError, match="imagenet, inception, clip, satellite, per_image, none"):
        normalize(np.zeros((3, 2, 2), np.float32), "imagnet")


def test_json_round_trip():
    p = Preprocess(48, 56, "lanczos", "per_image")
    assert Preprocess.from_json(p.to_json()) == p


def grey_of(image: Image.Image) -> np.ndarray:
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    pixels = np.asarray(rgb)
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 0] == pixels[..., 2]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    with Image.open(tmp_path / f"x.{suffix}") as image:
        got = grey_of(image).astype(int)
    assert np.abs(got - values / 257).max() <= 1
    assert np.asarray(load_rgb(tmp_path / f"x.{suffix}"))[7, 7].tolist() == [255, 255, 255]


def test_dark_sixteen_bits_stay_dark():
    assert grey_of(Image.fromarray(np.full((4, 4), 200, np.uint16))).max() == 1


def test_other_number_formats():
    assert grey_of(Image.fromarray(np.full((4, 4), 128, np.int32))).max() == 128
    assert grey_of(Image.fromarray(np.full((4, 4), 32896, np.int32))).max() == 128
    assert grey_of(Image.fromarray(np.full((4, 4), 99.6, np.float32))).max() == 100
    assert grey_of(Image.fromarray(np.full((4, 4), -3, np.float32))).max() == 0


def test_alpha_lies_over_white():
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (255, 0, 0, 128)])
    assert [to_rgb(rgba).getpixel((i, 0)) for i in range(3)] == [(255, 0, 0), (255, 255, 255), (255, 127, 127)]
    la = Image.new("LA", (2, 1))
    la.putdata([(10, 255), (10, 0)])
    assert grey_of(la).tolist() == [[10, 255]]


def test_a_transparent_palette_lies_over_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 0, 128, 255] + [0] * 762)
    image.putdata([0, 1])
    image.save(tmp_path / "x.png", transparency=0)
    pixels = np.asarray(load_rgb(tmp_path / "x.png"))
    assert pixels.tolist() == [[[255, 255, 255], [0, 128, 255]]]


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes(mode):
    red = Image.new("RGB", (6, 6), (220, 30, 30))
    if mode == "LAB":
        from PIL import ImageCms

        make = ImageCms.createProfile
        image = ImageCms.applyTransform(red, ImageCms.buildTransform(make("sRGB"), make("LAB"), "RGB", "LAB"))
    else:
        image = red.convert(mode)
    assert image is not None
    got = to_rgb(image)
    assert (got.mode, got.size) == ("RGB", (6, 6))
    if mode not in ("L", "1"):
        assert np.abs(np.asarray(got).astype(int) - np.array([220, 30, 30])).max() < 40  # a palette of 216


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_rotation_is_applied(tmp_path, orientation):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:6] = 250  # bright above
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif, quality=95)
    got = np.asarray(load_rgb(tmp_path / "x.jpg")).astype(int)
    assert got.shape[:2] == ((20, 30) if orientation in (1, 3) else (30, 20))
    bright = {1: got[:4], 3: got[-4:], 6: got[:, -4:], 8: got[:, :4]}[orientation]
    assert bright.mean() > 200
    assert got.mean() < 120


def test_missing_and_broken_files_raise_pillows_own(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        load_rgb(tmp_path / "none.png")
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(Image.UnidentifiedImageError):
        load_rgb(tmp_path / "x.png")
