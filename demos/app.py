"""The page: its tabs, how it looks, and how it is served."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

from . import jobs
from .classify import MOST_SIDE, classify_tab, read_classifier
from .explorer import explorer_tab
from .image import image_tab
from .settings import Settings
from .video import video_tab

TITLE = "visionfuse"
INTRO = """# visionfuse
Attention between tokens that hardly matter to one another costs most of the time. Here you see what it brings to leave it
out, or to compute it in fewer bits, and what it costs.
"""
# Fonts of the visitor's machine: a page that asks no other host for anything.
FONTS = ("system-ui", "sans-serif")
MONO = ("ui-monospace", "monospace")
CSS = """
.vf-status { font-size: 1.05rem; line-height: 1.5; margin: 0.25rem 0; }
#image-status, #video-status { scroll-margin-top: 9rem; } /* the buttons above stay in view */
.vf-figures { width: 100%; border-collapse: collapse; }
.vf-figures, .vf-figures * { border: 0 !important; }
.vf-figures td { white-space: nowrap; }
.vf-figures caption { text-align: left; font-weight: 600; padding: 0.25rem 0; }
.vf-figures th, .vf-figures td { text-align: right; padding: 0.2rem 0.5rem;
  border-bottom: 1px solid var(--border-color-primary) !important; }
.vf-figures th[scope=row] { text-align: left; font-weight: 400; }
.vf-heading { font-size: 1rem; font-weight: 600; margin: 0; }
.vf-legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; margin: 0.25rem 0 0.75rem; padding: 0; }
.vf-legend span { display: inline-block; width: 1em; height: 1em; margin-right: 0.4em; vertical-align: -0.15em; }
footer { display: none !important; }
@media (max-width: 640px) {
  .gradio-container { padding: 0.5rem !important; }
  .tab-container button { padding: 0 0.5rem !important; font-size: 0.9rem !important; } /* all four beside one another */
  .vf-figures th, .vf-figures td { padding: 0.2rem 0.25rem; font-size: 0.85rem; }
}
"""


def build(settings: Settings) -> gr.Blocks:
    """The app, not yet served. A tab is there for every kind of model that the settings name."""
    running = jobs.Jobs()
    load = jobs.Loaded(jobs.read_pipeline)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown(INTRO)
        with gr.Tabs():
            if "image" in settings.models:
                with gr.Tab("Picture", id="image"):
                    image_tab(settings, running, load)
            if "video" in settings.models:
                with gr.Tab("Video", id="video"):
                    video_tab(settings, running, load)
            if "classifier" in settings.models:
                with gr.Tab("Classification", id="classify"):
                    classify_tab(app, settings, running, jobs.Loaded(read_classifier))
            with gr.Tab("Explorer", id="explorer"):
                explorer_tab(app, settings)

        def left(request: gr.Request) -> None:
            running.cancel(request.session_hash)

        app.unload(left)
    return app.queue(max_size=settings.queue, default_concurrency_limit=2)


def launch(
    app: gr.Blocks,
    settings: Settings,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    **options: Any,
) -> str:
    """Serves the app and returns its address. host: "0.0.0.0" opens it to the network. options: of Gradio's launch,
    such as prevent_thread_lock, auth and root_path."""
    Image.MAX_IMAGE_PIXELS = MOST_SIDE**2  # of uploads, which Gradio decodes
    _, address, _ = app.launch(
        server_name=host, server_port=port, share=False, ssr_mode=False, pwa=False, mcp_server=False,
        enable_monitoring=False, show_error=True, quiet=True, footer_links=[], allowed_paths=[],
        max_file_size=settings.max_upload, strict_cors=True,
        theme=_theme(), css=CSS, **options,
    )  # fmt: skip
    return address


def _theme() -> gr.themes.Base:
    """Gradio's own, in fonts of this machine and with small print that has enough contrast to be read."""
    return gr.themes.Default(font=FONTS, font_mono=MONO).set(
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        color_accent="*primary_700",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
        block_title_text_color="*neutral_800", block_title_text_color_dark="*neutral_100",
        block_label_text_color="*neutral_700", block_label_text_color_dark="*neutral_200",
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
        button_primary_text_color="white", button_cancel_background_fill="*neutral_200",
        button_cancel_text_color="*neutral_900",
    )  # fmt: skip
