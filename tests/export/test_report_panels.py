"""Pictures for the page: what they hold, how large they are, and that they are embedded with their words."""

import io

import numpy as np
import pytest
from PIL import Image

from export.report import write_report
from export.reporting import panels
from export.reporting.panels import Panel, depth_panel, encoded, retrieval_panel, segmentation_panel
from tests.export.test_report import Page, believable_rows

SIDE, GAP, HEAD = panels.SIDE, panels.GAP, panels.HEAD


def pictures(n, seed=0):
    return [np.random.default_rng(seed + i).integers(0, 255, (40, 60, 3), np.uint8) for i in range(n)]


def opened(panel):
    return np.asarray(Image.open(io.BytesIO(panel.image)).convert("RGB"), int)


def middle(picture, row, column, left=0):
    y, x = HEAD + row * (SIDE + GAP), left + column * (SIDE + GAP)
    return picture[y + SIDE // 2 - 4 : y + SIDE // 2 + 4, x + SIDE // 2 - 4 : x + SIDE // 2 + 4].mean((0, 1))


def test_segmentation_has_columns_of_models_and_counts_agreement():
    truth = [np.zeros((40, 60), int), np.ones((40, 60), int)]
    truth[1][:, :30] = 255
    half = [np.zeros((40, 60), int), np.zeros((20, 30), int)]
    panel = segmentation_panel("Roads", pictures(2), truth, {"teacher": truth, "INT8": half}, ["road", "sky"])
    picture = opened(panel)
    assert picture.shape[1] == 4 * (SIDE + GAP) - GAP
    assert np.abs(middle(picture, 0, 1) - panels.CLASS_COLOURS[0]).max() < 12
    assert np.abs(middle(picture, 1, 3) - panels.CLASS_COLOURS[0]).max() < 12
    assert "teacher 100 %, INT8 67 %" in panel.alt  # 2400 of 2400 + 0 of 1200
    assert "road, sky" in panel.alt
    assert panel.caption == "Columns: picture, truth, teacher, INT8."


def test_depth_shares_one_scale_and_greys_what_is_unknown():
    truth = [np.linspace(1, 5, 2400).reshape(40, 60)]
    near, far = np.full((40, 60), 1.0), np.full((40, 60), 9.0)
    panel = depth_panel("Depth", pictures(1), truth, {"near": [near], "far": [far], "none": [np.full((4, 6), np.nan)]})
    picture = opened(panel)
    brightness = [middle(picture, 0, c).mean() for c in (2, 3)]
    assert brightness[0] < 60
    assert brightness[1] > 170
    assert np.abs(middle(picture, 0, 4) - panels.IGNORED_COLOUR).max() < 12
    assert "dark is near (1.0 m)" in panel.alt
    with pytest.raises(ValueError, match="no pixel"):
        depth_panel("Depth", pictures(1), [np.zeros((4, 4))], {"a": [near]})


def test_retrieval_marks_right_and_wrong_by_shape_too():
    grey = np.full((40, 40, 3), 128, np.uint8)
    panel = retrieval_panel("Cups", [grey], {"teacher": [[grey, grey]]}, {"teacher": [[True, False]]})
    picture = opened(panel)
    left = picture.shape[1] - (3 * (SIDE + GAP) - GAP)
    corners = [
        picture[HEAD + 3 : HEAD + 32, left + c * (SIDE + GAP) + SIDE - 32 : left + c * (SIDE + GAP) + SIDE - 3] for c in (1, 2)
    ]
    white = [(np.abs(c - 255).max(-1) < 60) for c in corners]
    assert all(w.sum() > 20 for w in white)
    assert (white[0] != white[1]).sum() > 30  # a tick is not a cross
    assert "teacher 1 of 2 right" in panel.alt


def test_no_picture_is_larger_than_allowed():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (1500, 1500, 3), np.uint8))
    small = encoded(noise)
    assert len(small) <= panels.MOST_BYTES
    assert Panel("x", small, "", "").mime == "image/webp"


def test_the_page_embeds_pictures_with_their_words(tmp_path):
    truth = [np.zeros((4, 4), int)]
    one = segmentation_panel("Roads <b>", pictures(1), truth, {"teacher": truth}, ["road"])
    text = write_report(tmp_path, tmp_path / "report", believable_rows(), pictures=[one]).read_text()
    image = next(a for a in Page(text).all("img") if a["src"].startswith("data:image/webp"))
    assert image["alt"] == one.alt
    assert (int(image["width"]), int(image["height"])) == one.size
    assert "Roads &lt;b&gt;" in text
    with pytest.raises(ValueError, match="unique"):
        write_report(tmp_path, tmp_path / "report", [], pictures=[one, one])
    with pytest.raises(ValueError, match="no PNG"):
        write_report(tmp_path, tmp_path / "report", [], pictures=[Panel("x", b"GIF89a", "", "")])
