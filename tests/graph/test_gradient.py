"""Derivatives: each rule against differences of the loss itself, and where the way back ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from ffn_graphs import Sketch, run
from ffnfold.graph.gradient.backward import add_gradients, path_from
from ffnfold.graph.gradient.tape import NoDerivativeError
from ffnfold.graph.model import Model
from ffnfold.runtime import open_session
from onnx import TensorProto

ROWS, D = 3, 4
X = np.random.default_rng(1).standard_normal((2, ROWS, D)).astype(np.float32)
After = Callable[[Sketch, str], str]


def positive(s: Sketch, h: str) -> str:
    return s.op("Add", s.op("Mul", h, h), s.weight(np.float32(0.5)))


def constant(s: Sketch, *shape: int) -> str:
    return s.weight(s.numbers(*shape, scale=1.0))


def integers(s: Sketch, *values: int) -> str:
    return s.weight(np.array(values, np.int64))


def cut(s: Sketch, h: str, start: int, end: int, axis: int, step: int = 1) -> str:
    return s.op("Slice", h, *(integers(s, each) for each in (start, end, axis, step)))


def halves(s: Sketch, h: str) -> str:
    first = s.op("Split", h, integers(s, 1, 3), axis=-1, out=["first", "second"])
    return s.op("Concat", "second", first, "second", axis=-1)


def first_half(s: Sketch, h: str) -> str:
    s.op("Split", h, integers(s, 1, 3), axis=-1, out=["first", "second"])
    return s.op("Identity", "second")


RULES: dict[str, After] = {
    "Add": lambda s, h: s.op("Add", h, constant(s, D)),
    "Sub": lambda s, h: s.op("Sub", constant(s, ROWS, 1), h),
    "Mul of itself": lambda s, h: s.op("Mul", h, h),
    "Mul of one number a row": lambda s, h: s.op("Mul", constant(s, 2, 1, D), cut(s, h, 0, 1, 1)),
    "Div": lambda s, h: s.op("Div", h, positive(s, h)),
    "Pow 2": lambda s, h: s.op("Pow", h, s.weight(np.float32(2))),
    "Pow 3": lambda s, h: s.op("Pow", h, s.weight(np.float32(3))),
    "Where": lambda s, h: s.op("Where", s.weight(np.arange(D) % 2 == 0), h, s.op("Neg", s.op("Mul", h, h))),
    "Max of equals": lambda s, h: s.op("Max", h, s.op("Identity", h)),
    "Slice by int32": lambda s, h: s.op("Slice", h, *(s.weight(np.array([each], np.int32)) for each in (0, 2, 1))),
    "LayerNormalization, axis 2": lambda s, h: s.op("LayerNormalization", h, constant(s, D), axis=2),
    "Max": lambda s, h: s.op("Max", h, constant(s, D)),
    "Min": lambda s, h: s.op("Min", h, constant(s, D)),
    "Clip": lambda s, h: s.op("Clip", h, s.weight(np.float32(-0.4)), s.weight(np.float32(0.6))),
    "Sqrt": lambda s, h: s.op("Sqrt", positive(s, h)),
    "Reciprocal": lambda s, h: s.op("Reciprocal", positive(s, h)),
    "Exp": lambda s, h: s.op("Exp", h), "Log": lambda s, h: s.op("Log", positive(s, h)), "Abs": lambda s, h: s.op("Abs", h),
    "Tanh": lambda s, h: s.op("Tanh", h), "Sigmoid": lambda s, h: s.op("Sigmoid", h), "Erf": lambda s, h: s.op("Erf", h),
    "Softplus": lambda s, h: s.op("Softplus", h), "Relu": lambda s, h: s.op("Relu", h), "Elu": lambda s, h: s.op("Elu", h),
    "LeakyRelu": lambda s, h: s.op("LeakyRelu", h, alpha=0.2), "Neg": lambda s, h: s.op("Neg", h),
    "Gelu": lambda s, h: s.op("Gelu", h), "Gelu by tanh": lambda s, h: s.op("Gelu", h, approximate="tanh"),
    "Dropout": lambda s, h: s.op("Dropout", h), "Cast": lambda s, h: s.op("Cast", h, to=TensorProto.FLOAT),
    "Sum": lambda s, h: s.op("Sum", h, s.op("Tanh", h), constant(s, D)),
    "MatMul of two values": lambda s, h: s.op("MatMul", h, s.op("Transpose", s.op("Tanh", h), perm=[0, 2, 1])),
    "MatMul with a stack": lambda s, h: s.op("MatMul", h, constant(s, 2, D, 5)),
    "Gemm": lambda s, h: s.op("Gemm", s.op("Reshape", h, integers(s, -1, D)),
                              s.op("Reshape", cut(s, h, 0, 1, 0), integers(s, D, 3)), constant(s, 3), alpha=0.7, beta=0.3),
    "Gemm, turned": lambda s, h: s.op("Gemm", s.op("Reshape", h, integers(s, -1, D)),
                                      s.op("Reshape", cut(s, h, 0, 1, 0), integers(s, 3, D)), transB=1),
    "Gemm's bias": lambda s, h: s.op("Gemm", constant(s, 6, 2), constant(s, 2, D), s.op("Reshape", h, integers(s, 6, D)),
                                     beta=2.0),
    "Softmax": lambda s, h: s.op("Softmax", h, axis=-1), "Softmax over rows": lambda s, h: s.op("Softmax", h, axis=1),
    "LogSoftmax": lambda s, h: s.op("LogSoftmax", h),
    "LayerNormalization": lambda s, h: s.op("LayerNormalization", h, constant(s, D), constant(s, D)),
    "its scale and shift": lambda s, h: s.op("LayerNormalization", constant(s, 2, ROWS, D), *(
        s.op("Reshape", cut(s, cut(s, h, 0, 1, 0), row, row + 1, 1), integers(s, D)) for row in (0, 1))),
    "ReduceMean": lambda s, h: s.op("ReduceMean", h, integers(s, 1), keepdims=0),
    "ReduceMean of all": lambda s, h: s.op("ReduceMean", s.op("Mul", h, h)),
    "ReduceSum": lambda s, h: s.op("ReduceSum", s.op("Mul", h, h), integers(s, 0, 2), keepdims=1),
    "ReduceL2": lambda s, h: s.op("ReduceL2", h, integers(s, -1)),
    "Transpose": lambda s, h: s.op("Transpose", h, perm=[2, 0, 1]), "Transpose all": lambda s, h: s.op("Transpose", h),
    "Flatten": lambda s, h: s.op("Flatten", h), "Unsqueeze": lambda s, h: s.op("Unsqueeze", h, integers(s, 1)),
    "Squeeze": lambda s, h: s.op("Squeeze", cut(s, h, 1, 2, 1), integers(s, 1)),
    "Expand": lambda s, h: s.op("Expand", s.op("Unsqueeze", h, integers(s, 1)), integers(s, 2, 5, 1, D)),
    "Concat and Split": halves, "one part of a Split": first_half,
    "Slice": lambda s, h: cut(s, h, 1, 3, -1), "Slice backwards": lambda s, h: cut(s, h, -1, -5, 2, -2),
    "Gather of one": lambda s, h: s.op("Gather", h, s.weight(np.int64(-1)), axis=1),
    "Gather of some": lambda s, h: s.op("Gather", h, integers(s, 2, 0, 2), axis=1),
    "RMSNorm of nodes": lambda s, h: s.op("Div", h, s.op("Sqrt", s.op("Add", s.op(
        "ReduceMean", s.op("Mul", h, h), integers(s, -1)), s.weight(np.float32(1e-3))))),
}


def net(after: After, opset: int = 20) -> Sketch:
    """y = after(x w + b); w and b are asked for."""
    s = Sketch(opset)
    product = s.op("MatMul", s.input("x", ["batch", "rows", D]), s.weight(s.numbers(D, D), "w"))
    h = s.op("Add", product, s.weight(s.numbers(D), "b"))
    s.op("Identity", after(s, h), out=s.output("y"))
    return s


def slopes(s: Sketch, folder: Path, seed: np.ndarray, weights: list[str]) -> dict[str, np.ndarray]:
    model = Model.load(s.save(folder / "m.onnx"))
    found = add_gradients(model, {"y": gs.Variable("seed")}, weights)
    session = open_session(model, outputs=list(found.values()), inputs={"seed": TensorProto.FLOAT}, threads=1)
    taken = {spec.name for spec in session.inputs}
    given = session.run({name: array for name, array in {"x": X, "seed": seed}.items() if name in taken})
    return {name: given[value] for name, value in found.items()}


@pytest.mark.parametrize("case", RULES)
def test_a_slope_is_what_the_loss_changes_by(tmp_path, case):
    s = net(RULES[case])
    y = run(s.model(), {"x": X})["y"]
    seed = np.random.default_rng(2).standard_normal(y.shape).astype(np.float32)
    found = slopes(s, tmp_path, seed, ["w", "b"])
    random = np.random.default_rng(3)
    for name in ("w", "b"):
        held = np.frombuffer(s.initializers[name].raw_data, np.float32).reshape(tuple(s.initializers[name].dims))
        way = random.standard_normal(held.shape).astype(np.float32)
        ends = []
        for step in (2e-3, -2e-3):
            s.weight(held + np.float32(step) * way, name)
            ends.append(float(np.vdot(run(s.model(), {"x": X})["y"].astype(np.float64), seed)))
        s.weight(held, name)
        assert found[name].shape == held.shape
        assert float(np.vdot(found[name], way)) == pytest.approx((ends[0] - ends[1]) / 4e-3, rel=0.02, abs=0.02)


def test_a_weight_that_is_read_twice_gets_both(tmp_path):
    def again(s: Sketch, h: str) -> str:
        return s.op("MatMul", h, "w")

    once, twice = (slopes(net(after), tmp_path, np.ones((2, ROWS, D), np.float32), ["w"])["w"]
                   for after in (lambda s, h: s.op("MatMul", h, constant(s, D, D)), again))
    assert not np.allclose(once, twice)
    s = net(again)
    w = np.frombuffer(s.initializers["w"].raw_data, np.float32).reshape(D, D).astype(np.float64)
    b = np.frombuffer(s.initializers["b"].raw_data, np.float32).astype(np.float64)
    x, ones = X.reshape(-1, D).astype(np.float64), np.ones((2 * ROWS, D))
    np.testing.assert_allclose(twice, x.T @ (ones @ w.T) + (x @ w + b).T @ ones, rtol=1e-4, atol=1e-4)


def test_a_model_of_opset_13_has_them_too(tmp_path):
    s = net(lambda s, h: s.op("ReduceMean", s.op("Mul", h, h), axes=[-1], keepdims=0), opset=13)
    assert set(slopes(s, tmp_path, np.ones((2, ROWS), np.float32), ["w", "b"])) == {"w", "b"}


def test_the_way_back_ends_at_an_operator_without_a_rule(tmp_path):
    s = net(lambda s, h: s.op("Mul", s.op("Hardmax", s.op("Tanh", h, out="t")), constant(s, D)))
    path = path_from(Model.load(s.save(tmp_path / "m.onnx")), ["w"])
    assert (path.ends, path.blocked) == (("t",), ("Hardmax",))


def test_comparisons_and_shapes_are_no_ends(tmp_path):
    s = net(lambda s, h: s.op("Where", s.op("Greater", h, s.weight(np.float32(0))), h, s.op(
        "ConstantOfShape", s.op("Shape", h))))
    path = path_from(Model.load(s.save(tmp_path / "m.onnx")), ["w"])
    assert (path.ends, path.blocked) == (("y",), ())


def test_what_a_rule_does_not_cover_is_named_and_can_be_left_out(tmp_path):
    s = net(lambda s, h: s.op("Pow", s.weight(np.float32(2)), s.op("Tanh", h, out="t"), out="p"))
    model = Model.load(s.save(tmp_path / "m.onnx"))
    with pytest.raises(NoDerivativeError, match=r"^p$"):
        add_gradients(model, {"y": gs.Variable("seed")}, ["w"])
    assert path_from(model, ["w"], frozenset({"p"})).ends == ("t",)


def test_a_norm_whose_mean_is_read_is_not_covered(tmp_path):
    s = net(lambda s, h: s.op("Add", s.op("LayerNormalization", h, constant(s, D), out=["n", "mean"]), "mean"))
    with pytest.raises(NoDerivativeError, match="n"):
        add_gradients(Model.load(s.save(tmp_path / "m.onnx")), {"y": gs.Variable("seed")}, ["w"])


def test_another_type_ends_the_way(tmp_path):
    s = net(lambda s, h: s.op("Cast", s.op("Tanh", h, out="t"), to=TensorProto.DOUBLE))
    assert path_from(Model.load(s.save(tmp_path / "m.onnx")), ["w"]).ends == ("t",)


def test_a_value_that_a_branch_reads_is_an_end(tmp_path):
    s = net(lambda s, h: s.op("Tanh", h, out="t"))
    s.nodes.pop()
    inner, other = Sketch(), Sketch()
    inner.op("Identity", "t", out=inner.output("then_y"))
    other.op("Neg", "t", out=other.output("else_y"))
    s.op("If", s.weight(np.array(True)), out="y", then_branch=inner.graph("then"), else_branch=other.graph("else"))
    path = path_from(Model.load(s.save(tmp_path / "m.onnx")), ["w"])
    assert (path.ends, path.blocked) == (("t",), ("If",))
