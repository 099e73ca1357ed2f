"""Jobs of a model: one at a time, counted step by step, cancelled by who asked for them, with clear errors."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock
from typing import Any

import gradio as gr
import torch
from torch import nn

from visionfuse.info import default_device, default_dtype

log = logging.getLogger("visionfuse.demo")
MODEL = "model"  # Gradio's concurrency_id of everything that runs a model


class Cancelled(Exception):
    """Raised inside a job whose visitor does not want it any more."""


class Jobs:
    """Of all visitors. A model is changed while a recipe is on, so that no two may run at a time."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._wanted: dict[str, Event] = {}

    @contextmanager
    def job(self, session: str | None) -> Iterator[Callable[[], None]]:
        """Waits for its turn and gives a function that raises `Cancelled` once the job is cancelled."""
        cancelled = Event()
        key = session or ""
        self._wanted[key] = cancelled

        def check() -> None:
            if cancelled.is_set():
                raise Cancelled

        try:
            with self._lock:
                check()
                yield check
        finally:
            if self._wanted.get(key) is cancelled:
                del self._wanted[key]

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        return bool(self._wanted)

    def cancel(self, session: str | None) -> bool:
        """Ends the job of that visitor before its next step; whether there was one."""
        found = self._wanted.get(session or "")
        if found is not None:
            found.set()
        return found is not None


class Loaded:
    """The model in memory: one, the last that was asked for."""

    def __init__(self, read: Callable[[str], Any]) -> None:
        self._read, self._name, self._model = read, "", None

    def __call__(self, name: str) -> Any:
        if name != self._name:
            self._name, self._model = "", None
            gc.collect()  # pipelines are cyclic
            self._model = self._read(name)
            self._name = name
        return self._model


def read_pipeline(name: str) -> Any:
    """A diffusers pipeline on this machine's device, from safetensors alone."""
    from diffusers import DiffusionPipeline

    device = default_device()
    pipe = DiffusionPipeline.from_pretrained(
        name, dtype=default_dtype(device), use_safetensors=True, trust_remote_code=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@contextmanager
def before_forwards(model: nn.Module, call: Callable[[], None]) -> Iterator[None]:
    """`call` runs before every forward of a denoiser; what it raises ends the run."""
    hook = model.register_forward_pre_hook(lambda *_: call())
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def user_errors() -> Iterator[None]:
    """What a visitor can put right is shown as it is; anything else is logged here and told without details."""
    try:
        yield
    except Cancelled:
        raise gr.Error("Cancelled.", title="Cancelled", duration=5, print_exception=False) from None
    except gr.Error:
        raise
    except (ValueError, NotImplementedError, FloatingPointError) as error:
        raise gr.Error(
            str(error), title="That does not work", duration=None, print_exception=False
        ) from None
    except torch.OutOfMemoryError:
        raise gr.Error(
            "The device has no memory left for this. Choose a smaller picture.",
            duration=None,
            print_exception=False,
        ) from None
    except Exception as error:
        log.exception("A job failed")
        raise gr.Error(
            "Something went wrong on the server, not with your input. Its log says what.", duration=None,
            print_exception=False,
        ) from error  # fmt: skip


def within(name: str, value: float, least: float, most: float) -> None:
    """Raises ValueError outside of these limits: a page can be by-passed."""
    if not least <= value <= most:
        raise ValueError(f"{name} may be {least:g} to {most:g} here, got {value:g}.")
