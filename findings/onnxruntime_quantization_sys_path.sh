#!/usr/bin/env bash
# onnxruntime 1.32.0: `import onnxruntime.quantization` appends its folder `transformers` to sys.path, for good.
# That folder holds metrics.py, benchmark.py, constants.py, float16.py, quantize_helper.py and more. A project whose own
# `metrics/` is a folder without __init__.py (a namespace package) loses it from then on, although its folder stands
# first on sys.path: a plain module anywhere on the path wins over namespace packages. Seen with
# Python 3.11:
#   added to sys.path: ['onnxruntime/transformers']
#   `metrics` before: a namespace (None); after: onnxruntime/transformers/metrics.py
# Exit code 0: still so. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
mkdir -p "$folder/project/metrics"
echo 'AP = 1' > "$folder/project/metrics/kitti.py"
cd "$folder/project"
"$folder/venv/bin/python" - << 'END'
import importlib.util
import sys

paths = [*sys.path]
before = importlib.util.find_spec("metrics").origin
import onnxruntime  # noqa: E402

assert sys.path == paths, "onnxruntime alone leaves it as it is"
import onnxruntime.quantization  # noqa: E402, F401

added = [path for path in sys.path if path not in paths]
after = importlib.util.find_spec("metrics").origin
print(f"added to sys.path: {[path.split('site-packages/')[-1] for path in added]}")
print(f"`metrics` before: a namespace ({before}); after: {after.split('site-packages/')[-1]}")
assert before is None and after.endswith("onnxruntime/transformers/metrics.py")
END
