#!/usr/bin/env bash
# onnxruntime 1.32.0: quantize_static(extra_options={"CalibMaxIntermediateOutputs": n}) forgets calibration frames.
# Documented: "it will load at max value number of outputs before computing and merging the range. This will produce the
# same result as all computing with None, but is more memory efficient." Seen: after every n frames MinMaxCalibrater
# drops what it has collected without computing a range, so that only the last (frames mod n) count: of 10 frames of
# falling brightness with n = 4 the range is that of the two darkest, and everything brighter is cut off; of 8 frames
# nothing is left. Seen on 2026-11-28, Python 3.11:
#   10 frames, the brightest of 10: range up to 10.00; with CalibMaxIntermediateOutputs=4 up to 2.00
#   8 frames, with CalibMaxIntermediateOutputs=4: ValueError: No data is collected.
# Exit code 0: still so. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - << 'END'
import logging

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

logging.disable(logging.WARNING)
weight = numpy_helper.from_array(np.full((1, 1, 3, 3), 1 / 9, np.float32), "weight")
node = helper.make_node("Conv", ["x", "weight"], ["y"], name="conv")
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, None, None]) for name in "xy")
graph = helper.make_graph([node], "one_convolution", [x], [y], [weight])
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), "model.onnx")


class Reader(CalibrationDataReader):
    def __init__(self, frames):
        self.frames = iter([{"x": np.full((1, 1, 8, 8), value, np.float32)} for value in range(frames, 0, -1)])

    def get_next(self):
        return next(self.frames, None)


def largest(frames, options):
    """The largest input that the quantised model can tell apart."""
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static("model.onnx", "int8.onnx", Reader(frames), extra_options=options, **types)
    values = {one.name: numpy_helper.to_array(one) for one in onnx.load("int8.onnx").graph.initializer}
    return float((255 - float(values["x_zero_point"])) * values["x_scale"])


whole, in_parts = largest(10, {}), largest(10, {"CalibMaxIntermediateOutputs": 4})
print(f"10 frames, the brightest of 10: range up to {whole:.2f}; with CalibMaxIntermediateOutputs=4 up to {in_parts:.2f}")
try:
    outcome = f"range up to {largest(8, {'CalibMaxIntermediateOutputs': 4}):.2f}"
except ValueError as error:
    outcome = f"ValueError: {error}"
print(f"8 frames, with CalibMaxIntermediateOutputs=4: {outcome}")
assert abs(whole - 10) < 0.1 and abs(in_parts - 2) < 0.1 and outcome == "ValueError: No data is collected."
END
