"""`decant demo`: find the models, check and unpack bundles, build the page, serve it or try everything once."""

import tempfile
from contextlib import ExitStack
from pathlib import Path

import typer

from distill.errors import UserError
from export.bundling.verify import unpack
from export.demo import views
from export.demo.heads import DenseHead, load_head
from export.demo.index import files_of
from export.demo.page import Room, build_page
from export.demo.server import load_gradio, serve
from export.demo.sources import Found, Models, find, joined


def show(
    paths: list[Path], images: Path | None, index: Path | None, host: str, port: int | None, browser: bool, check: bool
) -> None:
    """Serve the page until Ctrl-C; with `check` try every view of every model once, print a line for each, and return.

    Raises:
        UserError: a path is nothing that can be shown, or there are no images to search in.
        GateFailed: a bundle is damaged.
        EnvironmentFailed: gradio is missing, nothing can run here, or the port is taken.
    """
    load_gradio()
    with ExitStack() as stack:
        found = joined(paths, [find_one(path, stack) for path in paths])
        room = make_room(paths, found, images, index)
        page = build_page(room)
        if check:
            for line in try_all(room):
                typer.echo(line)
            return
        serve(page, host, port, browser)


def find_one(path: Path, stack: ExitStack) -> Found:
    """What lies at a path; a bundle is verified while it is unpacked, into a folder that goes away with `stack`."""
    if not path.is_file():
        return find(path)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="decant-demo-")))
    unpack(path, folder)
    return find(path, unpacked=folder)


def make_room(paths: list[Path], found: Found, images: Path | None, index: Path | None) -> Room:
    """Everything that the page shows; models that cannot run here and heads that cannot be read become notes."""
    if images is not None:
        files_of(images)
    models = Models(found.choices)
    models.try_all()
    notes = [f"{name} cannot run here: {reason}." for name, reason in models.reasons.items()]
    heads: list[DenseHead] = []
    for path in found.heads:
        try:
            heads.append(load_head(path))
        except UserError as e:
            notes.append(str(e))
    title = f"Decant: {', '.join(path.resolve().name for path in paths)}"
    return Room(title, models, views.examples(images, found.examples), images, index or found.index, heads, notes)


def try_all(room: Room) -> list[str]:
    """Every view by every model on the first example -> a line each, those that cannot run here included."""
    image = room.examples[0][0]
    components = next(iter(views.COMPONENTS))
    names = room.models.names()
    lines = []
    for i, name in enumerate(names):
        model = room.models[name]
        look = model.look(image)
        points = [(0, 0, False), (look.grid[0] // 2, look.grid[1] // 2, True)]
        views.source_view(look, points)
        for foreground in (False, True):
            views.pca_view(look, components, foreground, swap=False, smooth=True)
        views.similarity_view(look, points, smooth=True)
        views.mask_view(look, points, None, connected=True, smooth=True)
        for head in (h for h in room.heads if h.reads(name)):
            try:
                views.dense_view(look, head)
            except UserError as e:
                lines.append(str(e))
        if room.folder is not None and i == 0:  # the index of a large folder takes long: once is proof enough
            views.similar_view(room.folder, room.index, model, look, 3, lambda done, total: None)
        views.compare_view(image, room.models[names[0]], model, components, foreground=False, smooth=True)
        lines.append(views.timing(model, model.look(image)))
    return lines + [f"{name} cannot run here: {reason}." for name, reason in room.models.reasons.items()]
