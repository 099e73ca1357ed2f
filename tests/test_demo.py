"""The app without a browser: settings, recipes of strangers, the explorer's pictures, curves, jobs."""

import json
import os
import random
import re
import shutil
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
import torch

from visionfuse import Recipe
from visionfuse.kernels.order import Order
from visionfuse.kernels.plan import Neighborhood
from visionfuse.kernels.plan.neighborhood import neighborhood_mask
from visionfuse.simulate import GPUS, Setting, simulate

gr = pytest.importorskip("gradio", reason="the app needs Gradio: pip install visionfuse[demo]")

from visionfuse.demos import Settings, classify, explorer, image, jobs, plans, recipes  # noqa: E402
from visionfuse.demos.settings import kind_of, shipped  # noqa: E402

ASSETS = Path(__file__).resolve().parents[1] / "assets"
GOOD = recipes.written("gna", **recipes.CONTROLS)


# -- what may be loaded -------------------------------------------------------------------------------


def test_shipped_models_are_known():
    settings = Settings.of()
    assert settings.models["image"] == {"flux-micro": str(ASSETS / "flux-micro")}
    assert settings.models["classifier"] == {"kat-micro": str(ASSETS / "kat-micro")}
    assert sum(map(len, settings.models.values())) == len(shipped())


def test_only_models_named_at_start():
    settings = Settings.of([str(ASSETS / "flux-micro")])
    assert settings.path("image", "flux-micro") == str(ASSETS / "flux-micro")
    for other in (str(ASSETS / "flux-micro"), "../flux-micro", "owner/name", ""):
        with pytest.raises(ValueError, match="no image model"):
            settings.path("image", other)
    with pytest.raises(ValueError, match="no classifier model"):
        settings.path("classifier", "flux-micro")


def test_models_of_one_name_are_told_apart(tmp_path):
    twin = tmp_path / "kat-micro"
    shutil.copytree(ASSETS / "kat-micro", twin)
    found = Settings.of([str(twin), str(ASSETS / "kat-micro")]).models["classifier"]
    assert set(found) == set(found.values()) == {str(twin), str(ASSETS / "kat-micro")}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "unet/weights.ckpt", "deep/er/x.pt"])
def test_pickles_are_refused(tmp_path, name):
    model = tmp_path / "kat"
    shutil.copytree(ASSETS / "kat-micro", model)
    (model / name).parent.mkdir(parents=True, exist_ok=True)
    (model / name).write_bytes(b"")
    with pytest.raises(ValueError, match="run code"):
        kind_of(str(model))


@pytest.mark.parametrize("where", ["a part", "the pipeline"])
def test_code_of_a_model_never_runs(tmp_path, where):
    """A model may name Python files of its own: the app refuses it, at start or when it is asked for."""
    model = tmp_path / "flux"
    shutil.copytree(ASSETS / "flux-micro", model, copy_function=os.symlink)
    index = json.loads((model / "model_index.json").read_text())
    if where == "a part":
        index["transformer"] = ["own", "FluxTransformer2DModel"]
    else:
        index["_class_name"] = ["own", "FluxPipeline"]
    (model / "model_index.json").unlink()
    (model / "model_index.json").write_text(json.dumps(index))
    mark = tmp_path / "it ran"
    for file in (model / "own.py", model / "pipeline.py", model / "transformer" / "own.py"):
        file.write_text(
            f"open({str(mark)!r}, 'w')\nfrom diffusers import FluxPipeline, FluxTransformer2DModel\n"
        )
    with pytest.raises(ValueError, match="code"):
        jobs.read_pipeline(Settings.of([str(model)]).path("image", "flux"))
    assert not mark.exists()


def test_a_hub_that_cannot_be_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot be asked"):
        kind_of("owner/a-model-that-nobody-has")


def test_what_is_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"model_index\.json"):
        kind_of(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "AudioPipeline"}')
    with pytest.raises(ValueError, match="AudioPipeline"):
        kind_of(str(tmp_path))
    with pytest.raises(ValueError, match="no folder"):
        kind_of("./not/there/at/all")


# -- recipes are data ---------------------------------------------------------------------------------


def test_a_recipe_survives_the_form():
    assert recipes.parsed(GOOD, at_most=10_000).plan.density == recipes.CONTROLS["density"]
    for name in recipes.names():
        text = recipes.written(name, **recipes.CONTROLS)
        assert Recipe.from_dict(json.loads(text)) == recipes.parsed(text, at_most=10_000)


def broken(**changes) -> str:
    return json.dumps(json.loads(GOOD) | changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[" * 100_000, "characters"),
        ("[" * 9_000, "no JSON"),
        ("[]", "object"),
        ("null", "object"),
        ("{}", "version"),
        (broken(version=99), "99"),
        (broken(plan="all"), "no recipe"),
        (broken(plan={"kind": "__import__('os')"}), "kind"),
        (broken(plan={"kind": "neighborhood", "density": "a lot"}), "no recipe"),
        (broken(plan={"kind": "neighborhood", "density": 7}), "density"),
        (broken(schedule=3), "no recipe"),
        (broken(schedule={"dense_start": "x"}), "no recipe"),
        (broken(precision={"qk": "exec"}), "exec"),
        (broken(linear={"format": "exec"}), "exec"),
        (broken(linear={"least_width": "x"}), "least_width"),
        (broken(linear={"tolerance": [1]}), "tolerance"),
        (broken(variants=[1, 2]), "no recipe"),
        (broken(code="import os"), "'code'"),
        (broken(order={"kind": "tiled", "tile": [1, 1]}), "at least 16 tokens"),
        (
            broken(plan={"kind": "tile_window", "window": [3, 3, 3], "tile": [1, 2, 2]}),
            "at least 16 tokens",
        ),
    ],
)
def test_a_broken_recipe_is_a_message(text, words):
    with pytest.raises(ValueError, match=r".") as error:
        recipes.parsed(text, at_most=10_000)
    assert words in str(error.value)


def test_uploads(tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(GOOD)
    assert recipes.uploaded(str(file), at_most=10_000) == GOOD
    file.write_bytes(b"\x80\x04\x95" + bytes(200))  # a pickle
    with pytest.raises(ValueError, match="no text"):
        recipes.uploaded(str(file), at_most=10_000)
    file.write_bytes(b" " * 50_000)
    with pytest.raises(ValueError, match="larger"):
        recipes.uploaded(str(file), at_most=10_000)
    with pytest.raises(ValueError, match="No file"):
        recipes.uploaded(None, at_most=10_000)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"side": 4096}, "Size"), ({"steps": 10_000}, "Steps"), ({"seed": -1}, "Seed"),
        ({"prompt": "x" * 501}, "characters"), ({"prompt": ""}, "characters"), ({"side": float("nan")}, "Size"),
    ],
)  # fmt: skip
def test_limits_hold_behind_the_page(changed, words):
    values = {"prompt": "a red circle", "side": 128, "steps": 2, "seed": 0} | changed
    with pytest.raises(ValueError, match=words):
        image.asked_for(Settings(), **values)


# -- the explorer -------------------------------------------------------------------------------------

ASKED = [
    plans.Asked(grid=(70,), spec=Neighborhood(window=9, stride=3)),
    plans.Asked(grid=(20, 31), spec=Neighborhood(window=(7, 9), stride=(1, 4)), text=13),
    plans.Asked(grid=(20, 32), spec=Neighborhood(window=5, dilation=(2, 3)), text=5),
    plans.Asked(grid=(32, 32), spec=Neighborhood(window=12, stride=4), order=Order(kind="hilbert", tile=(16, 16))),
    plans.Asked(grid=(5, 12, 14), spec=Neighborhood(window=(3, 6, 6), stride=(1, 2, 2)), text=40),
    plans.Asked(grid=(5, 12, 14), spec=Neighborhood(density=0.2), order=Order(kind="row")),
]  # fmt: skip


@pytest.mark.parametrize("asked", ASKED, ids=lambda a: f"{a.grid}_{a.order.kind}")
def test_what_a_token_sees_is_the_mask(asked):
    mask = neighborhood_mask(asked.rule).numpy()
    made = plans.plan(asked)
    covered = np.zeros(made.blocks.length_q, int)
    for tile in range(made.blocks.tiles):
        covered += plans.of_tile(made, tile)[0]
    assert (covered == 1).all()  # every token has one tile
    for flat in range(0, mask.shape[0], 37):
        token = tuple(int(c) for c in np.unravel_index(flat, asked.grid))
        seen = plans.visible(asked.rule, token)
        assert np.array_equal(seen.reshape(-1), mask[flat])
        own, visited = plans.of_tile(made, plans.tile_of(made, asked.text + flat))
        assert own[asked.text + flat]
        assert visited[: asked.text].all()
        assert not (
            seen.reshape(-1) & ~visited[asked.text :]
        ).any()  # nothing that it sees is left out


@pytest.mark.parametrize("asked", ASKED[1::3], ids=lambda a: str(a.grid))
def test_pictures_show_the_plan(asked):
    token = tuple(n // 2 for n in asked.grid)
    sheet = plans.Sheet(asked.grid)
    whole = (0,) * (3 - len(token)) + token
    x, y = sheet.place(token)
    assert sheet.token(x * sheet.cell, y * sheet.cell) == whole
    drawn = np.asarray(plans.picture_of_token(asked, token))
    assert tuple(drawn[y * sheet.cell, x * sheet.cell]) == plans.TOKEN

    blocks = plans.plan(asked).blocks
    image = plans.picture_of_blocks(plans.plan(asked))
    colors = {color: count for count, color in image.getcolors(1 << 20)}
    cell = round((image.height / blocks.tiles) ** 2)
    assert colors.get(plans.FULL, 0) == cell * blocks.full.start.numel()
    assert colors.get(plans.PARTIAL, 0) == cell * blocks.partial.start.numel()


def test_between_frames_is_no_token():
    sheet = plans.Sheet((4, 6, 5))
    assert sheet.token(5 * sheet.cell, 0) is None
    assert sheet.token(0, 6 * sheet.cell) is None
    assert sheet.token(6 * sheet.cell, 0) == (1, 0, 0)


def test_speeds_are_those_of_the_simulator():
    asked = plans.Asked(grid=(64, 64), spec=Neighborhood(window=24, stride=8), text=128)
    expected = simulate(asked.spec, Setting(grid=(64, 64), text=128))
    first = plans.speeds(asked)[0]
    assert (first.impl, first.precision) == ("gluon_sm90", "model")
    assert first.ms == pytest.approx(expected.ms)
    assert first.dense == pytest.approx(expected.dense_ms)
    assert first.cudnn == pytest.approx(expected.cudnn_ms)


def test_speeds_of_every_gpu_and_how_they_are_known():
    asked = plans.Asked(grid=(64, 64), spec=Neighborhood(window=24, stride=8), text=128)
    found = plans.speeds(asked)
    assert {each.gpu.name for each in found} == {gpu.name for gpu in GPUS}
    shown = explorer._shown(asked, (20, 30))[3]
    rows = re.findall(r'<th scope="row">([^<]+)</th>', shown)
    assert len(rows) == len(found)
    for name in rows:
        assert name.endswith("(derived)") != name.startswith("H200,")
    assert not any("A100" in name and "gluon" in name for name in rows)  # that kernel is Hopper's


# -- classification -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kat():
    return classify.read_classifier(str(ASSETS / "kat-micro"))


def test_kat_micro_reads_what_the_project_draws(kat):
    random.seed(0)
    right = 0
    for _ in range(8):
        drawn = classify._picture()
        stock, fused, said = classify._classified(kat, drawn, next(iter(classify.RECIPES)))
        assert max(stock, key=stock.get) == max(fused, key=fused.get)
        assert "same class" in said
        right += max(stock.values()) > 0.9
    assert right >= 7


def test_curves_are_what_the_model_computes(kat):
    names = classify.activations(kat)
    assert len(names) == 6
    module = kat.get_submodule(names[1])
    found, x = classify.curves(module), classify.points().double()
    a = module.weight_numerator[0].double()
    for group in range(module.weight_denominator.shape[0]):
        b = module.weight_denominator[group].double()
        p = sum(a[i] * x**i for i in range(len(a)))
        q = 1 + sum((b[i] * x ** (i + 1)).abs() for i in range(len(b)))
        assert torch.allclose(found[f"group {group + 1}"].double(), (p / q).detach(), atol=1e-4)
    silu = torch.nn.functional.silu(x)
    assert (found[classify.START] - silu).abs().max() < 0.01
    assert (found["group 1"] - silu).abs().max() > 0.1  # it learned
    drawn, said = classify._drawn(kat, names[1])
    assert drawn.width > 500
    assert "began as silu" in said


def test_a_picture_that_is_none(tmp_path):
    file = tmp_path / "x.png"
    file.write_bytes(b"GIF89a" + bytes(100))
    with pytest.raises(ValueError, match="no picture"):
        classify._opened(str(file))
    with pytest.raises(ValueError, match="no picture"):
        classify._opened(None)


# -- jobs ---------------------------------------------------------------------------------------------


def test_one_job_at_a_time_and_only_ones_own_is_cancelled():
    running, entered, go = jobs.Jobs(), [], Event()
    outcome = {}

    def work(name):
        try:
            with running.job(name) as check:
                entered.append(name)
                go.wait(10)
                check()
                outcome[name] = "done"
        except jobs.Cancelled:
            outcome[name] = "cancelled"

    threads = [Thread(target=work, args=(name,)) for name in ("a", "b")]
    threads[0].start()
    while not entered:
        pass
    threads[1].start()
    assert not running.cancel("nobody")
    assert running.cancel("a")
    assert entered == ["a"]  # b waits
    go.set()
    for thread in threads:
        thread.join(10)
    assert outcome == {"a": "cancelled", "b": "done"}
    assert not running.cancel("a")


def test_errors_tell_visitors_what_they_can_put_right(caplog):
    with pytest.raises(gr.Error, match="too large"), jobs.user_errors():
        raise ValueError("too large")
    with pytest.raises(gr.Error, match="NaN"), jobs.user_errors():
        raise FloatingPointError("NaN in the output: another precision may help")
    with pytest.raises(gr.Error) as error, jobs.user_errors():
        raise RuntimeError("the secret of the house")
    assert "secret" not in str(error.value)
    assert "secret" in caplog.text
