"""What the app may load, and how much a visitor may ask for. Named once, at start."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["image", "video", "classifier"]
PIPELINES: dict[str, Kind] = {"FluxPipeline": "image", "WanPipeline": "video"}  # and see _draws
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
SHIPPED = ("flux-micro", "wan-micro", "kat-micro")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """models: by kind, the name that visitors see -> folder or name on the Hugging Face Hub.

    max_side: pixels of a picture. max_steps: of denoising. max_frames: of a video. max_prompt, max_recipe:
    characters. max_tokens: of a grid in the explorer. max_upload: bytes of a file. queue: visitors that may wait.
    """

    models: dict[Kind, dict[str, str]] = field(default_factory=dict)
    max_side: int = 512
    max_steps: int = 30
    max_frames: int = 33
    max_prompt: int = 500
    max_recipe: int = 65_536
    max_tokens: int = 131_072
    max_upload: int = 4 << 20
    queue: int = 16

    @classmethod
    def of(cls, models: Sequence[str] = (), **limits: int) -> Settings:
        """With these models, or the shipped ones. Raises ValueError for a folder that is no known model, or one
        whose weights are pickles."""
        found: dict[Kind, dict[str, str]] = {}
        names = list(models) or shipped()
        short = Counter(Path(name).name for name in names)
        for name in names:
            label = Path(name).name if short[Path(name).name] == 1 else name
            found.setdefault(kind_of(name), {})[label] = name
        return cls(models=found, **limits)

    def path(self, kind: Kind, label: str) -> str:
        """Where that model is. Raises ValueError for one that was not named at start."""
        known = self.models.get(kind, {})
        if label not in known:
            raise ValueError(
                f"There is no {kind} model {label!r} here. Choose {', '.join(known) or 'none'}."
            )
        return known[label]


def shipped() -> list[str]:
    """The models of a clone of the repository."""
    folder = Path(__file__).resolve().parents[1] / "assets"
    return [str(folder / name) for name in SHIPPED if (folder / name).is_dir()]


def kind_of(model: str) -> Kind:
    config = _config(model)
    name = config.get("_class_name")
    if not isinstance(name, str | None):
        raise ValueError(
            f"{model} is a pipeline of its own code, {name}, which this app never runs."
        )
    if name in PIPELINES:
        return PIPELINES[name]
    if "architecture" in config:  # as timm saves its models
        return "classifier"
    if name and _draws(config):
        return "image"
    raise ValueError(
        f"{model} is {f'a {name}' if name else 'no model that this app knows'}. It shows text-to-image pipelines of "
        f"diffusers that visionfuse knows, {', '.join(PIPELINES)} among them, and models that timm saved."
    )


def _draws(config: dict[str, Any]) -> bool:
    """Whether a pipeline makes pictures of text, by a denoiser that has a site."""
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    from visionfuse.sites import SITES

    parts = [part[-1] for part in config.values() if isinstance(part, list)]
    known = {cls.__name__ for cls in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}
    return config["_class_name"] in known and any(part in SITES for part in parts)


def _config(model: str) -> dict[str, Any]:
    folder = Path(model)
    if not folder.is_dir():
        return _hub_config(model)
    weights = {path.suffix for path in folder.rglob("*") if path.is_file()}
    if found := sorted(weights & set(PICKLES)):
        raise ValueError(
            f"{model} has weights in {', '.join(found)}, which can run code when they are read. The app reads "
            "safetensors alone: save the model again with safe_serialization=True, and remove those files."
        )
    for name in ("model_index.json", "config.json"):
        if (folder / name).is_file():
            return json.loads((folder / name).read_text(encoding="utf-8"))
    raise ValueError(f"{model} has neither model_index.json (diffusers) nor config.json (timm).")


def _hub_config(model: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    for name in ("model_index.json", "config.json"):
        try:
            return json.loads(Path(hf_hub_download(model, name)).read_text(encoding="utf-8"))
        except LocalEntryNotFoundError as error:
            raise ValueError(
                f"There is no folder {model}, and the Hugging Face Hub cannot be asked for it: no connection, or "
                "HF_HUB_OFFLINE is set."
            ) from error
        except EntryNotFoundError:
            continue
        except HFValidationError as error:
            raise ValueError(
                f"There is no folder {model}, and it is no name on the Hugging Face Hub (owner/name)."
            ) from error
    raise ValueError(f"{model} has neither model_index.json (diffusers) nor config.json (timm).")
