#!/usr/bin/env bash
# open3d 0.19.0 (open3d-cpu), open3d._ml3d.metrics.mAP: AP of 3D boxes, as Open3D-ML's detection pipelines report it on KITTI.
#
# Guess: precision at 11 (or 41) recalls from 0 to 1, 0 where a recall is not reached: a detector that finds a tenth of the
# objects cannot have more than a tenth or so, and leaving out detections never gains.
# What it does: where fewer than 11 of the sampled recalls are reached, it averages over those that are. One object of ten,
# found, is an AP of 100. Cutting a detector's list at a higher score raises its AP, up to 100 for its first true detection.
# What it means here: numbers of Open3D-ML are no KITTI numbers, unless recall is near 1; write results in KITTI's format and judge
# them with the official program, or with `python evaluate.py --labels ... --results ...`.
#
# Seen (Python 3.11), mAP beside AP at 11 recalls by hand, and recall:
#    10 of 100 objects, nothing false:            mAP 100.0, R11 18.2, recall 0.10
#    50 of 100 objects, nothing false:            mAP 100.0, R11 54.5, recall 0.50
#   100 of 100 objects, nothing false:            mAP 100.0, R11 100.0, recall 1.00
#    60 of 100 objects, half of the list false:   mAP 60.8, R11 36.9, recall 0.60
#   the first 9 of that list, 5 of them true:     mAP 71.9, R11 9.1, recall 0.05
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
"$folder/venv/bin/python" - <<'PY'
import numpy as np
from open3d._ml3d.metrics import mAP


def cars(count, offset=0.0):
    """Boxes (count, 7): x, y, z of the bottom centre, height, width, length, yaw; 20 m apart."""
    place = 20.0 * np.arange(count)
    return np.stack([place + offset, *(np.full(count, value) for value in (1.7, 10.0, 1.5, 1.6, 3.9, 0.0))], 1)


def table(boxes, scores):
    """The dict that the function takes."""
    count = len(boxes)
    return {"bbox": boxes, "label": np.full(count, "Car"), "score": scores, "difficulty": np.zeros(count, int)}


def by_hand(hits, objects):
    """AP at recalls 0, .1 ... 1: the highest precision at that recall or a higher one, 0 beyond the last."""
    true = np.cumsum(hits)
    recall, precision = true / objects, true / np.arange(1, len(hits) + 1)
    levels = (np.arange(11) / 10).clip(1 / objects)
    return 100 * np.mean([precision[recall >= level - 1e-9].max(initial=0) for level in levels])


def judge(name, hits, expected):
    """Print and compare what the function says of a list of true and false detections by falling score."""
    hits = np.array(hits, bool)
    true, false = cars(100)[: hits.sum()], cars(100, offset=10.0)[: (~hits).sum()]
    boxes = np.empty((len(hits), 7))
    boxes[hits], boxes[~hits] = true, false
    scores = np.linspace(0.9, 0.1, len(hits))
    score = float(mAP([table(boxes, scores)], [table(cars(100), np.ones(100))], ["Car"], [0], [0.7], bev=False)[0, 0, 0])
    right = by_hand(hits, 100)
    print(f"{name:45} mAP {score:.1f}, R11 {right:.1f}, recall {hits.sum() / 100:.2f}")
    assert abs(score - expected) < 0.1, f"changed: {score}"


judge(" 10 of 100 objects, nothing false:", [True] * 10, 100)
judge(" 50 of 100 objects, nothing false:", [True] * 50, 100)
judge("100 of 100 objects, nothing false:", [True] * 100, 100)
mixed = [True, False] * 60
judge(" 60 of 100 objects, half of the list false:", mixed, 60.8)
judge("the first 9 of that list, 5 of them true:", mixed[:9], 71.9)
PY
echo "as stated"
