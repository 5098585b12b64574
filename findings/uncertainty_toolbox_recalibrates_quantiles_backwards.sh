#!/usr/bin/env bash
# uncertainty-toolbox 0.1.1, recalibration.get_quantile_recalibrator (and get_proportion_under_quantile, get_proportion_lists*
# with prop_type="quantile", on which it rests).
#
# Guess: where predictions are a sigma too low, the recalibrated quantile lies a sigma higher: 90 % of the truth lies below the
# recalibrated quantile of .9, on the data that it was fitted to anyway.
# What it does: the share of truth below a quantile is counted with prediction - truth in place of truth - prediction, which is
# the share above the mirrored quantile. The fitted curve therefore sees the bias in the other direction, and the recalibrated
# quantile moves away from the truth by as much as it should have come nearer: a bias of one sigma becomes two, and 24 % of the
# truth lie below "90 %". Intervals (prop_type="interval") look at the error's size alone and are right (asserted); so are
# predictions without bias, which is why examples with symmetric errors show nothing.
# What it means here: depths that are too short by one sigma come out of recalibration too short by two; take the quantile of
# (truth - prediction) / sigma of the calibration set by hand.
#
# No misuse: the documented way (a recalibrator from mean, sigma and truth of a recalibration set, then called with mean, sigma
# and level). Its documentation has the proportion of data below the quantile, and its glossary explains calibration by rain that
# will not be more than x, which is truth below quantile. None of its issues tells of it (searched).
# Seen (Python 3.11, numpy 2.4.6, scikit-learn 1.9.1; 20000 distances of 30 m, sigma 1 m, normal errors laid out exactly):
#   unbiased     below 30 m + 1.28 sigma: by hand 90.0 %, counted 90.0 % | recalibrated 31.28 m, 90.0 % below; by hand 31.28 m
#   1 m too low  below 30 m + 1.28 sigma: by hand 61.1 %, counted 98.9 % | recalibrated 30.28 m, 23.6 % below; by hand 32.28 m
#   1 m too high below 30 m + 1.28 sigma: by hand 98.9 %, counted 61.1 % | recalibrated 32.28 m, 99.9 % below; by hand 30.28 m
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uncertainty-toolbox==0.1.1 numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1 \
  matplotlib==3.11.2
cd "$folder"
venv/bin/python - <<'PY'
from statistics import NormalDist

import numpy as np
from uncertainty_toolbox.metrics_calibration import get_proportion_under_quantile, get_quantile
from uncertainty_toolbox.recalibration import get_interval_recalibrator, get_quantile_recalibrator

COUNT, LEVEL = 20000, 0.9
z = NormalDist().inv_cdf(LEVEL)
errors = np.array([NormalDist().inv_cdf((k + 0.5) / COUNT) for k in range(COUNT)])
predicted, sigma = np.full(COUNT, 30.0), np.ones(COUNT)
for words, bias in (("unbiased   ", 0), ("1 m too low", 1), ("1 m too high", -1)):
    true = predicted + bias + errors
    plain = get_quantile(predicted, sigma, LEVEL)
    below = float(np.mean(true <= plain))
    counted = get_proportion_under_quantile(predicted, sigma, true, LEVEL)
    again = get_quantile_recalibrator(predicted, sigma, true)(predicted, sigma, LEVEL)
    share = float(np.mean(true <= again))
    bounds = get_interval_recalibrator(predicted, sigma, true)(predicted, sigma, LEVEL)
    inside = float(np.mean((true >= bounds.lower) & (true <= bounds.upper)))
    wanted = float(np.quantile(true, LEVEL))
    print(
        f"{words:12} below 30 m + 1.28 sigma: by hand {100 * below:4.1f} %, counted {100 * counted:4.1f} %"
        f" | recalibrated {again[0]:5.2f} m, {100 * share:4.1f} % below; by hand {wanted:5.2f} m"
    )
    assert abs(below - NormalDist().cdf(z - bias)) < 1e-3 and abs(wanted - (30 + bias + z)) < 0.01, "by hand"
    assert abs(counted - NormalDist().cdf(z + bias)) < 1e-3, f"changed: {counted}, the mirrored share"
    assert abs(again[0] - (30 - bias + z)) < 0.02, f"changed: {again[0]}, where the bias was doubled"
    assert abs(share - NormalDist().cdf(z - 2 * bias)) < 0.01, f"changed: {share}"
    assert abs(inside - LEVEL) < 0.01, f"intervals are right: {inside}"
PY
echo "as stated"
