"""The command line. Options and output are here; the work is in visionfuse.pipelines, imported when needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from visionfuse.bench.attention_command import attention
from visionfuse.bench.command import engine, neighborhood, sage
from visionfuse.calibrate import calibrate
from visionfuse.demos.command import demo
from visionfuse.profile.command import profile
from visionfuse.simulate.command import simulate
from visionfuse.tune import tune

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
bench = typer.Typer(no_args_is_help=True, help="Measure on this machine.")
app.add_typer(bench, name="bench")
console = Console()

PROMPT = "a large red circle above a small blue square on a white background"
MICRO = Path(__file__).resolve().parents[1] / "assets" / "flux-micro"


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"visionfuse {version('visionfuse')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Faster vision and diffusion transformers."""


@contextmanager
def user_errors() -> Iterator[None]:
    """What a user can put right is one message and exit code 2, not a traceback."""
    try:
        yield
    except (ValueError, OSError, NotImplementedError, ImportError, FloatingPointError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {escape(str(error))}")
        raise typer.Exit(2) from error


def parse_value(text: str) -> Any:
    """'64x64' -> (64, 64), '0.5' -> 0.5, 'true' -> True, 'none' -> None, anything else as it is.

    On an axis of a tuple, '-' is None (the whole axis): '-x16x16'.
    """
    words = {"true": True, "false": False, "none": None, "-": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    parts = text.split("x")
    if len(parts) > 1 and all(p == "-" or p.isdigit() for p in parts):
        return tuple(parse_value(p) for p in parts)
    return text


def parse_options(pairs: list[str], **named: str | float | None) -> dict[str, Any]:
    """Recipe options from 'key=value' and from the options that have a name of their own."""
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--option takes key=value, for example window=32x32, not {pair!r}.")
        options[key.strip().replace("-", "_")] = parse_value(value.strip())
    for key, value in named.items():
        if value is None:
            continue
        if key in options:
            raise ValueError(f"{key} is given twice, as --option {key}=... and by its own name.")
        options[key] = parse_value(value) if isinstance(value, str) else value
    return options


def parse_shape(text: str, name: str) -> tuple[int, ...]:
    value = parse_value(text)
    shape = value if isinstance(value, tuple) else (value,)
    if not 1 <= len(shape) <= 3 or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(
            f"{name} takes one to three sizes such as 64x64 or 21x30x52, not {text!r}."
        )
    return shape


Window = Annotated[str | None, typer.Option(help="Keys a query sees per axis, e.g. 32x32.")]
Stride = Annotated[str | None, typer.Option(help="Queries that share a window, e.g. 8x8.")]
Density = Annotated[
    float | None, typer.Option(help="Instead of a window: the share of the grid that a query sees.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would run, and run nothing.")]
Formats = Annotated[
    str | None,
    typer.Option(
        help="Number formats of attention: model, fp8, int8_fp8, int8, int4_fp8 ...; 'visionfuse info' lists "
        "which kernel runs each here. Recipes sage, gna, auto and dense have it or their own."
    ),
]


@app.command()
def generate(
    model: Annotated[
        str | None, typer.Argument(help="Folder or Hugging Face name; default: the shipped model.")
    ] = None,
    prompt: Annotated[str, typer.Argument(help="What to draw.")] = PROMPT,
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or its JSON file.")] = "gna",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="key=value of the recipe; repeatable."),
    ] = None,
    window: Window = None,
    stride: Stride = None,
    density: Density = None,
    dense_start: Annotated[
        float | None, typer.Option(help="Share of the steps at the start that stays dense.")
    ] = None,
    precision: Formats = None,
    impl: Annotated[str, typer.Option(help="Attention implementation.")] = "auto",
    height: Annotated[int | None, typer.Option(help="Pixels.", min=16)] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", min=16)] = None,
    frames: Annotated[
        int | None, typer.Option(help="Of a video: one more than a multiple of 4.", min=1)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    max_sequence_length: Annotated[int | None, typer.Option(help="Text tokens.", min=1)] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu.")] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep idle parts in CPU memory.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where it goes; default: out.png, of a video out.mp4.")
    ] = None,
    intermediates: Annotated[
        Path | None, typer.Option(help="Of recipe scale_dit: a folder for pictures on the way.")
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Stock and accelerated, side by side; figures in JSON."),
    ] = False,
    repeats: Annotated[
        int, typer.Option(help="With --compare, of a picture: median of so many.", min=1)
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, and say what would run; read no weights.")
    ] = False,
) -> None:
    """Generate an image with FLUX or a video with Wan, accelerated, or compare it with the stock pipeline."""
    with user_errors():
        options = parse_options(
            option or [], window=window, stride=stride, density=density, dense_start=dense_start,
            precision=precision,
        )  # fmt: skip
        model = model or _shipped_model()
        given: dict[str, Any] = {
            "model": model, "prompt": prompt, "recipe": recipe, "options": options, "impl": impl, "seed": seed,
            "height": height, "width": width, "steps": steps, "guidance": guidance,
            "max_sequence_length": max_sequence_length,
        }  # fmt: skip
        films = _films(model)
        if intermediates is not None and (compare or films):
            raise ValueError(
                "--intermediates is for one picture in two stages (recipe scale_dit), without --compare."
            )
        if films:
            from visionfuse.pipelines import wan

            wan.film(wan.Request(frames=frames, **given), out or Path("out.mp4"), dtype=dtype,
                     device=device, offload=offload, compare=compare, dry_run=dry_run)  # fmt: skip
            return
        if frames is not None:
            raise ValueError(f"--frames is for videos; {model} makes pictures.")
        out = out or Path("out.png")
        _check_out(out)
        from visionfuse.pipelines import flux
        from visionfuse.reporting import report

        request = flux.Request(
            dtype=dtype, device=device, offload=offload, intermediates=intermediates, **given
        )
        expected = flux.expect(request)
        if dry_run:
            _print_expected(expected, impl)
            return
        pipe = flux.load(request)
        if compare:
            result = flux.compare(pipe, request, repeats=repeats)
            figures = flux.save(result, out)
            _print_comparison(result)
            console.print(f"Picture: {out}\nFigures: {figures}", soft_wrap=True, highlight=False)
            return
        flux.enable(pipe, request)
        flux.generate(pipe, request).save(out)
        console.print(escape(str(report(pipe))), soft_wrap=True, highlight=False)
        console.print(f"Picture: {out}", soft_wrap=True, highlight=False)


def _films(model: str) -> bool:
    """Whether it makes videos. What is no pipeline at all is told by the path of pictures."""
    here = Path(model)
    if here.exists() and not (here / "model_index.json").is_file():
        return False
    from visionfuse.pipelines import flux, wan

    return (here.exists() or flux.HUB_NAME.fullmatch(model) is not None) and wan.films(model)


def _check_out(out: Path) -> None:
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out needs a name that ends in .png, .jpg or .webp, not {out}.")
    out.parent.mkdir(parents=True, exist_ok=True)


def _shipped_model() -> str:
    if not MICRO.is_dir():
        raise ValueError(
            "The shipped model assets/flux-micro is not here; it comes with a clone of the "
            "repository. Name a folder or a model on the Hugging Face Hub."
        )
    return str(MICRO)


def _print_expected(expected, impl: str) -> None:
    from visionfuse.choice import Choice, choose
    from visionfuse.info import default_device, default_dtype
    from visionfuse.kernels.attention.dispatch import is_emulated
    from visionfuse.kernels.plan import plan_attention

    device = default_device()
    precision = expected.recipe.precision
    choice = Choice(impl, [], precision)
    if impl == "auto":
        choice = choose(impl, device, default_dtype(device), expected.head_dim, precision)
    made = plan_attention(
        expected.layout, expected.recipe.plan, order=expected.recipe.order, impl=choice.impl,
        head_dim=expected.head_dim, precision=choice.precision.name,
    )  # fmt: skip
    table = Table(box=None, show_header=False)
    table.add_row("recipe", json.dumps(expected.recipe.to_dict()["plan"]))
    table.add_row("tokens", f"{expected.layout.length}, of them {_times(expected.grid)} image")
    for phase in expected.phases:
        table.add_row("", str(phase))
    table.add_row("density", f"{made.blocks.density:.1%}")
    table.add_row("visited", f"{made.blocks.visited_density:.1%}, in tiles {_times(made.tile)}")
    if not precision.is_model:
        emulated = ", emulated" if is_emulated(choice.impl, choice.precision) else ""
        table.add_row("precision", f"{choice.precision}{emulated}")
        for reason in choice.precision_reasons:
            table.add_row("precision refused", reason)
    table.add_row("implementation", choice.impl)
    console.print(table)


def _times(shape: tuple[int, ...] | None) -> str:
    return "x".join(map(str, shape)) if shape else "of rows"


def _print_comparison(result) -> None:
    change = result.change
    table = Table(title=f"{result.stock.width}x{result.stock.height}, {result.device}")
    table.add_column("")
    table.add_column("stock", justify="right")
    table.add_column("visionfuse", justify="right")
    table.add_row("time", f"{result.stock_seconds:.2f} s", f"{result.fused_seconds:.2f} s")
    table.add_row("speed-up", "1.00x", f"{result.speedup:.2f}x")
    if result.density is not None:
        table.add_row("density", "100%", f"{result.density:.1%}")
        table.add_row("steps", f"{result.steps}", f"{result.planned_steps} of them at that density")
    table.add_section()
    table.add_row("PSNR", "", change.psnr_text)
    table.add_row("SSIM", "", f"{change.ssim:.4f}")
    table.add_row("mean difference", "", f"{change.mean:.2f} of 255")
    console.print(table)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Versions, device, and which implementations run here and why the others do not."""
    from visionfuse.info import collect, tables

    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for part in tables(facts):
        console.print(part)


@app.command()
def plan(
    grid: Annotated[str, typer.Option(help="Token grid: 64x64, or frames first: 21x30x52.")],
    text: Annotated[int, typer.Option(help="Text tokens that everything sees.", min=0)] = 0,
    window: Window = None,
    stride: Stride = None,
    dilation: Annotated[str | None, typer.Option(help="Steps between keys.")] = None,
    density: Density = None,
    impl: Annotated[str, typer.Option(help="For the tiles of this implementation.")] = "blocks",
    head_dim: Annotated[int, typer.Option(help="Channels of a head.", min=8)] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How much work a neighbourhood leaves on a grid, and in which tiles it is done."""
    with user_errors():
        from visionfuse.kernels.attention import implementations
        from visionfuse.kernels.plan import Neighborhood, TokenLayout, plan_attention

        shape = parse_shape(grid, "--grid")
        if impl not in implementations():
            raise ValueError(f"Unknown --impl {impl!r}. Choose {', '.join(implementations())}.")
        spec = Neighborhood(
            **parse_options([], window=window, density=density, stride=stride, dilation=dilation)
        )
        layout = TokenLayout.joint(text=text, grids=[shape])
        made = plan_attention(layout, spec, impl=impl, head_dim=head_dim)
        on_grid = spec.resolve(shape)
    blocks = made.blocks
    facts = {
        "tokens": layout.length,
        "window": on_grid.window,
        "stride": on_grid.stride,
        "density": blocks.density,
        "visited_density": blocks.visited_density,
        "full_share": blocks.full_share,
        "tile": made.order.tile,
        "subtile": made.order.subtile,
        "tiles": blocks.tiles,
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    meaning = {
        "density": "visible pairs, of all pairs",
        "visited_density": "pairs in visited blocks",
        "full_share": "visited pairs in blocks without a mask",
    }
    table = Table(box=None, show_header=False)
    for name, value in facts.items():
        if value is None:  # a column has no sub-tiles
            continue
        if isinstance(value, tuple):
            value = _times(value)
        elif isinstance(value, float):
            value = f"{value:.1%}"
        table.add_row(name.replace("_", " "), str(value), f"[dim]{meaning.get(name, '')}[/]")
    console.print(table)


bench.command()(attention)
bench.command()(engine)
bench.command()(neighborhood)
bench.command()(sage)
app.command()(calibrate)
app.command()(demo)
app.command()(profile)
app.command()(simulate)
app.command()(tune)

if __name__ == "__main__":
    app()
