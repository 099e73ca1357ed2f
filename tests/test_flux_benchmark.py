"""pipelines/flux.py --benchmark and pipelines/scale_dit_benchmark.py on tiny models: rows, comparison, refusals."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from visionfuse.kernels.order import Order
from visionfuse.kernels.plan import Local, Segment, TokenLayout, plan_attention
from visionfuse.pipelines import flux_benchmark, scale_dit_benchmark
from visionfuse.testing_pipelines import flux_pipeline

ROOT = Path(__file__).parents[1]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_flux(tmp_path, capsys):
    flux_pipeline().save_pretrained(tmp_path / "model")
    out = tmp_path / "flux.csv"
    gna = "gna density=0.5 dense_steps=0"
    arguments = [str(tmp_path / "model"), "--size", "32x32", "--steps", "2", "--recipes", gna, "--variants", "stock",
                 "sage", gna, "--device", "cpu", "--csv", str(out)]  # fmt: skip
    flux_benchmark.main(arguments)
    assert {row["impl"] for row in rows_of(out)} == {"stock", "sage", gna}
    flux_benchmark.main([*arguments, "--base", str(out)])
    assert "sage" in capsys.readouterr().out
    for wrong in (["--base", str(out)], ["--variants", "fast"]):
        with pytest.raises(SystemExit):
            flux_benchmark.main(wrong)


@pytest.mark.slow
def test_scale_dit_tiny(tmp_path):
    out = tmp_path / "rows.csv"
    command = [sys.executable, str(ROOT / "pipelines" / "scale_dit_benchmark.py"), "--tiny", "--device", "cpu",
               "--csv", str(out)]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT)
    rows = rows_of(out)
    attention = [row for row in rows if "attention" in row["case"]]
    assert {row["recipe"] for row in attention} == {"", *scale_dit_benchmark.ATTENTION}
    assert not [row["note"] for row in rows if "WRONG" in row["note"]]
    assert {row["impl"] for row in rows if "step" in row["case"]} == {"stock", "visionfuse"}


@pytest.mark.parametrize(
    "spec", [Local(), Local(block=(24, 16)), Local(guidance="linear"), Local(block=None)]
)
def test_the_gate_knows_what_is_visible(spec):
    """Its keys come from the rule, those of the plan from lists: they must agree, or a wrong plan would be timed."""
    layout = TokenLayout(
        (Segment("text", (9,)), Segment("grid", (22, 14)), Segment("guidance", (6, 4)))
    )
    plan = plan_attention(layout, spec, order=Order())
    rows = torch.randperm(layout.length, generator=torch.Generator().manual_seed(0))[:40]
    seen = scale_dit_benchmark.kept_keys(plan, spec, rows)
    assert torch.equal(seen, plan.blocks.dense_mask()[rows])
