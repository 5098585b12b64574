#!/usr/bin/env bash
# zod 0.8.0 (Zenseact Open Dataset), zod.eval.detection.evaluate_nuscenes_style: mAP, mATE, mASE, mAOE and NDS of 3D detections.
#
# Guess: a mean error is the mean over the classes that were evaluated, as mAP is: with one class in the ground truth, mATE is its mATE.
# What it does: every class of the package's list that is not in the ground truth counts as one more class with an error of 0 (the table
# of errors answers 0 for a class that it has never heard of, and the mean asks for all 27). So vehicles alone, each found 1 m off
# and turned by .5 rad, have Vehicle/mATE 1.0 and mATE .037; their NDS is .681, where the same formula over what was evaluated
# gives .500. A second class found exactly as badly as the first makes NDS worse. mAP and the lists per class are right.
# The 27 hold classes and their own sub-classes (Vehicle and Vehicle_Car): no labelling uses all of them at once, so the dilution is always
# there: with the three road users, Vehicle, VulnerableVehicle and Pedestrian, errors are divided by nine. In nuScenes's own program a class
# without ground truth counts the other way, with an error of 1.
# What it means here: of this program take mAP and the per-class lines; its NDS and mean errors compare with nobody's.
#
# Seen (Python 3.11, numpy 2.4.6):
#   1 of 27 classes: mAP 0.500 mATE 0.037 (its classes: 1.000) mAOE 0.019 (its classes: 0.500) NDS 0.681 (its classes: 0.500)
#   2 of 27 classes: mAP 0.500 mATE 0.074 (its classes: 1.000) mAOE 0.037 (its classes: 0.500) NDS 0.674 (its classes: 0.500)
#   3 of 27 classes: mAP 0.500 mATE 0.111 (its classes: 1.000) mAOE 0.056 (its classes: 0.500) NDS 0.667 (its classes: 0.500)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps zod==0.8.0 numpy==2.4.6 pyquaternion==0.9.9 scipy==1.17.0 h5py==3.16.0 tqdm==4.70.1 \
  numpy-quaternion==2024.0.13 pillow==12.0.0 dataclass-wizard==0.30.1
"$folder/venv/bin/python" - <<'PY'
from pyquaternion import Quaternion
from zod.eval.detection import EVALUATION_CLASSES, DetectionBox, EvalBoxes, evaluate_nuscenes_style

OFF, TURNED, FRAMES = 1.0, 0.5, 10  # metres, radians


def box(frame, name, x, y, yaw, **more):
    """A box in the vehicle's frame, of a plausible size."""
    rotation = tuple(Quaternion(axis=[0, 0, 1], radians=yaw).elements.tolist())
    return DetectionBox(frame, (x, y, 0.0), (4.0, 2.0, 1.5), rotation, detection_name=name, **more)


def evaluate(names):
    """The package's numbers for truth of these classes and one detection for each box, 1 m too far and turned by .5 rad."""
    truth, found = EvalBoxes(), EvalBoxes()
    for frame in (f"{number:06}" for number in range(FRAMES)):
        places = [(name, 20.0 + 10.0 * index, 4.0 * row) for row, name in enumerate(names) for index in range(3)]
        truth.add_boxes(frame, [box(frame, name, x, y, 0.0, num_pts=9) for name, x, y in places])
        found.add_boxes(frame, [box(frame, name, x + OFF, y, TURNED, detection_score=0.9) for name, x, y in places])
    return evaluate_nuscenes_style(truth, found)


scores = []
for names in (["Vehicle"], ["Vehicle", "Pedestrian"], ["Vehicle", "VulnerableVehicle", "Pedestrian"]):
    seen = evaluate(names)
    own = {error: sum(seen[f"{name}/{error}"] for name in names) / len(names) for error in ("mATE", "mASE", "mAOE")}
    wanted = (5 * seen["mAP"] + sum(max(0.0, 1 - value) for value in own.values())) / 8
    text = f"{len(names)} of {len(EVALUATION_CLASSES)} classes: mAP {seen['mAP']:.3f}"
    for error in ("mATE", "mAOE"):
        text += f" {error} {seen[error]:.3f} (its classes: {own[error]:.3f})"
        assert abs(seen[error] - own[error] * len(names) / len(EVALUATION_CLASSES)) < 1e-9, f"changed: {seen}"
    print(f"{text} NDS {seen['NDS']:.3f} (its classes: {wanted:.3f})")
    assert abs(own["mATE"] - OFF) < 1e-6 and abs(own["mAOE"] - TURNED) < 1e-6 and abs(wanted - 0.5) < 1e-6
    scores.append(seen["NDS"])
assert abs(scores[0] - 0.6806) < 1e-3 and scores[0] > scores[1] > scores[2], f"changed: {scores}"
PY
echo "as stated"
