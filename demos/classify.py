"""The classification tab: a timm model as it is and with a recipe, and the rational curves that KAT learned."""

from __future__ import annotations

import random
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

import visionfuse
from visionfuse.info import default_device
from visionfuse.models import RationalActivation
from visionfuse.pipelines import vit
from visionfuse.pipelines.compare import timed

from . import figures
from .jobs import MODEL, Jobs, Loaded, user_errors
from .settings import Settings

MOST_SIDE = 4096  # pixels of an uploaded picture
TOP = 5
DRAWN = 256  # pixels of a drawn picture
REACH = 4.0  # curves are drawn from -REACH to REACH
POINTS = 161
START = "at the start"
RECIPES: dict[str, dict[str, Any]] = {
    "sage: every pair, 8 bits": {"recipe": "sage"},
    "gna: half of the patches": {"recipe": "gna", "density": 0.5, "min_steps": 0, "dense_start": 0},
}


def read_classifier(name: str) -> nn.Module:
    """A model that timm saved, from safetensors alone. Raises ValueError where it has none."""
    import timm
    from huggingface_hub import snapshot_download

    wanted = ("config.json", "model.safetensors")
    folder = name if Path(name).is_dir() else snapshot_download(name, allow_patterns=list(wanted))
    if not (Path(folder) / wanted[1]).is_file():
        raise ValueError(f"{Path(name).name} has no {wanted[1]}; the app reads safetensors alone.")
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(default_device())


def classify_tab(app: gr.Blocks, settings: Settings, jobs: Jobs, load: Loaded) -> None:
    labels = list(settings.models["classifier"])
    first = load(settings.path("classifier", labels[0]))
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            model = gr.Dropdown(labels, value=labels[0], label="Model", visible=len(labels) > 1)
            picture = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Picture", format="png",
                               elem_id="classify-picture", height=280,
                               alt_text="The picture that is classified")  # fmt: skip
            draw = gr.Button(
                "Draw a picture of the shapes data set", size="sm", elem_id="classify-draw"
            )
            recipe = gr.Dropdown(list(RECIPES), value=next(iter(RECIPES)), label="Recipe")
            run = gr.Button("Classify with both", variant="primary", elem_id="classify-run")
        with gr.Column(scale=3, min_width=300):
            said = gr.HTML(figures.status("Upload or draw a picture."), elem_id="classify-status")
            with gr.Row():
                stock = gr.Label(num_top_classes=TOP, label="Model alone", min_width=200)
                fused = gr.Label(num_top_classes=TOP, label="visionfuse", min_width=200)
            curve = gr.Dropdown(activations(first), label="Rational activation", elem_id="classify-layer",
                                value=next(iter(activations(first)), None))  # fmt: skip
            plot = figures.picture(
                "Learned curves; the text below has the numbers", elem_id="classify-curves"
            )
            told = gr.HTML(elem_id="classify-curve-text")

    def classify(label, path, name, request: gr.Request):
        with user_errors(), jobs.job(request.session_hash):
            return _classified(load(settings.path("classifier", label)), _opened(path), name)

    def draw_curves(label, name):
        with user_errors():
            return _drawn(load(settings.path("classifier", label)), name)

    def other_model(label):
        with user_errors():
            found = activations(load(settings.path("classifier", label)))
            return gr.update(choices=found, value=next(iter(found), None))

    run.click(classify, [model, picture, recipe], [stock, fused, said], api_name="classify",
              concurrency_id=MODEL, concurrency_limit=1)  # fmt: skip
    draw.click(_picture, None, picture, api_visibility="private", show_progress="hidden")
    drawing: Any = {
        "fn": draw_curves,
        "inputs": [model, curve],
        "outputs": [plot, told],
        "show_progress": "hidden",
    }
    curve.change(api_name="curves", **drawing)
    model.input(other_model, model, curve, api_visibility="private", concurrency_id=MODEL)
    app.load(api_visibility="private", **drawing)


def _picture() -> Image.Image:
    """A shape as `pipelines/vit.py` draws them, of those that no training saw."""
    pictures = vit.Pictures(DRAWN, torch.device("cpu"))
    images, _ = pictures.batch(1, vit.HELD_OUT + random.getrandbits(30))  # -1 to 1
    return Image.fromarray(((images[0] + 1) * 127.5).permute(1, 2, 0).byte().numpy())


def _opened(path: str | None) -> Image.Image:
    if path is None:
        raise ValueError("There is no picture. Upload one, or draw one.")
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            if max(image.size) > MOST_SIDE:
                raise ValueError(
                    f"A picture may have {MOST_SIDE} pixels a side here, this is {image.width}x{image.height}."
                )
            return image.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError("The file is no picture that can be read: PNG, JPEG or WebP.") from error


def _classified(
    model: Any, image: Image.Image, name: str
) -> tuple[dict[str, float], dict[str, float], str]:
    from timm.data import create_transform, resolve_model_data_config

    if name not in RECIPES:
        raise ValueError(f"There is no recipe {name!r} here. Choose {', '.join(RECIPES)}.")
    transform: Any = create_transform(**resolve_model_data_config(model))
    batch = transform(image)[None].to(next(model.parameters()).device)
    _run(model, batch)  # the first run is never the fastest
    stock, stock_seconds = timed(lambda: _run(model, batch))
    options = dict(RECIPES[name])
    visionfuse.enable(model, options.pop("recipe"), **options)
    try:
        _run(model, batch)
        fused, fused_seconds = timed(lambda: _run(model, batch))
    finally:
        visionfuse.disable(model)
    names = model.pretrained_cfg.get("label_names") or [str(i) for i in range(len(stock))]
    apart = float((stock - fused).abs().max())
    same = "the same class" if stock.argmax() == fused.argmax() else "another class"
    text = (
        f"The model alone took {1e3 * stock_seconds:.0f} ms, with visionfuse {1e3 * fused_seconds:.0f} ms. Both say {same}; "
        f"no probability moved by more than {max(apart, 1e-4):.4f}."
        if same == "the same class"
        else f"They say different classes; a probability moved by {apart:.4f}."
    )
    return _named(names, stock), _named(names, fused), figures.status(text)


@torch.inference_mode()
def _run(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)[0].float().softmax(-1).cpu()


def _named(names, probabilities: Tensor) -> dict[str, float]:
    values, index = probabilities.topk(min(TOP, len(probabilities)))
    return {names[i]: float(p) for p, i in zip(values, index.tolist(), strict=True)}


# -- curves -------------------------------------------------------------------------------------------


def activations(model: nn.Module) -> list[str]:
    """The names of its rational activations, in the order in which they run."""
    return [
        name for name, module in model.named_modules() if isinstance(module, RationalActivation)
    ]


def curves(module: RationalActivation) -> dict[str, Tensor]:
    """What each group of channels computes at `points()`, and what all began with: [POINTS] each."""
    groups = module.weight_denominator.shape[0]
    began = RationalActivation(module.init, num_groups=1, version=module.version)
    return {
        START: _values(began, 1)[0],
        **{f"group {i + 1}": y for i, y in enumerate(_values(module, groups))},
    }


def points() -> Tensor:
    return torch.linspace(-REACH, REACH, POINTS)


@torch.inference_mode()
def _values(module: RationalActivation, groups: int) -> Tensor:
    """[groups, POINTS]: a channel of every group."""
    x = points().to(module.weight_denominator)[:, None].expand(-1, groups).contiguous()
    return module.eval()(x).float().cpu().T


def _drawn(model: Any, name: str | None) -> tuple[Image.Image | None, str]:
    if name is None:
        return None, figures.status("This model has no rational activations.")
    if name not in activations(model):
        raise ValueError(f"This model has no rational activation {name!r}.")
    module = model.get_submodule(name)
    found = curves(module)
    apart = {k: float((y - found[START]).abs().max()) for k, y in found.items() if k != START}
    most, least = max(apart, key=apart.__getitem__), min(apart, key=apart.__getitem__)
    text = (
        f"{name} began as {module.init}. Between {-REACH:g} and {REACH:g} the curve of {most} moved most, by "
        f"{apart[most]:.2f}; that of {least} least, by {apart[least]:.2f}."
    )
    return _plot(found, module.init), figures.status(text)


def _plot(found: dict[str, Tensor], init: Any) -> Image.Image:
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, y in found.items():
        dashed: dict[str, Any] = {"color": "black", "linestyle": "--"} if name == START else {}
        axes.plot(points(), y, label=f"{name}: {init}" if name == START else name, **dashed)
    axes.set(xlabel="x", ylabel="rational(x)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    with BytesIO() as file:
        figure.savefig(file, format="png")
        return Image.open(file).convert("RGB")
