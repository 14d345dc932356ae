"""What Gradio has no component for: pictures with texts for those who cannot see them, spoken lines, a table; and the style."""

import base64
import html
import io

from PIL import Image

from export.demo.views import Figure

CSS = """
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(240px, 100%), 1fr)); gap: 16px; }
.figures.small { grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); }
.figures figure { margin: 0; min-width: 0; }
.figures img { width: 100%; height: auto; display: block; border-radius: 4px; }
.figures.small img { aspect-ratio: 1; object-fit: cover; }
.figures figcaption { margin-top: 6px; }
.figures figcaption, .said { color: var(--body-text-color); font-size: 0.95rem; line-height: 1.4; overflow-wrap: anywhere; }
.said { color: var(--body-text-color); font-size: 0.95rem; line-height: 1.4; overflow-wrap: anywhere; }
.said { margin: 0 0 8px; min-height: 1.4em; }
.problem { margin: 0; padding: 8px 12px; border-left: 4px solid #d55e00; color: var(--body-text-color);
    background: var(--background-fill-secondary); }
.scroll { overflow-x: auto; }
.scroll table { border-collapse: collapse; color: var(--body-text-color); }
.scroll td, .scroll th { padding: 4px 10px; text-align: left; border-bottom: 1px solid var(--border-color-primary); }
#picture img { cursor: crosshair; }
#examples .grid-wrap { padding-top: 26px; }
#examples .grid-container { grid-template-columns: repeat(auto-fill, minmax(92px, 1fr)) !important; }
#examples, #examples .grid-wrap { height: auto !important; min-height: 0 !important; max-height: none !important; }
.tab-container button { padding: 0 8px !important; }
.checks .form { flex-wrap: wrap; }
.checks .form > * { flex: 1 1 190px !important; min-width: min(190px, 100%) !important; }
.dark .tab-container button.selected { color: #93c5fd; }
.dark .tab-container button.selected::after { background: #93c5fd; }
footer { display: none !important; }
"""


def said(text: str) -> str:
    return f'<p class="said" role="status">{html.escape(text)}</p>' if text else ""


def said_problem(text: str) -> str:
    return f'<p class="problem" role="alert">{html.escape(text)}</p>'


def figures(shown: list[Figure], kind: str = "") -> str:
    drawn = "".join(
        f'<figure><img src="{data_url(f.image)}" alt="{html.escape(f.alt)}" width="{f.image.width}" height="{f.image.height}">'
        f"<figcaption>{html.escape(f.caption)}</figcaption></figure>"
        for f in shown
    )
    return f'<div class="figures {kind}">{drawn}</div>'


def data_url(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "WEBP", quality=90, method=2)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def table(head: tuple[str, str, str], rows: list[tuple[str, ...]]) -> str:
    top = "".join(f'<th scope="col">{html.escape(cell)}</th>' if cell else "<td></td>" for cell in head)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Comparison"><table><tr>{top}</tr>{body}</table></div>'
