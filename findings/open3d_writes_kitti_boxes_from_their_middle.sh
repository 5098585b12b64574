#!/usr/bin/env bash
# open3d 0.19.0 (open3d-cpu), BEVBox3D.to_kitti_format, with which Open3D-ML writes KITTI results (upstream: Open3D-ML #498).
#
# Guess: the 2D box of a line is x1, y1, x2, y2 of the projected 3D box, as KITTI's results have it.
# What it does: the middle of that box is written for its upper left corner, the middle and the size added for the lower right
# one: every 2D box lies half its width to the right and half its height too low, and overlaps its object by a seventh (IoU .14).
# What it means here: the 3D boxes of such results are right, but no 2D box reaches an overlap of .5; project them anew before the
# official program sees the files.
#
# Seen (Python 3.11), a car 12 m ahead, projected by hand, and as written:
#   by hand  532.71 180.66 709.84 293.09
#   written  621.27 236.87 798.41 349.31, IoU 0.14
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps \
  addict==2.4.0 annotated-types==0.8.0 asttokens==3.0.2 attrs==26.1.0 blinker==1.9.0 certifi==2026.10.19.post1 \
  charset-normalizer==3.5.3 click==8.5.1 cloudpickle==3.1.3 comm==0.2.3 ConfigArgParse==1.9.0 contourpy==1.3.3 \
  cycler==0.12.1 dash==4.4.1 executing==2.3.0 fastjsonschema==2.22.3 Flask==3.1.3 fonttools==4.68.0 idna==3.20 \
  importlib_metadata==10.2.0 ipython==9.18.1 ipython_pygments_lexers==1.1.1 ipywidgets==8.1.9 itsdangerous==2.2.0 \
  janus==2.0.0 jedi==0.20.1 Jinja2==3.1.6 joblib==1.6.0 jsonschema==4.26.0 jsonschema-specifications==2025.9.1 \
  jupyter_core==5.9.1 jupyterlab_widgets==3.0.17 kiwisolver==1.5.1 lazy-importer==0.1.0 MarkupSafe==3.0.4 \
  matplotlib==3.11.2 matplotlib-inline==0.2.2 narwhals==2.29.0 nbformat==5.11.1 nest-asyncio==1.6.0 numpy==2.4.6 \
  open3d-cpu==0.19.0 packaging==26.4 pandas==3.1.1 parso==0.8.7 pexpect==4.9.0 pillow==13.0.0 platformdirs==4.14.8 \
  plotly==7.1.0 prompt_toolkit==3.0.53 psutil==7.2.2 ptyprocess==0.7.0 pure_eval==0.2.4 pydantic==2.14.4 \
  pydantic_core==2.50.5 Pygments==2.21.0 pyparsing==3.3.3 python-dateutil==4.0.0 PyYAML==6.0.4 referencing==0.37.0 \
  requests==2.34.2 retrying==1.4.2 rpds-py==2026.9.1 scikit-learn==1.9.1 scipy==1.17.1 stack-data==0.6.3 \
  threadpoolctl==3.8.0 tqdm==4.70.1 traitlets==5.16.1 typing-inspection==0.4.5 typing_extensions==4.16.0 tzdata==2026.6 \
  urllib3==2.8.0 wcwidth==0.9.4 Werkzeug==3.1.9 widgetsnbextension==4.0.16 zipp==4.1.2
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import itertools
import math
from pathlib import Path

import numpy as np
from open3d.ml.datasets import KITTI

K = np.array([[720.0, 0, 610], [0, 720, 173], [0, 0, 1]])
P = np.column_stack([K, np.zeros(3)])
TO_CAMERA = np.array([[0.0, -1, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27]])  # of the lidar: x forward, y left, z up
HEIGHT, WIDTH, LENGTH, X, Y, Z, YAW = 1.5, 1.6, 3.9, 0.0, 1.65, 12.0, 1.2
lines = {"P0": P, "P1": P, "P2": P, "P3": P, "R0_rect": np.eye(3), "Tr_velo_to_cam": TO_CAMERA}
text = [f"{name}: {' '.join(f'{value:.9e}' for value in matrix.flat)}\n" for name, matrix in lines.items()]
Path("calib.txt").write_text("".join(text))

corners = np.array(list(itertools.product((-LENGTH / 2, LENGTH / 2), (-HEIGHT, 0), (-WIDTH / 2, WIDTH / 2))))
turn = np.array([[math.cos(YAW), 0, math.sin(YAW)], [0, 1, 0], [-math.sin(YAW), 0, math.cos(YAW)]])
pixels = (corners @ turn.T + [X, Y, Z]) @ K.T
pixels = pixels[:, :2] / pixels[:, 2:]
right = np.concatenate([pixels.min(0), pixels.max(0)])

box = " ".join(f"{value:.2f}" for value in right)
Path("label.txt").write_text(f"Car 0 0 {YAW - math.atan2(X, Z):.2f} {box} {HEIGHT} {WIDTH} {LENGTH} {X} {Y} {Z} {YAW}\n")
[label] = KITTI.read_label("label.txt", KITTI.read_calib("calib.txt"))
fields = label.to_kitti_format(0.9).split()
written = np.array(fields[4:8], float)

low, high = np.maximum(right[:2], written[:2]), np.minimum(right[2:], written[2:])
shared = np.prod(np.clip(high - low, 0, None))
overlap = shared / (sum(np.prod(one[2:] - one[:2]) for one in (right, written)) - shared)
print("by hand ", box)
print("written ", " ".join(fields[4:8]) + f", IoU {overlap:.2f}")
assert np.allclose(np.array(fields[8:15], float), [HEIGHT, WIDTH, LENGTH, X, Y, Z, YAW], atol=0.011), f"changed: {fields}"
middle, size = (right[:2] + right[2:]) / 2, right[2:] - right[:2]
assert np.allclose(written, np.concatenate([middle, middle + size]), atol=0.1), f"changed: {written}"
PY
echo "as stated"
