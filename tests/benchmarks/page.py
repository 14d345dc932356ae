"""A page in a real browser: its size, how long it takes to open, what axe finds, and pictures of it.

    python tests/benchmarks/page.py runs/quickstart/report/index.html --out pictures

Takes a file or a URL. Needs playwright, axe-playwright-python (for its axe.min.js) and a Chromium on the PATH. The page is
opened at 400 and 1280 px, light and dark, and printed to page.pdf. Load times are of this machine; say which.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

WIDTHS, SCHEMES = (400, 1280), ("light", "dark")
FLAGS = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-quic", "--no-first-run"]


def chromium() -> str | None:
    return next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


def axe_script() -> str | None:
    """The text of axe.min.js; None where the package is absent."""
    found = find_spec("axe_playwright_python")
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0]) / "axe.min.js"
    return path.read_text(encoding="utf-8") if path.exists() else None


@contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        opened = p.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield opened
        opened.close()


def open_page(opened: Any, url: str, width: int, scheme: str, script: bool = True) -> Any:
    context = opened.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script, bypass_csp=True
    )
    page = context.new_page()
    page.goto(url)
    return page


def findings(page: Any, axe: str) -> list[dict[str, Any]]:
    """axe's violations: id, impact, help, and the elements (as selectors). Folded parts are opened, so that axe sees them."""
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    page.evaluate(axe)
    result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        {"id": v["id"], "impact": v["impact"], "help": v["help"], "nodes": [n["target"] for n in v["nodes"]]}
        for v in result["violations"]
    ]


def load_ms(page: Any) -> dict[str, float]:
    """Milliseconds from the start of navigation: the document parsed, loaded, and the first paint."""
    timing = page.evaluate(
        "(() => { const n = performance.getEntriesByType('navigation')[0];"
        " const p = performance.getEntriesByName('first-contentful-paint')[0];"
        " return {parsed: n.domContentLoadedEventEnd, loaded: n.loadEventEnd, painted: p ? p.startTime : null}; })()"
    )
    return {k: round(v, 1) for k, v in timing.items() if v is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", help="an HTML file or a URL")
    parser.add_argument("--out", type=Path, help="folder for screenshots and page.pdf")
    asked = parser.parse_args()
    file = Path(asked.page)
    url = file.resolve().as_uri() if file.exists() else asked.page
    if file.exists():
        print(f"size: {file.stat().st_size / 1e6:.2f} MB")
    axe = axe_script()
    with browser() as opened:
        for width in WIDTHS:
            for scheme in SCHEMES:
                page = open_page(opened, url, width, scheme)
                page.wait_for_timeout(500)
                wide = page.evaluate("document.documentElement.scrollWidth")
                print(f"{width} px {scheme}: {json.dumps(load_ms(page))}, content {wide} px wide")
                if asked.out:
                    asked.out.mkdir(parents=True, exist_ok=True)
                    page.screenshot(path=asked.out / f"{width}-{scheme}.png", full_page=True)
                for found in findings(page, axe) if axe else []:
                    print(
                        f"  {found['impact']}: {found['id']} ({found['help']}): {len(found['nodes'])} x, {found['nodes'][:3]}"
                    )
                page.context.close()
        if asked.out:
            page = open_page(opened, url, 1280, "light")
            page.pdf(path=asked.out / "page.pdf", format="A4")
            page.context.close()
    if not axe:
        print("axe: not run, as axe-playwright-python is not installed")


if __name__ == "__main__":
    main()
