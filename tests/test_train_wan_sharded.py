"""Fine-tuning with weights sharded by FSDP2 over two processes: it trains, saves whole weights, and resumes.

accelerate shards on GPUs alone; here its answers to "which kind" are set, and everything else is what runs there.
Started by torchrun, the file itself is the training.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

RECIPE = "sta window=1x2x2 tile=1x2x2 min_steps=0 dense_start=0"
ARGUMENTS = ("--videos 4 --held-out 2 --batch 2 --rate 1e-3 --warmup 1 --height 32 --width 32 --device cpu "
             "--log-steps 1 --gap-steps 100 --save-dtype float32 --steps 4")  # fmt: skip


@pytest.mark.slow
def test_sharded_training_resumes_where_it_was(tmp_path):
    from visionfuse.pipelines.wan_micro import build, save

    torch.manual_seed(0)
    pipe = build(width=64, layers=2, vae_width=8)
    for parameter in pipe.transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    save(pipe, tmp_path / "tiny")

    def run(out: str, *more: str) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]  # fmt: skip
        arguments = [str(tmp_path / "tiny"), "--recipe", RECIPE, *ARGUMENTS.split(), "--out", str(tmp_path / out)]  # fmt: skip
        done = subprocess.run([*command, __file__, *arguments, *more], capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "shards: True" in done.stdout

    run("whole")
    run("cut", "--slice-steps", "2")
    run("cut", "--resume")
    losses, weights = [], []
    for name in ("whole", "cut"):
        folder = tmp_path / name
        losses.append(json.loads((folder / "log.json").read_text())["loss"])
        found = load_file(folder / "model/transformer/diffusion_pytorch_model.safetensors")
        weights.append(found)
    assert [row[0] for row in losses[0]] == [1, 2, 3, 4]
    assert losses[0] == losses[1]
    shapes = {name: p.shape for name, p in pipe.transformer.state_dict().items()}
    assert {name: p.shape for name, p in weights[0].items()} == shapes  # whole, of both processes
    assert all(torch.equal(p, weights[1][name]) for name, p in weights[0].items())
    # Averages of both halves: those of one process would be its own.
    start = load_file(tmp_path / "tiny/transformer/diffusion_pytorch_model.safetensors")
    moved = [
        not torch.equal(p.to(start[name].dtype), start[name]) for name, p in weights[0].items()
    ]
    assert sum(moved) > 0.8 * len(moved)


def _train(arguments: list[str]) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from visionfuse.pipelines import train_wan, train_wan_loop

    class Sharded(Accelerator):
        distributed_type = property(lambda self: DistributedType.FSDP)  # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]
        is_fsdp2 = property(lambda self: True)  # pyright: ignore[reportAssignmentType]

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
                transformer_cls_names_to_wrap=["WanTransformerBlock"],
            )  # fmt: skip

    AcceleratorState.is_fsdp2 = property(lambda self: True)  # pyright: ignore[reportAttributeAccessIssue]
    train_wan.Accelerator = Sharded
    made = train_wan_loop.Average.__init__

    def said(self, parameters, *args, **kwargs):
        parameters = list(parameters)
        print("shards:", any(isinstance(p, train_wan_loop.DTensor) for p in parameters))
        made(self, parameters, *args, **kwargs)

    train_wan_loop.Average.__init__ = said
    torch.set_num_threads(1)
    train_wan.main(arguments)


if __name__ == "__main__":
    _train(sys.argv[1:])
