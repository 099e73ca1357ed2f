"""What the micro models' text encoders share: a tokenizer of whole words, and a reader to train them by.

FLUX and Wan start from text encoders that others pretrained. The micro models have none to start from, and
encoders that learn from pictures alone stay bags of words. So they learn to read first: a small reader must
name every object of a scene from the encoder's output. It is thrown away and the encoder stays as it is.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5Tokenizer

CHARACTERS = string.ascii_letters + string.digits + string.punctuation


def word_tokenizer(words: Sequence[str]) -> T5Tokenizer:
    """One token for each of `words`; any other text falls back to characters."""
    known = [(word if word == "," else "\u2581" + word, -2.0) for word in words]
    letters = [("\u2581", -8.0)] + [(c, -8.0) for c in CHARACTERS if c not in words]
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=specials + known + letters, extra_ids=0, model_max_length=512)


class Reader(nn.Module):
    """Names the objects of a scene from the embeddings of its caption.

    width: of the embeddings. objects: at most so many. classes: number of classes of each attribute.
    """

    def __init__(self, width: int, objects: int, classes: Mapping[str, int]):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(objects, width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in classes.items()})

    def forward(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Logits `[B, objects, classes]` by attribute, from `[B, tokens, width]`."""
        queries = self.queries.expand(len(embeddings), -1, -1)
        slots = self.attention(queries, embeddings, embeddings, need_weights=False)[0]
        return {name: head(slots) for name, head in self.heads.items()}


def reading_loss(logits: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """Sum of the cross entropies of all attributes; classes of -100 do not count."""
    losses = [
        F.cross_entropy(logits[name].float().flatten(0, 1), truth[name].flatten()) for name in truth
    ]
    return torch.stack(losses).sum()


def all_read(logits: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """`[B]`, true where every attribute of every object is named right."""
    right = [(logits[name].argmax(-1) == truth[name]) | (truth[name] < 0) for name in truth]
    return torch.stack(right).all(0).all(1)
