#!/usr/bin/env bash
# puncc 0.9.3 (conformal prediction), deel.puncc.object_detection.SplitBoxWise, "additive" and "multiplicative": from boxes and
# truth of a calibration set, an outer box that holds the true box with probability 1 - alpha, and an inner one.
#
# Guess: the promise holds for any detector, however biased, since the bias is in the calibration set: if boxes are 3 px too
# tight on each side, outer boxes are some 3 px wider on each side, and more for the noise.
# What it does: the error of all four coordinates is prediction - truth, but on the right and at the bottom the quantile of that
# is added, where the outer box needs the quantile of truth - prediction. So there a box that is too small is made smaller
# still: of boxes 3 px too tight, with 1 px of noise, not one in 20000 outer boxes holds its object where 90 % are promised; boxes
# too wide get more than is asked for on the right. Only errors as large in one direction as in the other come out right.
# What it means here: regressed sizes shrink towards the mean of the class, so that large boxes are too tight; take the quantiles
# of (predicted - true) for left and top and of (true - predicted) for right and bottom by hand.
#
# No misuse: the README guarantees covering the truth within alpha for exchangeable data, which these are; the pipeline is that
# of the class's example with a model that is trained already; the coverage is the package's own metric of outer boxes. What
# its theory page says of boxes is "TBC"; nothing asks for unbiased boxes.
# Seen (Python 3.11, numpy 1.26.4; calibration 20000 boxes, test 20000 boxes, noise 1 px; px by which left, top, right, bottom of
# the outer box lie outside the predicted one, the median over boxes):
#   unbiased   additive        2.0   1.9   2.0   2.0  held  90.3 % (promised 90)
#   unbiased   multiplicative  2.9   2.7   2.8   2.5  held  90.4 % (promised 90)
#   unbiased   by hand         2.0   1.9   2.0   2.0  held  90.4 % (promised 90)
#   3 px tight additive        5.0   4.9  -1.0  -1.0  held   0.0 % (promised 90)
#   3 px tight multiplicative 10.5   9.6  -0.9  -0.9  held   0.0 % (promised 90)
#   3 px tight by hand         5.0   4.9   5.0   5.0  held  90.4 % (promised 90)
#   3 px wide  additive       -1.0  -1.1   5.0   5.0  held  95.1 % (promised 90)
#   3 px wide  multiplicative -0.9  -1.0   8.9   7.6  held  95.1 % (promised 90)
#   3 px wide  by hand        -1.0  -1.1  -1.0  -1.0  held  90.4 % (promised 90)
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet puncc==0.9.3 numpy==1.26.4 scikit-learn==1.9.1 scipy==1.17.1 \
  pandas==3.0.6 matplotlib==3.11.2
cd "$folder"
venv/bin/python - <<'PY'
import numpy as np
from deel.puncc.api.prediction import BasePredictor
from deel.puncc.metrics import object_detection_mean_coverage
from deel.puncc.object_detection import SplitBoxWise

ALPHA, COUNT = 0.1, 20000
OUTWARDS = np.array([-1, -1, 1, 1])  # left, top, right, bottom: the direction that leads out of the box


class Detector:
    """A trained model whose features are its own boxes, as when detections are stored in a file."""

    def predict(self, boxes):
        return boxes


def by_hand(predicted, true, others):
    """Split conformal prediction, coordinate by coordinate, of how far the truth sticks out; alpha shared by four."""
    rank = int(np.ceil((len(true) + 1) * (1 - ALPHA / 4)))
    return others + OUTWARDS * np.sort(OUTWARDS * (true - predicted), axis=0)[rank - 1]


def held(outer, true):
    return float(np.all(OUTWARDS * (outer - true) >= 0, axis=1).mean())


random = np.random.default_rng(0)
corner = random.uniform([0, 100], [900, 200], (2 * COUNT, 2))
true = np.hstack([corner, corner + random.uniform([40, 30], [200, 120], (2 * COUNT, 2))])
noise = random.normal(0, 1, true.shape)
for words, margin in (("unbiased  ", 0), ("3 px tight", -3), ("3 px wide ", 3)):
    predicted = true + OUTWARDS * margin + noise
    rows = {}
    for method in ("additive", "multiplicative"):
        conformal = SplitBoxWise(BasePredictor(Detector(), is_trained=True), method=method, train=False)
        conformal.fit(X_calib=predicted[:COUNT], y_calib=true[:COUNT])
        rows[method] = conformal.predict(predicted[COUNT:], alpha=ALPHA)[2]
        assert object_detection_mean_coverage(rows[method], true[COUNT:]) == held(rows[method], true[COUNT:])
    rows["by hand"] = by_hand(predicted[:COUNT], true[:COUNT], predicted[COUNT:])
    for method, outer in rows.items():
        outside = np.median(OUTWARDS * (outer - predicted[COUNT:]), axis=0)
        covered = held(outer, true[COUNT:])
        print(f"{words} {method:14}{' '.join(f'{value:5.1f}' for value in outside)}  held {100 * covered:5.1f} % (promised 90)")
        if method == "by hand" or margin == 0:
            assert abs(covered - 0.9) < 0.03, f"as promised: {covered}"
        elif margin < 0:
            assert covered == 0 and np.all(outside[2:] < 0) and np.all(outside[:2] > 4), f"changed: {covered}, {outside}"
        else:
            assert np.all(outside[:2] < 2) and np.all(outside[2:] > 4), f"changed: {outside}"
PY
echo "as stated"
