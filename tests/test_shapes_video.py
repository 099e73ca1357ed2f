"""Videos of moving shapes: captions, drawing, and reading back what was drawn."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from visionfuse.shapes.captions import COLORS, HELD_OUT_PAIRS, SHAPES
from visionfuse.shapes.fidelity import accuracy
from visionfuse.shapes.video import (
    MOTIONS,
    ROUND,
    Actor,
    Clip,
    clip_vocabulary,
    held_out_clips,
    is_held_out,
    otherwise,
    parse_clip,
    sample,
    training_clips,
)
from visionfuse.shapes.video_fidelity import read_clip, score_clips
from visionfuse.shapes.video_render import FRAMES, TRAVEL, animate, pack_clips, render_clips, stage

EXAMPLE = "a green triangle moves left while a red circle stays still"


@pytest.fixture(scope="module")
def drawn() -> tuple[list[Clip], torch.Tensor]:
    clips = held_out_clips(24)
    return clips, render_clips(clips, 128)


def test_captions_are_read_back():
    rng = random.Random(0)
    clips = [sample(rng) for _ in range(300)]
    assert [parse_clip(clip.text) for clip in clips] == clips
    assert parse_clip(EXAMPLE).text == EXAMPLE
    assert {word for clip in clips for word in clip.text.split()} <= set(clip_vocabulary())
    assert {actor.motion for clip in clips for actor in clip.actors} == set(MOTIONS)
    assert not any(a.motion == "turns" and a.shape in ROUND for c in clips for a in c.actors)
    for wrong in ("a red circle", "a red circle moves left and a blue ring turns", ""):
        with pytest.raises(ValueError, match="write for example"):
            parse_clip(wrong)


def test_test_captions_are_never_trained_on():
    trained = {clip.text for clip in itertools.islice(training_clips(), 3000)}
    held_out = held_out_clips(300)
    assert len({clip.text for clip in held_out}) == 300
    assert not trained & {clip.text for clip in held_out}
    assert all(map(is_held_out, held_out))
    new = [any((a.color, a.shape) in HELD_OUT_PAIRS for a in clip.actors) for clip in held_out]
    assert new == [True, False] * 150


def test_a_seed_draws_the_same_video():
    clips = [parse_clip(EXAMPLE)]
    assert render_clips(clips, 64).shape == (1, FRAMES, 3, 64, 64)
    assert torch.equal(render_clips(clips, 64, seed=3), render_clips(clips, 64, seed=3))
    assert not torch.equal(render_clips(clips, 64, seed=3), render_clips(clips, 64, seed=4))


def test_shapes_go_where_the_caption_says():
    ways = {"moves left": (-TRAVEL, 0), "moves right": (TRAVEL, 0), "moves up": (0, -TRAVEL),
            "moves down": (0, TRAVEL), "stays still": (0, 0), "turns": (0, 0), "bounces": (0, 0)}  # fmt: skip
    actors = [Actor(color="red", shape="square", motion=motion) for motion in MOTIONS]
    packed = pack_clips([Clip(actors=(actor,)) for actor in actors])
    layout = animate(stage(packed), packed.motion)
    center = layout.center.unflatten(0, (-1, FRAMES))[:, :, 0]  # [motions, frames, 2]
    for motion, moved in zip(MOTIONS, center[:, -1] - center[:, 0], strict=True):
        assert moved.tolist() == pytest.approx(ways[motion], abs=1e-5), motion
    bounce = center[MOTIONS.index("bounces"), :, 1]
    assert bounce.max() - bounce.min() == pytest.approx(TRAVEL, rel=1e-5)
    assert layout.angle is not None
    turned = layout.angle.unflatten(0, (-1, FRAMES))[:, -1, 0].rad2deg().round().tolist()
    assert turned == [90.0 if motion == "turns" else 0.0 for motion in MOTIONS]


def test_nothing_leaves_the_picture_or_hides():
    packed = pack_clips(list(itertools.islice(training_clips(1), 500)))
    layout = animate(stage(packed, torch.Generator().manual_seed(0)), packed.motion)
    there = layout.shape >= 0
    reach = layout.radius * torch.where(layout.angle == 0, 1.0, 1.3)  # corners that turn
    room = torch.minimum(layout.center.amin(-1), 1 - layout.center.amax(-1)) - reach
    assert room[there].min() > 0
    both = there.all(1)
    assert (layout.center[both, 0, 0] + reach[both, 0] < 0.5).all()
    assert (layout.center[both, 1, 0] - reach[both, 1] > 0.5).all()


def test_what_is_drawn_is_read(drawn):
    clips, videos = drawn
    assert [v.reason for v in score_clips(videos, clips)] == [""] * len(clips)


@pytest.mark.slow
@pytest.mark.parametrize("side", [128, 256])
def test_the_reader_is_right_in_99_of_100(side):
    clips = held_out_clips(200, seed=side)
    assert accuracy(score_clips(render_clips(clips, side, seed=1), clips)) >= 0.99


def test_wrong_captions_are_rejected(drawn):
    clips, videos = drawn
    rng = random.Random(0)
    choices = {"shape": SHAPES, "color": tuple(COLORS), "motion": MOTIONS}
    for attribute, names in choices.items():
        wrong = []
        for clip in clips:
            taken = {getattr(actor, attribute) for actor in clip.actors}
            other = rng.choice([name for name in names if name not in taken])
            wrong.append(otherwise(clip, lambda a, n=attribute, o=other: replace(a, **{n: o})))
        reasons = {verdict.reason for verdict in score_clips(videos[:8], wrong[:8])}
        assert reasons == {attribute}
    swapped = [replace(c, actors=tuple(reversed(c.actors))) for c in clips]
    # The left one is named first, but a caption does not say so.
    assert accuracy(score_clips(videos[:4], swapped[:4])) == 1


def test_damaged_videos_are_rejected():
    clip = parse_clip("a red square moves left on a white background")
    video = render_clips([clip], 128)[0]
    assert score_clips([video], [clip])[0].right
    assert read_clip(video.flip(0))[1][0].motion == "moves right"
    still = video[:1].expand_as(video)
    assert score_clips([still], [clip])[0].reason == "motion"
    shuffled = video[torch.randperm(FRAMES, generator=torch.Generator().manual_seed(0))]
    assert score_clips([shuffled], [clip])[0].reason == "motion"
    gone = video.clone()
    gone[9] = video[0, :, :1, :1]
    assert score_clips([gone], [clip])[0].reason == "count"
    half = torch.cat([video[:9], render_clips([parse_clip("a blue square moves left on a white background")], 128)[0, 9:]])  # fmt: skip
    assert score_clips([half], [clip])[0].reason == "color"
    gray = video * 0.5
    assert score_clips([gray], [clip])[0].reason == "background"


def test_a_video_for_each_caption():
    with pytest.raises(ValueError, match="1 videos but 0 captions"):
        score_clips(torch.zeros(1, 2, 3, 32, 32), [])
