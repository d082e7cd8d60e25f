"""Scenes: exact boxes, guarantees, transforms that agree with the pixels."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pairmill.procedural.scene import COLOURS, RELATIONS, SHAPES, SIZES, Scene, render, sample_scene

seeds = st.integers(0, 2**32)
few = settings(max_examples=40, deadline=None, derandomize=True)


def scene_of(seed: int, **wanted: int) -> Scene:
    return sample_scene(random.Random(seed), **wanted)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def without(scene: Scene, place: int) -> Scene:
    kept = tuple(thing for index, thing in enumerate(scene.objects) if index != place)
    return Scene(scene.width, scene.height, scene.background, kept)


@few
@given(seeds, st.sampled_from([(None, None), (224, 224), (64, 64), (500, 333)]))
def test_boxes_match_rendered_pixels(seed, size):
    scene = scene_of(seed)
    picture = pixels(render(scene, *size))
    for place, box in enumerate(scene.boxes(*size)):
        changed = np.abs(picture - pixels(render(without(scene, place), *size))).sum(axis=2) > 40
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert np.abs(np.array(found) - box).max() <= 1.5, (found, box)


@few
@given(seeds)
def test_objects_are_drawn_in_their_colour(seed):
    scene = scene_of(seed)
    picture = pixels(render(scene))
    for thing, (x1, y1, x2, y2) in zip(scene.objects, scene.boxes(), strict=True):
        inside = picture[int(y1) : int(y2) + 1, int(x1) : int(x2) + 1].reshape(-1, 3)
        share = (np.abs(inside - np.array(thing.rgb)).sum(axis=1) < 6).mean()
        assert share > 0.2
        assert np.abs(np.array(thing.rgb) - COLOURS[thing.colour]).max() <= 10


@few
@given(seeds)
def test_sampled_scenes_keep_their_guarantees(seed):
    scene = scene_of(seed)
    shorter = min(scene.width, scene.height)
    assert 1 <= len(scene.objects) <= 3
    assert 256 <= shorter <= 400
    assert max(scene.width, scene.height) <= min(512, shorter * 4 / 3)
    assert len({(thing.colour, thing.shape) for thing in scene.objects}) == len(scene.objects)
    for thing, (x1, y1, x2, y2) in zip(scene.objects, scene.boxes(), strict=True):
        assert 0 < x1 < x2 < scene.width
        assert 0 < y1 < y2 < scene.height
        low, high = SIZES[thing.size]
        assert low - 0.001 <= thing.extent / shorter <= high + 0.001
        assert thing.shape in SHAPES
    for a in range(len(scene.objects)):
        for b in range(len(scene.objects)):
            if a != b:
                held = [relation for relation in RELATIONS if scene.holds(a, relation, b)]
                assert held
                assert not {"left of", "right of"} <= set(held)
                assert not {"above", "below"} <= set(held)


@few
@given(seeds)
def test_relations_are_what_the_boxes_say_and_opposites_agree(seed):
    scene = scene_of(seed, objects=3)
    centres = [((x1 + x2) / 2 / scene.width, (y1 + y2) / 2 / scene.height) for x1, y1, x2, y2 in scene.boxes()]
    for a in range(3):
        for b in range(3):
            assert (
                scene.holds(a, "left of", b) == (centres[b][0] - centres[a][0] >= 0.1) == scene.holds(b, "right of", a)
            )
            assert scene.holds(a, "above", b) == (centres[b][1] - centres[a][1] >= 0.1) == scene.holds(b, "below", a)


def test_an_unknown_relation_is_an_error():
    with pytest.raises(ValueError, match="left of"):
        scene_of(0, objects=2).holds(0, "inside", 1)


@few
@given(seeds)
def test_json_round_trip(seed):
    scene = scene_of(seed)
    assert Scene.from_json(scene.to_json()) == scene
    assert Scene.from_json(scene.mirrored().to_json()) == scene.mirrored()


@few
@given(seeds)
def test_mirrored_scene_is_the_mirrored_picture(seed):
    scene = scene_of(seed)
    flipped = render(scene).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    difference = np.abs(pixels(render(scene.mirrored())) - pixels(flipped))
    assert difference.mean() < 0.5
    again = scene.mirrored().mirrored()
    assert again.background == scene.background
    assert np.allclose(again.boxes(), scene.boxes())


@few
@given(seeds)
def test_cropped_scene_is_the_cropped_picture(seed):
    scene = scene_of(seed)
    boxes = np.array(scene.boxes())
    crop = (
        int(min(12, boxes[:, 0].min())),
        int(min(7, boxes[:, 1].min())),
        scene.width - int(min(9, scene.width - boxes[:, 2].max())),
        scene.height - int(min(14, scene.height - boxes[:, 3].max())),
    )
    difference = np.abs(pixels(render(scene.cropped(*crop))) - pixels(render(scene).crop(crop)))
    assert difference.mean() < 1.0
    assert np.allclose(np.array(scene.cropped(*crop).boxes()), boxes - np.array([*crop[:2], *crop[:2]]))


def test_a_crop_that_cuts_an_object_is_an_error():
    scene = scene_of(1)
    x1 = int(scene.boxes()[0][0])
    with pytest.raises(ValueError, match="cuts an object"):
        scene.cropped(x1 + 3, 0, scene.width, scene.height)
    with pytest.raises(ValueError, match="inside"):
        scene.cropped(-1, 0, scene.width, scene.height)


@few
@given(seeds, st.sampled_from([10, 12, 15, 18]))
def test_resized_scene_is_the_resized_picture(seed, sixteenths):
    scene = scene_of(seed)
    small = scene.resized(sixteenths)
    resized = render(scene).resize((small.width, small.height), Image.Resampling.BICUBIC)
    assert np.abs(pixels(render(small)) - pixels(resized)).mean() < 1.5
    assert np.allclose(np.array(small.boxes()), np.array(scene.boxes()) * sixteenths / 16)


def test_different_scenes_look_different():
    pictures = [pixels(render(scene_of(seed), 32, 32)).ravel() for seed in range(150)]
    distances = [np.abs(pictures[a] - pictures[b]).mean() for a in range(150) for b in range(a)]
    assert min(distances) > 4


def test_wanted_kinds_are_drawn():
    kinds = (("black", "ring", "large"), ("white", "cross", "large"), ("black", "star", "small"))
    for seed in range(10):
        scene = sample_scene(random.Random(seed), kinds=kinds)
        assert tuple((thing.colour, thing.shape, thing.size) for thing in scene.objects) == kinds
    assert len(scene_of(1, objects=3).objects) == 3
    assert (scene_of(1, width=320, height=256).width, scene_of(1, width=320, height=256).height) == (320, 256)


def test_equal_seeds_give_equal_scenes():
    assert scene_of(5) == scene_of(5)
    assert scene_of(5) != scene_of(6)
    assert render(scene_of(5)).tobytes() == render(scene_of(5)).tobytes()
