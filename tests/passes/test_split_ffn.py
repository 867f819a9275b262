"""split-ffn: which neurons stay, what the rest becomes, and which blocks it leaves alone."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, ops, run, transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.model import Model
from rewriting import Branch, feeds_of, in_branch, rewrite

D, FF = 16, 48
FIT = feeds_of((8, 16, D), 10, seed=11)
[X] = feeds_of((4, 9, D))
storages = pytest.mark.parametrize("storage", ["weight-only", "dynamic", "float"])


def with_quiet_neurons(loud: int, *, gated: bool = False) -> Sketch:
    """A block of which all neurons but the first ``loud`` hardly reach the output."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    down = s.numbers(FF, D)
    down[loud:] *= 1e-3
    hidden = s.activation("gelu", s.linear(x, D, FF))
    if gated:
        hidden = s.op("Mul", hidden, s.linear(x, D, FF))
    s.op("Add", x, s.op("Add", s.op("MatMul", hidden, s.weight(down)), s.weight(s.numbers(D))), out=s.output("y"))
    return s


@storages
@pytest.mark.parametrize("gated", [False, True])
def test_loud_neurons_stay_as_they_are(tmp_path, storage, gated):
    s = with_quiet_neurons(12, gated=gated)
    model, [result] = rewrite(s, tmp_path, f"split-ffn:keep=12,multiple=1,storage={storage}", fit=FIT)
    assert (result.fired, result.refused) == (1, [])
    assert drift(run(s.model(), X), run(model, X)) < 5e-3


@storages
@pytest.mark.parametrize("kind", [{"activation": "gelu"}, {"activation": "silu", "gated": True, "bias": False}])
def test_the_rest_says_something_too(tmp_path, storage, kind):
    """It loses less than the same neurons alone, refitted (slim-ffn)."""
    s = transformer(2, D, FF, **kind)
    before = run(s.model(), X)
    model, [result] = rewrite(s, tmp_path, f"split-ffn:keep=12,multiple=1,ratio=0.7,storage={storage}", fit=FIT)
    slim, _ = rewrite(s, tmp_path, "slim-ffn:keep=12,multiple=1,affine=false,select=wanda", fit=FIT)
    assert result.fired == 2
    assert drift(before, run(model, X)) < 0.85 * drift(before, run(slim, X))


def test_the_rest_is_stored_as_int8(tmp_path):
    model, _ = rewrite(transformer(1, D, FF), tmp_path, "split-ffn:keep=16,multiple=1", fit=FIT)
    proto, _ = model.to_proto()
    stored = {onnx.TensorProto.DataType.Name(each.data_type): 0 for each in proto.graph.initializer if len(each.dims) == 2}
    for each in proto.graph.initializer:
        if len(each.dims) == 2:
            stored[onnx.TensorProto.DataType.Name(each.data_type)] += int(np.prod(each.dims))
    rest = FF - 16
    assert stored["FLOAT"] == 2 * D * 16
    assert 0 < stored["INT8"] <= 0.5 * 2 * D * rest


def test_integer_products(tmp_path):
    model, _ = rewrite(transformer(1, D, FF, gated=True, activation="silu"), tmp_path,
                       "split-ffn:keep=16,multiple=1,storage=dynamic", fit=FIT)
    assert ops(model).count("MatMulIntegerToFloat") == 6
    assert ops(model).count("QuantizeLinear") == 5  # up and gate read one


def of_convolutions() -> Sketch:
    s = Sketch()
    x = s.op("Transpose", s.input("x", ["batch", "tokens", D]), perm=[0, 2, 1])
    hidden = s.activation("gelu", s.op("Conv", x, s.weight(s.numbers(FF, D, 1)), s.weight(s.numbers(FF))))
    y = s.op("Conv", hidden, s.weight(s.numbers(D, FF, 1)), s.weight(s.numbers(D)))
    s.op("Transpose", s.op("Add", x, y), perm=[0, 2, 1], out=s.output("y"))
    return s


def of_flat_rows() -> Sketch:
    """Gemm on rows, the residual beside them in three axes."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    flat = s.op("Reshape", x, s.weight(np.asarray([-1, D])))
    hidden = s.activation("gelu", s.op("Gemm", flat, s.weight(s.numbers(FF, D) / 2), s.weight(s.numbers(FF)), transB=1))
    y = s.op("Gemm", hidden, s.weight(s.numbers(D, FF) / 2), s.weight(s.numbers(D)), transB=1)
    s.op("Add", x, s.op("Reshape", y, s.op("Shape", x)), out=s.output("y"))
    return s


@pytest.mark.parametrize("graph", [of_convolutions, of_flat_rows])
def test_other_forms_of_the_same_block(tmp_path, graph):
    s = graph()
    model, [result] = rewrite(s, tmp_path, "split-ffn:keep=24,multiple=1,ratio=0.9", fit=FIT)
    assert (result.fired, result.refused) == (1, [])
    assert drift(run(s.model(), X), run(model, X)) < 0.35


def test_weights_that_blocks_share_are_split_for_each(tmp_path):
    s = Sketch()
    stream = s.input("x", ["batch", "tokens", D])
    up, bias, down = (s.weight(s.numbers(*shape)) for shape in ((D, FF), (FF,), (FF, D)))
    for _ in range(2):
        hidden = s.activation("gelu", s.op("Add", s.op("MatMul", s.norm(stream, D), up), bias))
        stream = s.op("Add", stream, s.op("MatMul", hidden, down))
    s.op("Identity", stream, out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "split-ffn:keep=24,multiple=1,blocks=1", fit=FIT)
    assert (result.fired, result.refused) == (1, [])
    assert drift(run(s.model(), X), run(model, X)) < 0.3


def test_a_float16_model_stays_one(tmp_path):
    s = Sketch(dtype=np.float16, opset=21)
    x = s.input("x", ["batch", "tokens", D])
    s.op("Add", x, s.ffn(s.norm(x, D), D, FF, activation="gelu"), out=s.output("y"))
    feeds = [{"x": feed["x"].astype(np.float16)} for feed in FIT]
    model, [result] = rewrite(s, tmp_path, "split-ffn:keep=24,multiple=1,ratio=0.9", fit=feeds)
    after = run(model, feeds[0])
    assert (result.fired, after["y"].dtype) == (1, np.float16)
    assert drift(run(s.model(), feeds[0]), after) < 0.3


def test_a_block_inside_a_branch_cannot_be_measured(tmp_path):
    inner = Branch()
    s = in_branch(inner, inner.op("Add", "x", inner.ffn("x", D, FF)), ["batch", "tokens", D])
    _, [result] = rewrite(s, tmp_path, "split-ffn:multiple=1", fit=[{**feed, "wanted": np.asarray(True)} for feed in FIT])
    assert result.fired == 0
    assert "subgraph" in result.refused[0].reason


@pytest.mark.parametrize(("plan", "says"), [
    ("keep=48", "all of its 48 neurons would stay"), ("keep=47,multiple=1", "the other 1 neurons have too few numbers")])
def test_where_nothing_would_be_gained(tmp_path, plan, says):
    _, [result] = rewrite(transformer(1, D, FF), tmp_path, f"split-ffn:{plan}", fit=FIT)
    assert result.fired == 0
    assert says in result.refused[0].reason


def test_a_norm_over_the_neurons_is_left_alone(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    s.op("Add", x, s.linear(s.norm(s.activation("gelu", s.linear(x, D, FF)), FF), FF, D), out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "split-ffn", fit=FIT)
    assert (result.fired, [each.reason for each in result.refused]) == (0, ["its neurons are normed together"])
    assert isinstance(model, Model)


@pytest.mark.parametrize("text", ["keep=0", "keep=1.5", "ratio=1", "multiple=0", "storage=int4"])
def test_options_that_make_no_sense(tmp_path, text):
    with pytest.raises(InputError):
        rewrite(transformer(1), tmp_path, f"split-ffn:{text}", fit=FIT)
