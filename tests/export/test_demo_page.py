"""The demo's command and page: from a bundle without torch, what `--check` prints, bad input; slow: the page in a headless browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import backbone, pictures
from typer.testing import CliRunner

from distill.data.preprocess import Preprocess
from distill.models.checkpoints import save_model
from distill.progress import Progress
from export.builders import build_target
from export.bundle import BundleConfig, BundleInputs, build_bundle
from export.targets import ExportConfig, Images
from recipes.cli import app

IMAGES = Images(lambda n, size: pictures(32, size)[:n], lambda n, size, avoid: pictures(32, size)[:n])
QUIET = Progress("quiet")
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")


def decant(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, ["demo", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def photo(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (5, 5, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((60, 44), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder like a run's: teacher/, export/small/{onnx-fp32, onnx-int8}, small.tar.gz, photos/."""
    folder = tmp_path_factory.mktemp("demo")
    save_model(folder / "teacher", backbone(), Preprocess(32, 36, normalize="per_image"), lineage={"seed": 0})
    config, sources, artifacts = ExportConfig(resolutions=[32], max_batch=3), {}, []
    for target in ("onnx-fp32", "onnx-int8"):
        out = folder / "export" / "small" / target
        artifacts.append(build_target(target, config, "small", folder / "teacher", sources, IMAGES, out, QUIET))
        sources[target] = out
    bundle = BundleConfig(golden_images=2)
    inputs = BundleInputs("small", {}, artifacts, folder / "teacher", [photo(i) for i in range(2)], None, {})
    build_bundle(bundle, inputs, folder / "small.tar.gz", QUIET)
    (folder / "photos").mkdir()
    for i in range(4):
        photo(i).save(folder / "photos" / f"{i}.png")
    return folder


@needs_gradio
def test_check_tries_every_artifact_of_a_run(made):
    lines = decant(made, "--images", made / "photos", "--check").stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["small onnx-fp32 32 px", "small onnx-int8 32 px", "teacher (torch)"]
    assert all(" ms for this call" in line and "4 × 4 patches of width 32" in line for line in lines)
    assert list((made / "demo-index").rglob("shard-*.npz"))


@needs_gradio
def test_a_bundle_needs_no_torch(made, tmp_path):
    script = """
import sys
from contextlib import ExitStack
from pathlib import Path
from recipes.demo import find_one, make_room, try_all
from export.demo.page import build_page
with ExitStack() as stack:
    path, photos, index = map(Path, sys.argv[1:])
    room = make_room([path], find_one(path, stack), photos, index)
    build_page(room)
    print("\\n".join(try_all(room)))
    assert "torch" not in sys.modules, "torch was imported"
"""
    arguments = [made / "small.tar.gz", made / "photos", tmp_path / "index"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert not list(tmp_path.glob("decant-demo-*")), "what was unpacked is gone"


@needs_gradio
def test_bad_input_is_a_sentence(made, tmp_path):
    (tmp_path / "empty").mkdir()
    damaged = tmp_path / "small.tar.gz"
    data = bytearray((made / "small.tar.gz").read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    for arguments, code, said in (
        ([tmp_path / "none"], 2, "There is no"),
        ([tmp_path / "empty"], 2, "is no run's folder"),
        ([damaged], 1, "was refused"),
        ([made, "--images", tmp_path / "empty"], 2, "holds no image file"),
        ([made, made, made], 2, "would appear twice"),
    ):
        assert said in decant(*arguments, "--check", code=code).stderr
    run = tmp_path / "run" / "export" / "small" / "onnx-fp32"
    shutil.copytree(made / "export" / "small" / "onnx-fp32", run)
    value = json.loads((run / "artifact.json").read_text())
    (run / "artifact.json").write_text(json.dumps({**value, "runtime": "tensorrt_rtx", "compute_capabilities": ["1.0"]}))
    assert "Nothing can run on this machine" in decant(tmp_path / "run", "--check", code=3).stderr


def test_without_gradio_it_says_what_to_install(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'decant-vision[demo]'" in decant(made, "--check", code=3).stderr


# --- in a browser ---


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def address(made):
    """The page of the run, served by another process as a user does."""
    command = [sys.executable, "-m", "recipes.cli", "demo", str(made), "--images", str(made / "photos"), "--no-browser"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield server.stdout.readline().split()[1]
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
@needs_gradio
def test_the_page(made, address, browser, tmp_path):
    from playwright.sync_api import expect

    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#pca img")
    first = page.locator("#pca img").last.get_attribute("src")

    photo(9).save(tmp_path / "mine.png")
    page.set_input_files("input[type=file]", tmp_path / "mine.png")
    page.wait_for_function("before => [...document.querySelectorAll('#pca img')].at(-1)?.src !== before", arg=first)

    page.get_by_role("tab", name="Patch").click()
    page.wait_for_selector("#heat img")
    changed = "before => document.querySelector('#heat img').src !== before"
    before = page.locator("#heat img").get_attribute("src")
    page.locator("#picture img").click(position={"x": 20, "y": 60})
    page.wait_for_function(changed, arg=before)
    expect(page.locator("#column input")).to_have_value("1")

    before = page.locator("#heat img").get_attribute("src")
    page.locator("#row input").fill("4")
    page.locator("#column input").fill("3")
    page.locator("#use").press("Enter")
    page.wait_for_function(changed, arg=before)
    expect(page.locator("#picture img")).to_have_attribute("alt", re.compile("row 4, column 3 wanted"))
    page.locator("#row input").fill("99")
    page.locator("#use").press("Enter")
    page.wait_for_selector("text=Rows go from 1 to 4")

    page.get_by_label("small onnx-int8 32 px").check()
    page.wait_for_function("document.querySelector('#latency').innerText.includes('small onnx-int8 32 px:')")
    assert " ms for this call" in page.locator("#latency").inner_text()

    page.get_by_role("tab", name="Similar").click()
    page.locator("#find").click()
    page.wait_for_selector("#similar img")
    assert page.locator("#similar img").count() == 4
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare").click()
    page.wait_for_selector("#comparison table")
    assert "Cosine of the CLS features 0.9" in page.locator("#comparison").inner_text()

    (tmp_path / "broken.png").write_bytes(b"nothing")
    page.locator("button[aria-label='Clear'], button[aria-label='Remove this file']").first.click()
    page.set_input_files("input[type=file]", tmp_path / "broken.png")
    page.wait_for_selector("text=broken.png cannot be shown")
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    page.set_viewport_size({"width": 400, "height": 800})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
