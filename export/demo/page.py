"""The page: layout and wiring. What a control does is in views.py."""

import html
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from distill.errors import DecantError
from export.demo import views
from export.demo.heads import DenseHead
from export.demo.markup import figures, said, said_problem, table
from export.demo.models import Look
from export.demo.server import load_gradio
from export.demo.sources import Models
from export.demo.views import Figure, Point

CLICKS = {"chooses this patch alone": "anew", "adds a wanted patch": "add", "adds an unwanted patch": "exclude"}


@dataclass(frozen=True)
class Room:
    """What the page has to show: models, images to begin with, the folder to search in, heads."""

    title: str
    models: Models
    examples: list[tuple[Image.Image, str]]
    folder: Path | None = None
    index: Path | None = None
    heads: list[DenseHead] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Seen:
    """One visitor's image: `name` of the model that looked at it, and the chosen patches."""

    image: Image.Image | None = None
    name: str = ""
    look: Look | None = None
    points: tuple[Point, ...] = ()


def build_page(room: Room) -> Any:
    """The page as gradio.Blocks, not yet served."""
    gr = load_gradio()
    names = room.models.names()
    with gr.Blocks(title=room.title, analytics_enabled=False) as page:
        seen = gr.State(Seen())
        gr.Markdown(f"# {html.escape(room.title)}\nChoose an image and a model; click a patch to see what is like it.")
        problem = gr.HTML()
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                upload = gr.File(label="Upload an image", file_types=["image"], type="filepath", height=150)
                gallery = gr.Gallery(
                    value=room.examples, label="Or choose one of these", columns=4, height="auto", allow_preview=False,
                    buttons=[], interactive=False, object_fit="cover", elem_id="examples",
                )  # fmt: skip
                model = gr.Radio(names, value=names[0], label="Model", elem_id="model")
                latency = gr.HTML(elem_id="latency")
                for note in room.notes:
                    gr.HTML(f'<p class="said">{html.escape(note)}</p>')
            with gr.Column(scale=5, min_width=300), gr.Tabs():
                pca = pca_tab(gr, seen)
                points = similarity_tab(gr, seen, problem)
                dense = dense_tab(gr, room, seen)
                similar_tab(gr, room, seen, problem)
                compare_tab(gr, room, seen, problem)

        looked = [seen, latency, problem]

        def choose(state: Seen, name: str, image: Image.Image | None, first: bool = False) -> list[Any]:
            """Look at an image by a model; the patch in the middle is chosen where none is."""
            image = image or state.image
            if image is None:
                return [state, "", said_problem("Choose an image first.")]
            used = room.models[name]
            look = used.look(image)
            h, w = look.grid
            kept = state.look is not None and state.look.grid == look.grid and not first
            now = Seen(image, name, look, state.points if kept else ((h // 2, w // 2, True),))
            return [now, said(views.timing(used, look)), ""]

        def uploaded(state: Seen, name: str, path: str | None) -> list[Any]:
            return choose(state, name, views.read_image(Path(path)) if path else None, first=path is not None)

        def picked(state: Seen, name: str, chosen: gr.SelectData) -> list[Any]:  # type: ignore[name-defined]
            return choose(state, name, room.examples[chosen.index][0], first=True)

        refresh = [pca, points, dense]
        inputs = [seen, model]
        page.load(
            guarded(lambda s, m: choose(s, m, room.examples[0][0], True), looked), inputs, looked, api_visibility="private"
        ).then(**refresh[0]).then(**refresh[1]).then(**refresh[2])
        for event, handler, given in (
            (upload.upload, uploaded, [*inputs, upload]),
            (gallery.select, picked, inputs),
            (model.change, lambda s, m: choose(s, m, None), inputs),
        ):
            step = event(guarded(handler, looked), given, looked, api_visibility="private")
            for more in refresh:
                step = step.then(**more)
    return page


def pca_tab(gr: Any, seen: Any) -> dict[str, Any]:
    """Principal components -> the event that draws them."""
    with gr.Tab("PCA"):
        shown = gr.HTML(elem_id="pca")
        component = gr.Radio(list(views.COMPONENTS), value=next(iter(views.COMPONENTS)), label="Components")
        with gr.Row(elem_classes="checks"):
            foreground = gr.Checkbox(
                False, label="Foreground only", min_width=190, info="Cut at the first component, components of the rest"
            )
            swap = gr.Checkbox(False, label="Swap foreground and background", min_width=190)
            smooth = gr.Checkbox(False, label="Smooth between patches", min_width=190, elem_id="pca-smooth")
    controls = [component, foreground, swap, smooth]
    draw = {
        "fn": lambda state, *values: (
            figures([views.input_view(state.look), views.pca_view(state.look, *values)]) if state.look else ""
        ),
        "inputs": [seen, *controls],
        "outputs": [shown],
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    for control in controls:
        control.input(**draw)
    return draw


def similarity_tab(gr: Any, seen: Any, problem: Any) -> dict[str, Any]:
    """Click, heat map and mask -> the event that draws them."""
    with gr.Tab("Patch"):
        click = gr.Radio(list(CLICKS), value=next(iter(CLICKS)), label="A click (or the button)")
        with gr.Row():
            picture = gr.Image(
                label="Click a patch",
                interactive=False,
                buttons=[],
                elem_id="picture",
                min_width=220,
                type="pil",
                format="png",
                alt_text="The image",
            )
            with gr.Column(min_width=220):
                heat = gr.HTML(elem_id="heat")
            with gr.Column(min_width=220):
                mask = gr.HTML(elem_id="mask")
        with gr.Row():
            row = gr.Number(1, label="Row", precision=0, minimum=1, elem_id="row", min_width=80)
            column = gr.Number(1, label="Column", precision=0, minimum=1, elem_id="column", min_width=80)
            use = gr.Button("Choose this patch", elem_id="use", min_width=140)
            clear = gr.Button("Forget all", min_width=140)
        with gr.Row(elem_classes="checks"):
            otsu = gr.Checkbox(True, label="Threshold by Otsu", min_width=190, elem_id="otsu")
            connected = gr.Checkbox(False, label="Only what hangs together with the patch", min_width=190, elem_id="connected")
            smooth = gr.Checkbox(True, label="Smooth between patches", min_width=190)
        threshold = gr.Slider(-1, 1, 0.5, step=0.01, label="Threshold (cosine)", elem_id="threshold")
    outputs = [picture, heat, mask, threshold, row, column]

    def draw(state: Seen, by_otsu: bool, cut: float, connected: bool, smooth: bool) -> list[Any]:
        if state.look is None:
            return [gr.skip()] * 6
        source = views.source_view(state.look, state.points)
        shown = gr.Image(source.image, alt_text=source.alt)
        try:
            warm = views.similarity_view(state.look, state.points, smooth)
            cool, used = views.mask_view(state.look, state.points, None if by_otsu else cut, connected, smooth)
        except DecantError as e:
            return [shown, said(str(e)), "", *[gr.skip()] * 3]
        last = state.points[-1]
        return [shown, figures([warm]), figures([cool]), round(used, 2), last[0] + 1, last[1] + 1]

    def choose(state: Seen, how: str, row: int, column: int) -> Seen:
        return replace(state, points=tuple(views.with_point(state.points, row, column, CLICKS[how])))

    def clicked(state: Seen, how: str, event: gr.SelectData) -> list[Any]:
        assert state.look is not None
        row, column = views.patch_at(state.look, *event.index)
        return [choose(state, how, row, column), ""]

    def typed(state: Seen, how: str, row: int | None, column: int | None) -> list[Any]:
        if state.look is None:
            return [state, ""]
        h, w = state.look.grid
        if row is None or column is None or not (1 <= row <= h and 1 <= column <= w):
            return [state, said_problem(f"Rows go from 1 to {h} and columns from 1 to {w}.")]
        return [choose(state, how, row - 1, column - 1), ""]

    redraw = {
        "fn": draw,
        "inputs": [seen, otsu, threshold, connected, smooth],
        "outputs": outputs,
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    picture.select(clicked, [seen, click], [seen, problem], **quiet).then(**redraw)
    use.click(typed, [seen, click, row, column], [seen, problem], **quiet).then(**redraw)
    clear.click(lambda state: replace(state, points=()), [seen], [seen], **quiet).then(**redraw)
    threshold.release(lambda: False, None, [otsu], **quiet).then(**redraw)
    for control in (otsu, connected, smooth):
        control.input(**redraw)
    return redraw


def dense_tab(gr: Any, room: Room, seen: Any) -> dict[str, Any]:
    """Segmentation and depth -> the event that draws them."""

    def draw(state: Seen) -> str:
        if not room.heads:
            return said(
                "No trained head for segmentation or depth lies here (heads/ or evaluate/tasks/ of a run), so there is nothing to show."
            )
        if state.look is None:
            return ""
        drawn, missing = [], []
        for head in (h for h in room.heads if h.reads(state.name)):
            try:
                figure = views.dense_view(state.look, head)
                drawn.append(replace(figure, caption=f"{head.name}. {figure.caption}"))
            except DecantError as e:
                missing.append(said(str(e)))
        if not drawn and not missing:
            return said(f"No head here was trained on the features of {state.name}.")
        return figures(drawn) + "".join(missing)

    with gr.Tab("Maps"):
        shown = gr.HTML(draw(Seen()), elem_id="dense")
    return {"fn": draw, "inputs": [seen], "outputs": [shown], "show_progress": "hidden", "api_visibility": "private"}


def similar_tab(gr: Any, room: Room, seen: Any, problem: Any) -> None:
    with gr.Tab("Similar"):
        count = gr.Slider(1, 30, 10, step=1, label="How many")
        find = gr.Button("Find similar images", elem_id="find")
        shown = gr.HTML(elem_id="similar")

    def search(state: Seen, count: int, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008  how gradio passes it
        if state.look is None:
            return ["", said_problem("Choose an image first.")]

        def tell(done: int, total: int) -> None:
            progress((done, total), desc="indexing the folder", unit="images")

        found, line = views.similar_view(room.folder, room.index, room.models[state.name], state.look, int(count), tell)
        drawn = [Figure(image, caption, caption) for image, caption in found]
        return [said(line) + figures(drawn, "small"), ""]

    outputs = [shown, problem]
    find.click(guarded(search, outputs), [seen, count], outputs, api_visibility="private")


def compare_tab(gr: Any, room: Room, seen: Any, problem: Any) -> None:
    names = room.models.names()
    with gr.Tab("Compare"):
        with gr.Row():
            first = gr.Dropdown(names, value=names[0], label="First model", min_width=240)
            second = gr.Dropdown(names, value=names[min(1, len(names) - 1)], label="Second model", min_width=240)
        with gr.Row(elem_classes="checks"):
            component = gr.Dropdown(
                list(views.COMPONENTS), value=next(iter(views.COMPONENTS)), label="Components", min_width=150
            )
            foreground = gr.Checkbox(False, label="Foreground only", min_width=190)
            smooth = gr.Checkbox(False, label="Smooth between patches", min_width=190)
        go = gr.Button("Compare", elem_id="compare")
        shown = gr.HTML(elem_id="comparison")

    def compare(state: Seen, a: str, b: str, component: str, foreground: bool, smooth: bool) -> list[Any]:
        if state.image is None:
            return ["", said_problem("Choose an image first.")]
        drawn, line, rows = views.compare_view(state.image, room.models[a], room.models[b], component, foreground, smooth)
        return [said(line) + figures(drawn) + table(("", a, b), rows), ""]

    outputs = [shown, problem]
    controls = [seen, first, second, component, foreground, smooth]
    go.click(guarded(compare, outputs), controls, outputs, api_visibility="private")


def guarded(handler: Callable[..., list[Any]], outputs: list[Any]) -> Callable[..., list[Any]]:
    """The handler, but what a user got wrong becomes a sentence in `problem`, the last of the outputs; the others stay as they are."""
    import functools

    gr = load_gradio()

    @functools.wraps(handler)
    def call(*values: Any, **more: Any) -> list[Any]:
        try:
            return handler(*values, **more)
        except DecantError as e:
            return [*[gr.skip()] * (len(outputs) - 1), said_problem(str(e))]

    return call
