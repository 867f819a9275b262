"""What is told of a value's shape: no more than is sure."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch
from ffnfold.graph.broadcast import features, keeps_rank, rank
from ffnfold.graph.model import Model

D, WIDE = 8, 24


def output(s: Sketch, value: str, folder):
    s.op("Identity", value, out=s.output("y"))
    onnx.save_model(s.model(), folder / "m.onnx")
    return Model.load(folder / "m.onnx").graph.outputs[0].inputs[0].inputs[0]


def drawn(shape) -> tuple[Sketch, str]:
    s = Sketch()
    return s, s.input("x", shape)


@pytest.mark.parametrize(("shape", "axes"), [(["batch", D], 2), (["batch", "tokens", D], 3), (None, None)])
def test_a_product_has_the_axes_of_what_is_multiplied(tmp_path, shape, axes):
    s, x = drawn(shape)
    value = output(s, s.op("Relu", s.linear(x, D, WIDE)), tmp_path)
    assert (rank(value), features(value)) == (axes, WIDE)
    assert keeps_rank(value, (1, 1, WIDE)) == (axes == 3)
    assert keeps_rank(value, (WIDE,))


def test_a_product_of_a_vector(tmp_path):
    s, x = drawn([D])
    assert rank(output(s, s.op("MatMul", x, s.weight(s.numbers(D, WIDE))), tmp_path)) == 1
    s, x = drawn([D])
    assert rank(output(s, s.op("MatMul", x, s.input("other", [D, "columns"])), tmp_path)) is None


def test_a_sum_has_no_fewer_axes_than_what_is_added(tmp_path):
    s, x = drawn(None)
    value = output(s, s.norm(s.op("Add", x, s.op("Relu", s.input("other", ["batch", "tokens", D]))), D), tmp_path)
    assert rank(value) is None
    assert keeps_rank(value, (1, 1, D))
    assert not keeps_rank(value, (1, 1, 1, D))


def test_a_wide_operand_gives_the_width_and_a_narrow_one_does_not(tmp_path):
    s, x = drawn(["batch", "width"])
    wide = s.op("Add", x, s.weight(s.numbers(D)))
    assert features(output(s, s.op("Mul", wide, s.weight(s.numbers(1))), tmp_path)) == D
    s, x = drawn(["batch", "width"])
    assert features(output(s, s.op("Mul", x, s.weight(s.numbers(1))), tmp_path)) is None


def test_rows_flattened_for_a_gemm(tmp_path):
    s, x = drawn(None)
    rows = s.op("Reshape", x, s.weight(np.asarray([-1, D])))
    value = output(s, s.op("Gemm", rows, s.weight(s.numbers(WIDE, D)), transB=1), tmp_path)
    assert (rank(value), features(value)) == (2, WIDE)


def test_a_reshape_to_sizes_read_from_the_input(tmp_path):
    s, x = drawn(["batch", "tokens", D])
    tokens = s.op("Unsqueeze", s.op("Gather", s.op("Shape", x), s.weight(np.asarray(1))), s.weight(np.asarray([0])))
    target = s.op("Concat", s.weight(np.asarray([-1])), tokens, s.weight(np.asarray([2, D // 2])), axis=0)
    assert rank(output(s, s.op("Reshape", x, target), tmp_path)) == 4


def test_nothing_is_known_of_operators_of_other_sets(tmp_path):
    s, x = drawn(["batch", D])
    value = output(s, s.op("Relu", x, domain="someone.else"), tmp_path)
    assert (rank(value), features(value)) == (None, None)


@pytest.mark.parametrize(("stated", "keeps"), [(["batch", "tokens", D], True), (["batch", D], False), (None, False)])
def test_a_sum_of_more_axes_than_the_constant_has_them_from_the_other_operand(tmp_path, stated, keeps):
    s, x = drawn(None)
    total = s.op("Add", x, s.weight(s.numbers(1, D)))
    if stated:
        s.info(total, stated)
    value = output(s, total, tmp_path)
    assert keeps_rank(value.inputs[0].inputs[0], (1, D), value) == keeps
