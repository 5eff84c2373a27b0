"""The page on a server of its own: what it may give away, and what a browser may fetch for it."""

import argparse
import os
from contextlib import suppress
from pathlib import Path
from threading import Event

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # read where they are imported

import gradio as gr
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from demo.device import Device
from demo.inputs import LARGEST_UPLOAD
from demo.page import build_page

STYLE = Path(__file__).parent / "page.css"
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Headers:
    """Middleware: a page of this server fetches from nowhere else, whatever stands in it."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)


def theme() -> gr.themes.Base:
    sans, mono = ["ui-sans-serif", "system-ui", "sans-serif"], ["ui-monospace", "Consolas", "monospace"]
    return gr.themes.Base(primary_hue="teal", neutral_hue="slate", radius_size="lg", font=sans, font_mono=mono)


def serve(args: argparse.Namespace, folder: Path) -> None:
    """Load the checkpoint and serve the page until the process is told to end; its files go into `folder`.

    Raises ValueError for a checkpoint that cannot be loaded, and OSError for a port in use.
    """
    device = Device(args, folder)
    page = build_page(device)
    page.launch(
        server_name=args.host,
        server_port=args.port,
        share=args.share == "on",
        prevent_thread_lock=True,
        quiet=True,
        max_file_size=LARGEST_UPLOAD,
        footer_links=["api"],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        app_kwargs={"middleware": [Middleware(Headers)]},
        theme=theme(),
        css_paths=STYLE,
    )
    print(f"the page: {page.share_url or page.local_url}", flush=True)
    try:
        with suppress(KeyboardInterrupt):
            Event().wait()
    finally:
        device.close()
        page.close(verbose=False)
