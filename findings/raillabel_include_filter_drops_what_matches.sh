#!/usr/bin/env bash
# raillabel 4.2.0 (Deutsche Bahn's kit for annotated train rides, OSDaR23 among them: 3D boxes, 2D boxes, lidar segments),
# raillabel.filter.IncludeAttributesFilter, used by Scene.filter.
#
# Guess: what its text says: of the annotations those are left out that lack the attribute or have another value of it; what has
# the attribute with that value stays.
# What it does: it goes through the attributes of the annotation instead of those that were asked for. An annotation that has
# any attribute besides is dropped, although it matches; one without any attribute stays, although it has not the one asked for.
# In files whose annotations have several attributes each, asking for one gives an empty scene, or what is bare. Asking for two
# lets everything pass that has one of them. Nothing is printed. ExcludeAttributesFilter does what it says.
# What it means here: select boxes by attribute (occlusion, truncation) with one's own loop over frame.annotations.
#
# No misuse: the call is the README's own example ("color": "red"), and the class's text says the opposite of what it does.
# Known upstream: pull request #76 of dbinfrago/raillabel changed the loop; 4.2.0 is still the newest on PyPI.
# Seen (Python 3.11, pydantic 2.14.4; boxes A: red; B: red, occlusion 0-25 %; C: blue; D: no attribute; E: occlusion 0-25 %):
#   asked for color red: by its text ['A', 'B']   kept ['A', 'D']
#   asked for any color: by its text ['A', 'B', 'C']   kept ['A', 'C', 'D']
#   asked for color red, occlusion 0-25 %: by its text ['B']   kept ['A', 'B', 'D', 'E']
#   the filter that excludes, color red: by its text ['C', 'D', 'E']   kept ['C', 'D', 'E']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps raillabel==4.2.0 pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0 \
  typing-extensions==4.16.0 typing-inspection==0.4.5 eval-type-backport==0.2.0
cd "$folder"
venv/bin/python - <<'PY'
import json
from uuid import UUID

import raillabel
from raillabel.filter import ExcludeAttributesFilter, IncludeAttributesFilter

BOXES = {
    "A": {"color": "red"},
    "B": {"color": "red", "occlusion": "0-25 %"},
    "C": {"color": "blue"},
    "D": {},
    "E": {"occlusion": "0-25 %"},
}

cuboids = []
for place, (letter, attributes) in enumerate(BOXES.items()):
    cuboid = {
        "name": "lidar__cuboid__rail_vehicle",
        "uid": str(UUID(int=ord(letter))),
        "coordinate_system": "lidar",
        "val": [10.0 * place, 0, 1.5, 0, 0, 0, 1, 20, 3, 4],
    }
    if attributes:
        cuboid["attributes"] = {"text": [{"name": name, "val": value} for name, value in attributes.items()]}
    cuboids.append(cuboid)
train = str(UUID(int=1))
pose = {"translation": [0, 0, 0], "quaternion": [0, 0, 0, 1]}
content = {
    "metadata": {"schema_version": "1.0.0"},
    "coordinate_systems": {
        "base": {"parent": "", "type": "local", "children": ["lidar"]},
        "lidar": {"parent": "base", "type": "sensor", "pose_wrt_parent": pose},
    },
    "streams": {"lidar": {"type": "lidar"}},
    "objects": {train: {"name": "train", "type": "rail_vehicle"}},
    "frames": {"0": {"objects": {train: {"object_data": {"cuboid": cuboids}}}}},
}
with open("scene.json", "w") as file:
    json.dump({"openlabel": content}, file)
scene = raillabel.load("scene.json")


def kept(selected):
    return [chr(uid.int) for frame in selected.frames.values() for uid in frame.annotations]


def has(attributes, name, value):
    return name in attributes and (value is None or attributes[name] == value)


assert kept(scene) == list(BOXES)
for asked, seen in (
    ({"color": "red"}, ["A", "D"]),
    ({"color": None}, ["A", "C", "D"]),
    ({"color": "red", "occlusion": "0-25 %"}, ["A", "B", "D", "E"]),
):
    by_text = [letter for letter in BOXES if all(has(BOXES[letter], *item) for item in asked.items())]
    found = kept(scene.filter([IncludeAttributesFilter(asked)]))
    words = ", ".join(f"{name} {value}" if value else f"any {name}" for name, value in asked.items())
    print(f"asked for {words}: by its text {by_text}   kept {found}")
    assert found == seen != by_text, "changed"
by_text = [letter for letter in BOXES if not has(BOXES[letter], "color", "red")]
found = kept(scene.filter([ExcludeAttributesFilter({"color": "red"})]))
print(f"the filter that excludes, color red: by its text {by_text}   kept {found}")
assert found == by_text
PY
echo "as stated"
