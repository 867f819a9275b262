"""Sessions that take no second copy of the weights."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from ffnfold.graph.model import Model
from ffnfold.runtime import open_session
from onnx import TensorProto, helper

WIDTH = 3072  # 38 MB of weight
MEASURE = """
import sys
import numpy as np
from ffnfold.graph.model import Model
from ffnfold.runtime import open_session

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

warm = open_session(sys.argv[1] + "/small.onnx", threads=1)
warm.run({"x": np.ones((1, 8), np.float32)})
model = Model.load(sys.argv[1] + "/large.onnx")
before = anonymous()
session = open_session(model, threads=1, lean=sys.argv[2] == "lean")
session.run({"x": np.ones((1, int(sys.argv[3])), np.float32)})
print((anonymous() - before) * 1024)
"""


def turned(workshop, weight, name, **settings):
    """y = x Wᵀ, the transpose of a constant as exporters write tied embeddings."""
    nodes = [helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]), helper.make_node("MatMul", ["x", "t"], ["y"])]
    return workshop.save(nodes, {"x": (TensorProto.FLOAT, ["n", weight.shape[1]])},
                         {"y": (TensorProto.FLOAT, ["n", weight.shape[0]])}, {"w": weight}, name, **settings)


def test_a_lean_session_computes_the_same(workshop, random):
    weight = random.standard_normal((48, 32), np.float32)
    path = turned(workshop, weight, "small.onnx")
    x = random.standard_normal((5, 32), np.float32)
    for source in (path, Model.load(path)):
        np.testing.assert_allclose(open_session(source, lean=True).run({"x": x})["y"], x @ weight.T, rtol=1e-4, atol=1e-5)


def test_a_table_that_is_transposed_and_resized(workshop, random):
    """ONNX Runtime moves the Transpose behind the Resize, which it then cannot do, unless it has folded it before."""
    table = random.standard_normal((1, 64, 64, 96), np.float32)
    nodes = [helper.make_node("Transpose", ["table"], ["t"], perm=[0, 3, 1, 2]),
             helper.make_node("Shape", ["x"], ["size"]),
             helper.make_node("Resize", ["t", "", "", "size"], ["r"], mode="cubic", coordinate_transformation_mode="half_pixel"),
             helper.make_node("Transpose", ["r"], ["b"], perm=[0, 2, 3, 1]),
             helper.make_node("Transpose", ["x"], ["a"], perm=[0, 2, 3, 1]), helper.make_node("Add", ["a", "b"], ["y"])]
    path = workshop.save(nodes, {"x": (TensorProto.FLOAT, [1, 96, "h", "w"])}, {"y": (TensorProto.FLOAT, [1, "h", "w", 96])},
                         {"table": table})
    x = random.standard_normal((1, 96, 48, 40), np.float32)
    ever, lean = (open_session(path, lean=lean).run({"x": x})["y"] for lean in (False, True))
    np.testing.assert_allclose(ever, lean, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_lean_session_holds_no_copy_of_weights_in_a_file(workshop, random, tmp_path):
    turned(workshop, random.standard_normal((8, 8), np.float32), "small.onnx")
    turned(workshop, random.standard_normal((WIDTH, WIDTH), np.float32), "large.onnx", save_as_external_data=True,
           location="large.bin", size_threshold=0)
    size = WIDTH * WIDTH * 4

    def grown(how: str) -> int:
        found = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path), how, str(WIDTH)], capture_output=True, text=True,
                               check=True)
        return int(found.stdout)

    assert grown("lean") < 0.3 * size
    assert grown("as ever") > 0.8 * size  # the folded transpose: what lean does without


def test_another_file_under_the_same_name_is_not_read(workshop, random):
    first, second = (random.standard_normal((64, 64), np.float32) for _ in range(2))
    path = workshop.linear(first, save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = Model.load(path)
    replacement = workshop.folder / "new.bin"
    replacement.write_bytes(second.tobytes())
    replacement.replace(workshop.folder / "weights.bin")
    x = random.standard_normal((1, 2, 64), np.float32)
    np.testing.assert_allclose(open_session(model).run({"x": x})["y"], np.maximum(x @ first, 0), rtol=1e-4, atol=1e-4)


def test_a_model_with_integer_weights_keeps_its_kernels(workshop, random):
    weight = random.integers(-90, 90, (32, 16)).astype(np.int8)
    nodes = [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
             helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"]), helper.make_node("Cast", ["i"], ["f"], to=1),
             helper.make_node("Mul", ["f", "s"], ["y"])]
    path = workshop.save(nodes, {"x": (TensorProto.FLOAT, ["n", 32])}, {"y": (TensorProto.FLOAT, ["n", 16])}, {"w": weight})
    x = random.standard_normal((5, 32), np.float32)
    ever, lean = (open_session(path, lean=lean).run({"x": x})["y"] for lean in (False, True))
    np.testing.assert_array_equal(ever, lean)
