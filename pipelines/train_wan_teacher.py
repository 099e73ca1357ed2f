"""A teacher for fine-tuning under a recipe: the model with its own attention, whose outputs are the targets.

The data of flow matching is one of many videos that lead to the same noisy one, so its loss is noise for the most
part: that of wan-micro is 0.056 where it draws 96% of its captions right. The teacher's velocity is the mean of them,
as well as the model knows it, and every block of it tells the student's block what to give. Sliding tile attention
(arXiv 2502.04507, section 3.4) fine-tunes with the teacher's output and attention beside the data; FPSAttention with
the data alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visionfuse.context import ACTIVE


class Teacher:
    """Targets for `student`, whose weights it may share at first.

    transformer: of the same shape, with its own attention; it is frozen. blocks: weight of the error of the blocks'
    outputs, beside that of the velocity.
    """

    def __init__(self, transformer: Any, student: Any, *, blocks: float):
        if len(transformer.blocks) != len(student.blocks):
            raise ValueError(
                f"The teacher has {len(transformer.blocks)} blocks, the model {len(student.blocks)}."
            )
        self.transformer, self.blocks = transformer.eval().requires_grad_(False), blocks
        self.outputs: dict[bool, list[Tensor]] = {True: [], False: []}  # by whether the student's
        for model, own in ((student, True), (transformer, False)):
            for block in model.blocks if blocks else ():
                block.register_forward_hook(
                    lambda module, args, output, own=own: self._keep(own, output)
                )

    def _keep(self, own: bool, output: Tensor) -> None:
        if torch.is_grad_enabled() == own:  # nothing of the student's measurements
            self.outputs[own].append(output)

    @torch.no_grad()
    def velocity(self, noisy: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """What the teacher says; before the student runs on the same."""
        self.forget()
        return self.transformer(
            hidden_states=noisy, timestep=timestep, encoder_hidden_states=text, return_dict=False
        )[0]

    def error(self) -> Tensor | float:
        """The weighted error of the student's blocks in its last forward: their squared distances to the teacher's
        outputs by the variances of these, mean over the blocks."""
        if not self.blocks:
            return 0.0
        order = ACTIVE.permutation  # in which the student's tokens lie
        errors = []
        for own, theirs in zip(self.outputs[True], self.outputs[False], strict=True):
            target = theirs.float() if order is None else theirs.float().index_select(1, order)
            errors.append((own.float() - target).square().mean() / target.var())
        self.forget()
        return self.blocks * torch.stack(errors).mean()

    def forget(self) -> None:
        for outputs in self.outputs.values():
            outputs.clear()

    def to(self, device: torch.device) -> Teacher:
        self.transformer.to(device)
        return self


def load(model: str, student: nn.Module, *, blocks: float) -> Teacher:
    """The transformer of a WanPipeline, a folder or a name on the Hub, as teacher."""
    from diffusers import WanTransformer3DModel

    found = WanTransformer3DModel.from_pretrained(
        model, subfolder="transformer", dtype=torch.float32, use_safetensors=True
    )
    return Teacher(found, student, blocks=blocks)
