"""Captions, pictures and a fidelity check: the data set that `assets/flux-micro` is trained on.

    scenes = held_out_scenes(4)
    images = render(scenes, side=256)
    accuracy(score(images, [scene.text for scene in scenes]))  # 1.0

Drawing needs PyTorch; reading pictures back needs OpenCV.
"""

from visionfuse.shapes.captions import (
    Group,
    Scene,
    held_out_scenes,
    is_held_out,
    parse,
    sample,
    training_scenes,
    vocabulary,
)
from visionfuse.shapes.fidelity import Found, Verdict, accuracy, breakdown, judge, read, score
from visionfuse.shapes.render import Layout, Scenes, arrange, draw, pack, render

__all__ = [
    "Found",
    "Group",
    "Layout",
    "Scene",
    "Scenes",
    "Verdict",
    "accuracy",
    "arrange",
    "breakdown",
    "draw",
    "held_out_scenes",
    "is_held_out",
    "judge",
    "pack",
    "parse",
    "read",
    "render",
    "sample",
    "score",
    "training_scenes",
    "vocabulary",
]
