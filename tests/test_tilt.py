"""Cameras that look up, down or to a side are told from labels."""

from pathlib import Path

import numpy as np
import pytest

from scene.frames import Frame, make_labels
from scene.geometry import box_corners, clip_boxes, project
from tools.diagnosis import collect, diagnose, doubt_tilt


def tilted(angle, axis, derived=False):
    """Frames of a camera 6 m above level ground, tilted about x (0) or z (2); labels turn about the ground's normal."""
    rng, (c, s), found = np.random.default_rng(1), (np.cos(np.radians(angle)), np.sin(np.radians(angle))), []
    turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]] if axis == 0 else [[c, -s, 0], [s, c, 0], [0, 0, 1]])
    camera = np.array([[2100.0, 0, 960], [0, 2100, 540], [0, 0, 1]])
    for number in range(20):
        size = np.array([[4.2, 1.5, 1.8]] * 8) * rng.uniform(0.9, 1.1, (8, 1))
        center = np.stack([rng.uniform(-15, 15, 8), 6 - size[:, 1] / 2, rng.uniform(25, 90, 8)], 1)
        yaw = rng.uniform(-np.pi, np.pi, 8)
        corners, center = box_corners(center, size, yaw) @ turn.T, center @ turn.T
        corners = box_corners(center, size, yaw) if derived else corners
        pixels = project(corners, camera)
        box = np.concatenate([pixels.min(1), pixels.max(1)], 1)
        shown = (clip_boxes(box, 1920, 1080) == box).all(1)
        box = box if derived else box + rng.normal(0, 1, (8, 4))
        columns = [column[shown] for column in (box, size, center, yaw, np.zeros(8), np.zeros(8, int))]
        found.append(Frame(str(number), Path(f"{number}.png"), camera, make_labels(["Car"] * shown.sum(), *columns)))
    return found, np.array([(1920.0, 1080.0)] * 20)


@pytest.mark.parametrize(("angle", "axis", "words"), [
    (12, 0, "the camera looks pitched down by about 12 degrees"),
    (5, 0, "the camera looks pitched down by about 5 degrees"),
    (8, 2, "the camera looks rolled to its right by about 8 degrees"),
    (2, 0, ""), (0, 0, ""),
])  # fmt: skip
def test_tilted_cameras(angle, axis, words):
    boxes = collect(*tilted(angle, axis))
    problems = doubt_tilt(boxes, boxes)
    assert len(problems) == bool(words), problems
    assert words in " ".join(problems)
    assert not words or "rectify" in problems[0]


def test_tilted_cameras_without_2d_boxes_of_their_own():
    [problem] = diagnose(*tilted(12, 0, derived=True))[0]
    assert "the camera looks pitched down by about 12 degrees: with distance the bottoms of boxes rise so" in problem
