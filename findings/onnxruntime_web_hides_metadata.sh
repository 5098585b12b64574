#!/usr/bin/env bash
# What an ONNX file says of itself (metadata_props) is out of reach in onnxruntime-web 1.30.0: its session knows names,
# types and shapes of inputs and outputs alone, where onnxruntime's sessions in Python, C, C# and Java give a map of them.
# A page that keeps classes or thresholds in the file, as exporters do, must read the protobuf itself: field 14 of
# ModelProto, a repeated message of key (1) and value (2).
# Needs node and npm. Seen with Node 20 and Python 3.11: Python gives {'classes': 'Car,Cyclist'}; in JavaScript no property of the session, at any
# depth, holds it. Exits with another code than 0 when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q onnx==1.23.2 onnxruntime==1.32.0
npm install --silent --no-audit --no-fund onnxruntime-web@1.30.0

venv/bin/python - <<'PYTHON'
import onnx
import onnxruntime
from onnx import TensorProto, helper

value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", value[:1], value[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
helper.set_model_props(model, {"classes": "Car,Cyclist"})
onnx.checker.check_model(model)
onnx.save(model, "model.onnx")
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
found = session.get_modelmeta().custom_metadata_map
print("onnxruntime", onnxruntime.__version__, "in Python:", found)
assert found == {"classes": "Car,Cyclist"}
PYTHON

node - <<'JAVASCRIPT'
const fs = require("fs"), ort = require("onnxruntime-web");
const hidden = "Car,Cyclist", seen = new Set(), names = new Set();
function holds(value) {
  if (typeof value === "string") return value.includes(hidden);
  if (value === null || typeof value !== "object" || seen.has(value) || ArrayBuffer.isView(value)) return false;
  seen.add(value);
  for (let owner = value; owner && owner !== Object.prototype; owner = Object.getPrototypeOf(owner))
    for (const name of Object.getOwnPropertyNames(owner)) {
      names.add(name);
      let inner;
      try { inner = value[name]; } catch { continue; }
      if (holds(inner)) return true;
    }
  return false;
}
(async () => {
  const bytes = fs.readFileSync("model.onnx");
  const session = await ort.InferenceSession.create(bytes);
  const result = await session.run({ x: new ort.Tensor("float32", [-1], [1]) });
  const found = holds(session);
  console.log("onnxruntime-web", ort.env.versions.web, "in JavaScript:", found ? "given" : "not given");
  console.log("all that a session has:", [...names].sort().join(" "));
  process.exit(bytes.includes(hidden) && result.y.data[0] === 0 && !found ? 0 : 1);
})();
JAVASCRIPT
