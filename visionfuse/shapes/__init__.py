"""Captions, pictures, videos and fidelity checks: what flux-micro and wan-micro are trained on.

    scenes = held_out_scenes(4)
    images = render(scenes, side=256)
    accuracy(score(images, [scene.text for scene in scenes]))  # 1.0

    clips = held_out_clips(4)
    videos = render_clips(clips, side=128)
    accuracy(score_clips(videos, clips))  # 1.0

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
from visionfuse.shapes.video import Actor, Clip, held_out_clips, parse_clip, training_clips
from visionfuse.shapes.video_fidelity import judge_clip, read_clip, score_clips
from visionfuse.shapes.video_render import render_clips

__all__ = [
    "Actor",
    "Clip",
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
    "held_out_clips",
    "held_out_scenes",
    "is_held_out",
    "judge",
    "judge_clip",
    "pack",
    "parse",
    "parse_clip",
    "read",
    "read_clip",
    "render",
    "render_clips",
    "sample",
    "score",
    "score_clips",
    "training_clips",
    "training_scenes",
    "vocabulary",
]
