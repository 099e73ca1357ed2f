"""`visionfuse demo`: the options. What they import, they import when they run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer


def demo(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders, or names on the Hugging Face Hub: text-to-image, Wan, or what timm saved. Default: the shipped ones."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; 0.0.0.0 opens it to the network.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Default: the first free one from 7860 on.", min=1, max=65535)
    ] = None,
    max_side: Annotated[int, typer.Option(help="Most pixels a side of a picture.", min=128)] = 512,
    max_steps: Annotated[int, typer.Option(help="Most denoising steps.", min=1)] = 30,
    max_frames: Annotated[int, typer.Option(help="Most frames of a video.", min=1)] = 33,
    queue: Annotated[int, typer.Option(help="Visitors that may wait.", min=1)] = 16,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the models, and say what would be served.")
    ] = False,
) -> None:
    """Open the app: pictures, videos, classification and an explorer, stock and accelerated side by side."""
    from visionfuse.cli import console, user_errors

    with user_errors():
        _stay_offline(models or [])
        if find_spec("gradio") is None:
            raise ImportError('The app needs Gradio: pip install "visionfuse[demo]"')
        from .settings import Settings

        settings = Settings.of(
            models or (), max_side=max_side, max_steps=max_steps, max_frames=max_frames, queue=queue
        )
        for kind, found in settings.models.items():
            console.print(f"{kind}: {', '.join(found)}", highlight=False, soft_wrap=True)
        if dry_run:
            return
        from .app import build, launch

        app = build(settings)
        address = launch(app, settings, host=host, port=port, prevent_thread_lock=True)
        console.print(f"Open {address} (Ctrl+C ends it)", highlight=False, soft_wrap=True)
        app.block_thread()


def _stay_offline(models: list[str]) -> None:
    """Where all models are folders nothing needs the network; libraries ask for updates otherwise."""
    import os

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    if all(Path(model).is_dir() for model in models):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
