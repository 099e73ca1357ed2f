"""The shapes data set: captions, pictures, and the reader that judges them."""

import random
import zlib
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from visionfuse.shapes import (
    accuracy,
    arrange,
    breakdown,
    held_out_scenes,
    is_held_out,
    pack,
    parse,
    read,
    render,
    sample,
    score,
    training_scenes,
    vocabulary,
)
from visionfuse.shapes.captions import (
    BACKGROUNDS,
    BETWEEN,
    COLORS,
    HELD_OUT_PAIRS,
    KINDS,
    MAX_OBJECTS,
    PLACES,
    SHAPES,
    Scene,
)
from visionfuse.shapes.fidelity import check
from visionfuse.shapes.render import GAP, MARGIN

cv2 = pytest.importorskip("cv2")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return held_out_scenes(100, seed=3)


@pytest.fixture(scope="module")
def images(scenes: list[Scene]) -> torch.Tensor:
    return render(scenes, side=256, seed=5)


def test_training_never_names_a_held_out_pair():
    for scene in islice(training_scenes(seed=1), 5000):
        assert not is_held_out(scene)
        assert not HELD_OUT_PAIRS & {(group.color, group.shape) for group in scene.groups}


def test_held_out_captions_are_distinct_and_half_have_a_new_pair(scenes):
    assert len({scene.text for scene in scenes}) == len(scenes)
    assert all(is_held_out(scene) for scene in scenes)
    new = [HELD_OUT_PAIRS & {(g.color, g.shape) for g in scene.groups} for scene in scenes]
    assert sum(map(bool, new)) == len(scenes) // 2


def test_training_and_held_out_captions_do_not_overlap():
    test = {scene.text for scene in held_out_scenes(1000)}
    assert not test & {scene.text for scene in islice(training_scenes(), 20_000)}


def test_most_captions_name_two_objects_and_every_kind_occurs():
    drawn = list(islice(training_scenes(seed=2), 3000))
    assert sum(len(scene.groups) > 1 for scene in drawn) > len(drawn) / 2
    assert set(Counter(scene.kind for scene in drawn)) == set(KINDS)


def test_captions_parse_back():
    rng = random.Random(0)
    words = set()
    for scene in (sample(rng) for _ in range(2000)):
        assert parse(scene.text) == scene
        words |= set(scene.text.replace(",", " ,").split())
    assert words == set(vocabulary()) - {"from"}


def test_captions_of_a_seed_stay_the_same():
    """What flux-micro was trained on and is measured with."""
    test = held_out_scenes(500, seed=0)
    train = islice(training_scenes(seed=0), 5000)
    checksums = [zlib.crc32("\n".join(s.text for s in scenes).encode()) for scenes in (test, train)]
    assert checksums == [1816987358, 712946659]


@pytest.mark.parametrize(
    "text",
    [
        "a dog",
        "a mauve circle",
        "a red circle on the moon",
        "a red circle and a blue square from left to right",
        "",
    ],
)
def test_parse_says_what_it_cannot_read(text):
    with pytest.raises(ValueError, match="cannot read"):
        parse(text)


def test_layouts_keep_their_distances():
    layout = arrange(pack(held_out_scenes(2000)), torch.Generator().manual_seed(0))
    edge = layout.radius[..., None] + MARGIN - 1e-6
    assert ((layout.center >= edge) & (layout.center <= 1 - edge)).all()
    apart = (layout.center[:, :, None] - layout.center[:, None]).abs().amax(-1)
    room = apart - layout.radius[:, :, None] - layout.radius[:, None]
    present = layout.shape >= 0
    pairs = present[:, :, None] & present[:, None] & ~torch.eye(MAX_OBJECTS, dtype=torch.bool)
    assert room[pairs].min() >= GAP - 1e-5


def test_drawing_is_deterministic_and_seeded(scenes):
    first, again, other = (render(scenes[:8], 128, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (8, 3, 128, 128)
    assert first.min() >= 0
    assert first.max() <= 1


def test_a_scene_looks_the_same_at_every_resolution(scenes):
    large = render(scenes[:16], 512, seed=2)
    small = render(scenes[:16], 256, seed=2)
    assert (F.avg_pool2d(large, 2) - small).abs().mean() < 2e-3


@pytest.mark.parametrize(("side", "count"), [(128, 40), (512, 40)])
def test_true_pictures_are_right_at_other_sizes(scenes, side, count):
    verdicts = score(render(scenes[:count], side, seed=7), scenes[:count])
    assert accuracy(verdicts) >= 0.99, breakdown(verdicts)["reasons"]


def test_true_pictures_are_right(images, scenes):
    verdicts = score(images, [scene.text for scene in scenes])
    assert accuracy(verdicts) >= 0.99, breakdown(verdicts)["reasons"]


def test_every_color_shape_and_background_is_read():
    scenes = [
        parse(f"a {size} {color} {shape} on a {background} background")
        for color in COLORS
        for shape, size, background in zip(
            SHAPES, ["small", "large"] * 3, [*BACKGROUNDS, "white", "gray"], strict=True
        )
    ]
    verdicts = score(render(scenes, 256), scenes)
    assert all(verdict.right for verdict in verdicts)


def _spoiled(scene: Scene) -> dict[str, Scene]:
    """Captions that differ from `scene` in one named attribute, by the attribute."""
    first, rest = scene.groups[0], scene.groups[1:]
    used = {(group.color, group.shape) for group in scene.groups}
    color = next(c for c in COLORS if (c, first.shape) not in used and c != first.color)
    shape = next(s for s in SHAPES if (first.color, s) not in used and s != first.shape)
    spoiled = {
        "color": replace(scene, groups=(replace(first, color=color), *rest)),
        "shape": replace(scene, groups=(replace(first, shape=shape), *rest)),
        "count": replace(scene, groups=(replace(first, count=first.count % 4 + 1), *rest)),
    }
    if first.size:
        size = "large" if first.size == "small" else "small"
        spoiled["size"] = replace(scene, groups=(replace(first, size=size), *rest))
    if first.place:
        column, row = PLACES[first.place]
        flipped = (-column if column else column, -row if row else row)
        other = next(name for name, place in PLACES.items() if place == flipped)
        if other == first.place:
            other = "at the top"
        spoiled["place"] = replace(scene, groups=(replace(first, place=other), *rest))
    if scene.relation:
        axis, sign = BETWEEN[scene.relation]
        names = {place: name for name, place in BETWEEN.items()}
        spoiled["relation"] = replace(scene, relation=names[axis, -sign])
    if scene.background:
        other = next(name for name in BACKGROUNDS if name != scene.background)
        spoiled["background"] = replace(scene, background=other)
    return spoiled


def test_one_wrong_word_is_noticed(images, scenes):
    seen = Counter()
    for image, scene in list(zip(images, scenes, strict=True)):
        background, found = read(image)
        for name, wrong in _spoiled(scene).items():
            reason = check(wrong, background, found)
            assert reason, f"{scene.text!r} was accepted as {wrong.text!r}"
            seen[name] += 1
    assert set(seen) == {"color", "shape", "count", "size", "place", "relation", "background"}


def test_another_scenes_picture_is_wrong(images, scenes):
    assert accuracy(score(images[:50], scenes[1:51])) <= 0.01


@pytest.mark.parametrize("damage", ["noise", "blur", "jpeg"])
def test_mild_damage_is_forgiven(images, scenes, damage):
    chosen, scenes = images[:40], scenes[:40]
    if damage == "noise":
        noise = torch.randn(chosen.shape, generator=torch.Generator().manual_seed(0))
        damaged = chosen + 0.03 * noise
    elif damage == "blur":
        damaged = F.avg_pool2d(F.pad(chosen, (1, 1, 1, 1), "replicate"), 3, 1)
    else:
        damaged = [_through_jpeg(image) for image in chosen]
    verdicts = score(damaged, scenes)
    assert accuracy(verdicts) >= 0.97, breakdown(verdicts)["reasons"]


@pytest.mark.parametrize("ruin", ["speck", "missing", "melted"])
def test_ruined_pictures_are_wrong(ruin):
    scene = parse("a large red circle above a small blue square on a white background")
    image = render([scene], 256)[0]
    assert score([image], [scene])[0].right
    white = torch.tensor(BACKGROUNDS["white"])[:, None, None] / 255
    if ruin == "speck":
        image[:, 10:18, 10:18] = 0.0
    elif ruin == "missing":
        image[:, 128:] = white
    else:
        image = F.avg_pool2d(F.pad(image, (20, 20, 20, 20), "replicate"), 41, 1)
    assert not score([image], [scene])[0].right


def test_wrong_input_is_explained():
    with pytest.raises(ValueError, match="one for each"):
        score([], ["a red circle"])
    with pytest.raises(ValueError, match=r"convert\('RGB'\)"):
        score([np.zeros((64, 64), np.float32)], ["a red circle"])


def _through_jpeg(image: torch.Tensor) -> np.ndarray:
    rgb = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    _, data = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    return np.ascontiguousarray(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1])


@pytest.mark.parametrize(
    "text",
    [
        "two red circles above a blue square",
        "three red circles at the top",
        "a red circle in the center and a blue square",
        "a red circle in the center above a blue square on the left",
        "two red circles, two blue squares and a green ring",
    ],
)
def test_scenes_without_an_arrangement_are_refused(text):
    with pytest.raises(ValueError, match="cannot arrange"):
        render([parse(text)], 128)
