"""Several GPUs, as two processes on this CPU: Ulysses with plans and precisions, ring, prompts over processes."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from visionfuse import TokenLayout, parallel
from visionfuse.context import ACTIVE

WORKER = Path(__file__).with_name("parallel_worker.py")


def test_two_processes_compute_what_one_does():
    _compute_what_one_does(2)


@pytest.mark.slow
def test_four_processes_compute_what_one_does():
    _compute_what_one_does(4)


def _compute_what_one_does(processes: int) -> None:
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    count = ["--nproc-per-node", str(processes)]
    launch = ["-m", "torch.distributed.run", "--standalone", *count, str(WORKER)]
    ran = subprocess.run(
        [sys.executable, *launch], env=os.environ | environment, capture_output=True, text=True, timeout=400
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr  # whole: the first cause stands far from the end
    assert ran.stdout.count("all well") == processes, ran.stdout[-4000:]


class Config:
    """What diffusers' ContextParallelConfig says, without processes."""

    def __init__(self, ulysses=1, ring=1, anything=False):
        self.context_parallel_config = self
        self.ulysses_degree, self.ring_degree, self.ulysses_anything = ulysses, ring, anything


class Processor:
    def __init__(self, config=None):
        self._parallel_config = config


@pytest.mark.parametrize(
    ("config", "layout", "reason", "streams"),
    [
        (None, TokenLayout.joint(text=5, grids=[(3, 3)]), "", ()),
        (Config(ulysses=2), TokenLayout.joint(text=6, grids=[(3, 4), (2, 2)]), "", (6, 16)),
        (Config(ulysses=2), TokenLayout.joint(grids=[(2, 3, 4)]), "", (24,)),
        (
            Config(ulysses=2),
            TokenLayout.joint(text=4, grids=[(2, 2)], text_first=False),
            "",
            (4, 4),
        ),
        (Config(ulysses=4), TokenLayout.joint(text=6, grids=[(4, 4)]), "6 and 16 tokens", ()),
        (Config(ring=2), TokenLayout.joint(grids=[(4, 4)]), "a dense recipe", ()),
        (Config(ring=2, ulysses=2), TokenLayout.joint(grids=[(4, 4)]), "at once", ()),
        (
            Config(ulysses=2, anything=True),
            TokenLayout.joint(grids=[(4, 4)]),
            "several lengths",
            (),
        ),
    ],
)
def test_enter(config, layout, reason, streams):
    try:
        said = parallel.enter([Processor(), Processor(config)], layout, dense=False)
        assert reason in said
        assert bool(said) == bool(reason)
        assert ACTIVE.streams == streams
    finally:
        ACTIVE.clear()


@pytest.mark.parametrize("streams", [(4, 8), (12,), (8, 4)])
@pytest.mark.parametrize("parts", [2, 4])
def test_exchange_there_and_back(streams, parts):
    """With all processes in one: what each holds is what diffusers splits, and comes back to it."""
    torch.manual_seed(0)
    whole = torch.randn(2, sum(streams), 8, 3)
    local = [
        torch.cat([stream.chunk(parts, 1)[rank] for stream in whole.split(streams, 1)], 1)
        for rank in range(parts)
    ]
    ends = [0, *torch.tensor(streams).div(parts).cumsum(0).int().tolist()]
    cuts = list(pairwise(ends))
    sent, back = [parallel._by_heads(x, parts) for x in local], []
    for rank in range(parts):
        mine = parallel._all_tokens(torch.stack([x[rank] for x in sent]), cuts)
        heads = slice(rank * 8 // parts, (rank + 1) * 8 // parts)
        assert torch.equal(mine, whole[:, :, heads])
        back.append(parallel._by_tokens(mine, parts, cuts))
    for rank in range(parts):
        assert torch.equal(parallel._all_heads(torch.stack([x[rank] for x in back])), local[rank])
