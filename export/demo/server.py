"""Gradio, kept at home: system fonts, no analytics, and a Content-Security-Policy that lets the browser fetch nothing from elsewhere."""

import os
from typing import Any

from distill.errors import EnvironmentFailed
from export.demo.markup import CSS

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-ancestors 'self'; object-src 'none'; base-uri 'self'; form-action 'self'"
)


def load_gradio() -> Any:
    """Raises: EnvironmentFailed: it is not installed."""
    try:
        import gradio
    except ImportError as e:
        raise EnvironmentFailed(f"The page needs gradio ({e}); pip install 'decant-vision[demo]'.") from e
    return gradio


class SameOrigin:
    """ASGI middleware: every answer tells the browser to fetch nothing from elsewhere."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)


def theme(gr: Any) -> Any:
    """System fonts, and greys and a blue that reach 4.5 to 1 on their grounds."""
    base = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return base.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        color_accent="*primary_600",
        slider_color="*primary_600",
        checkbox_border_color="*neutral_500",
        checkbox_border_color_dark="*neutral_400",
    )


def serve(page: Any, host: str, port: int | None, browser: bool, block: bool = True) -> str:
    """Serve the page until Ctrl-C, or return its address at once without `block`.

    Raises:
        EnvironmentFailed: the port is taken.
    """
    gr = load_gradio()
    from starlette.middleware import Middleware

    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=browser,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            pwa=False,
            run_history=False,
            footer_links=[],
            max_file_size="100mb",
            theme=theme(gr),
            css=CSS,
            app_kwargs={"middleware": [Middleware(SameOrigin)]},
        )
    except OSError as e:
        raise EnvironmentFailed(f"The page cannot be served at {host}, port {port or 'any'} ({e}); name another --port.") from e
    if block:
        print(f"Demo: {url} (Ctrl-C ends it)", flush=True)
        page.block_thread()
    return url
