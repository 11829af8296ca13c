#!/usr/bin/env bash
# onnxruntime 1.32.0 (CPU), against torch 2.13.0 and numpy 2.4.6.
# Seen: for [1, nan, 5, 2] torch.argmax and numpy.argmax give the place of the nan, 1. ONNX Runtime's ArgMax
#   gives 2, as if the nan were not there, and ReduceMax gives 5; but with the nan in front, [nan, 1, 5, 2],
#   they give 0 and nan. TopK takes the nan as the largest wherever it stands.
# A good guess: an exported torch.argmax agrees with torch.argmax, and a nan shows in a maximum.
# Why it matters: a graph that picks its next token inside goes on with an ordinary id over damaged logits,
#   where torch would answer one odd id for ever; a check "the greedy ids are those of torch" passes and proves
#   nothing about nan. Ask the logits themselves (IsNaN), not their maximum.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
"$folder/venv/bin/python" - <<'PY'
import numpy
import onnxruntime
import torch
from onnx import TensorProto, helper


def run(values, operator, inputs, outputs, **attributes):
    """One operator of ONNX over the values; `outputs` are names, the last one is what is returned."""
    feed = {'x': numpy.array(values, numpy.float32), 'k': numpy.array([2])}
    types = {'x': TensorProto.FLOAT, 'k': TensorProto.INT64, 'value': TensorProto.FLOAT, 'id': TensorProto.INT64}
    graph = helper.make_graph(
        [helper.make_node(operator, inputs, outputs, **attributes)], operator,
        [helper.make_tensor_value_info(name, types[name], [None]) for name in inputs],
        [helper.make_tensor_value_info(name, types[name], None) for name in outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(outputs[-1:], {name: feed[name] for name in inputs})[0].tolist()


nan = float('nan')
for values, expected in ([1, nan, 5, 2], 2), ([1, 5, 2, nan], 1), ([nan, 1, 5, 2], 0):
    place = numpy.isnan(values).argmax().item()
    by_torch = torch.tensor(values).argmax().item()
    by_numpy = numpy.argmax(values).item()
    by_runtime = run(values, 'ArgMax', ['x'], ['id'], axis=0, keepdims=0)
    largest = run(values, 'ReduceMax', ['x'], ['value'], keepdims=0)
    best = run(values, 'TopK', ['x', 'k'], ['value', 'id'])
    print(f'{values}: torch {by_torch}, numpy {by_numpy}, ArgMax {by_runtime}, ReduceMax {largest}, TopK {best}')
    assert by_torch == by_numpy == place
    assert by_runtime == expected
    assert numpy.isnan(largest) == (place == 0)
    assert best[0] == place
PY
