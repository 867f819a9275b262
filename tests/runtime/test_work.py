"""Operations and bytes of graphs, against what they are on paper."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import Sketch, transformer
from ffnfold.runtime.work import count_work
from onnx import TensorProto

ROWS, D, FF = 6, 8, 32


def feed(*shape, name="x", dtype=np.float32):
    return {name: np.ones(shape, dtype)}


def test_a_transformer(tmp_path):
    path = transformer(2, D, FF).save(tmp_path / "model.onnx")
    found = count_work(path, feed(2, 3, D))
    assert found.operations == {"float32": 2 * 2 * 2 * ROWS * D * FF}
    weights = 2 * (2 * D * FF + FF + D + 2 * D)  # projections, biases, norm
    assert found.weight_bytes == 4 * weights
    assert found.edge_bytes == 4 * 2 * ROWS * D
    assert found.bytes == found.weight_bytes + found.edge_bytes
    assert found.total_operations == found.operations["float32"]


def test_the_work_grows_with_the_rows_and_the_weights_do_not(tmp_path):
    path = transformer(1, D, FF).save(tmp_path / "model.onnx")
    one, many = count_work(path, feed(1, 1, D)), count_work(path, feed(4, 16, D))
    assert many.total_operations == 64 * one.total_operations
    assert many.weight_bytes == one.weight_bytes


def one_node(op, *weights, shape, tmp_path, **attributes):
    s = Sketch()
    s.op(op, s.input("x", shape), *(s.weight(weight) for weight in weights), out=s.output("y"), **attributes)
    return s.save(tmp_path / "model.onnx")


@pytest.mark.parametrize(("op", "shape", "weight", "attributes", "count"), [
    ("MatMul", (2, 3, 8), (8, 5), {}, 2 * 6 * 8 * 5),
    ("MatMul", (8,), (8, 5), {}, 2 * 8 * 5),
    ("Gemm", (6, 8), (8, 5), {}, 2 * 6 * 8 * 5),
    ("Gemm", (8, 6), (5, 8), {"transA": 1, "transB": 1}, 2 * 6 * 8 * 5),
    ("Conv", (1, 3, 10, 10), (4, 3, 3, 3), {"pads": [1, 1, 1, 1]}, 2 * 4 * 100 * 27),
    ("Conv", (1, 4, 10, 10), (4, 1, 3, 3), {"pads": [1, 1, 1, 1], "group": 4}, 2 * 4 * 100 * 9),
    ("Einsum", (2, 3, 8), (8, 5), {"equation": "...i,io->...o"}, 2 * 6 * 8 * 5),
    ("Einsum", (2, 3, 8), (2, 8, 5), {"equation": "bti,bio->bto"}, 2 * 6 * 8 * 5),
    ("Add", (6, 8), (8,), {}, 0),
])
def test_single_operators(tmp_path, op, shape, weight, attributes, count):
    path = one_node(op, np.ones(weight, np.float32), shape=shape, tmp_path=tmp_path, **attributes)
    found = count_work(path, feed(*shape))
    assert found.total_operations == count
    assert found.weight_bytes == 4 * np.prod(weight)


def test_of_an_embedding_only_the_rows_are_read(tmp_path):
    s = Sketch()
    s.op("Gather", s.weight(np.ones((1000, D), np.float32)), s.input("ids", ["n"], TensorProto.INT64), out=s.output("y"))
    found = count_work(s.save(tmp_path / "model.onnx"), feed(5, name="ids", dtype=np.int64))
    assert found.weight_bytes == 5 * D * 4


def test_integer_weights_count_as_int8(tmp_path):
    s = Sketch()
    x = s.input("x", ["n", D])
    s.op("DynamicQuantizeLinear", x, out=["q", "scale", "zero"])
    product = s.op("MatMulInteger", "q", s.weight(np.ones((D, FF), np.int8)), "zero")
    s.op("Mul", s.op("Cast", product, to=1), "scale", out=s.output("y", ["n", FF]))
    found = count_work(s.save(tmp_path / "model.onnx"), feed(ROWS, D))
    assert found.operations == {"int8": 2 * ROWS * D * FF}
    assert found.weight_bytes == D * FF


def test_a_constant_behind_identity_is_read(tmp_path):
    s = Sketch()
    weight = s.op("Transpose", s.weight(np.ones((FF, D), np.float32)), perm=[1, 0])
    s.op("MatMul", s.input("x", ["n", D]), weight, out=s.output("y", ["n", FF]))
    assert count_work(s.save(tmp_path / "model.onnx"), feed(ROWS, D)).weight_bytes == 4 * D * FF
