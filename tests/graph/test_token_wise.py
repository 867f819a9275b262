"""Which operators treat each token by itself: what the table says, against what ONNX Runtime gives for some of the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from ffn_graphs import Sketch, run
from ffnfold.graph.model import Model
from ffnfold.graph.token_wise import Kind, is_token_wise
from onnx import TensorProto

B, T, D = 2, 3, 4
MICROSOFT = "com.microsoft"
KINDS = {3: Kind.TOKENS, 2: Kind.MATRIX}
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


def constants(*arrays: Any) -> list[np.ndarray]:
    return [np.asarray(each) for each in arrays]


RANDOM = np.random.default_rng(0)
MATRIX, LIST = RANDOM.normal(size=(D, 5)).astype(np.float32), RANDOM.normal(size=D).astype(np.float32)
ONE, MANY = np.float32(2), RANDOM.normal(size=(T, D)).astype(np.float32)
AXES = {axis: np.asarray([axis], np.int64) for axis in (-1, 0, 1, 2)}

# operator, domain, its other inputs, attributes, how many outputs, opset
WISE: list[tuple[str, str, list[np.ndarray], dict[str, Any], int, int]] = [
    ("MatMul", "", constants(MATRIX), {}, 1, 17), ("FusedMatMul", MICROSOFT, constants(MATRIX.T.copy()), {"transB": 1}, 1, 17),
    ("Add", "", constants(LIST), {}, 1, 17), ("Mul", "", constants(ONE), {}, 1, 17),
    ("Div", "", constants(LIST[None, None]), {}, 1, 17),
    ("Erf", "", [], {}, 1, 17), ("Gelu", "", [], {}, 1, 20), ("BiasGelu", MICROSOFT, constants(LIST), {}, 1, 17),
    ("Cast", "", [], {"to": TensorProto.DOUBLE}, 1, 17),
    ("Clip", "", constants(np.float32(-1), np.float32(1)), {}, 1, 17),
    ("LayerNormalization", "", constants(LIST), {"axis": -1}, 1, 17),
    ("LayerNormalization", "", constants(LIST), {"axis": 2}, 1, 17),
    ("SimplifiedLayerNormalization", "", constants(LIST), {"axis": -1}, 1, 17),
    ("Softmax", "", [], {"axis": -1}, 1, 17), ("Softmax", "", [], {}, 1, 17), ("Softmax", "", [], {"axis": 2}, 1, 11),
    ("ReduceMean", "", [], {"axes": [-1]}, 1, 17), ("ReduceMax", "", constants(AXES[2]), {}, 1, 18),
    ("Split", "", [], {"axis": 2}, 2, 17), ("Slice", "", constants(AXES[1], AXES[2] + 1, AXES[-1]), {}, 1, 17),
    ("Gather", "", constants(np.asarray([1, 0], np.int64)), {"axis": 2}, 1, 17),
    ("QuantizeLinear", "", constants(np.float32(0.1)), {}, 1, 17),
    ("QuantizeLinear", "", constants(np.abs(LIST)), {"axis": 2}, 1, 17),
]
MIXING: list[tuple[str, str, list[np.ndarray], dict[str, Any], int, int]] = [
    ("Add", "", constants(MANY), {}, 1, 17), ("Softmax", "", [], {"axis": 1}, 1, 17), ("Softmax", "", [], {}, 1, 11),
    ("LayerNormalization", "", constants(MANY), {"axis": 1}, 1, 17), ("ReduceMean", "", [], {"axes": [1]}, 1, 17),
    ("ReduceMean", "", [], {"axes": [1, 2]}, 1, 17), ("ReduceMean", "", [], {}, 1, 17),
    ("ReduceMean", "", [], {"axes": [2], "keepdims": 0}, 1, 17),
    ("ReduceMax", "", [], {}, 1, 18), ("Split", "", [], {"axis": 1}, 1, 17), ("Split", "", [], {}, 1, 17),
    ("Slice", "", constants(AXES[0], AXES[1], AXES[1]), {}, 1, 17), ("Slice", "", constants(AXES[0], AXES[1]), {}, 1, 17),
    ("Gather", "", constants(np.asarray([1, 0], np.int64)), {"axis": 1}, 1, 17),
    ("CumSum", "", constants(np.int64(1)), {}, 1, 17), ("Transpose", "", [], {"perm": [1, 0, 2]}, 1, 17),
    ("QuantizeLinear", "", constants(np.abs(MANY[:, 0]) + 0.1), {"axis": 1}, 1, 17),
    ("MatMul", "", constants(RANDOM.normal(size=(B, D, D)).astype(np.float32)), {}, 1, 17),
    ("BatchNormalization", "", constants(*[np.abs(MANY[:, 0]) + 0.5] * 4), {}, 1, 17),
]
ALL = [*[(each, True) for each in WISE], *[(each, False) for each in MIXING]]
NAMES = [f"{each[0]}-{number}" for number, (each, _) in enumerate(ALL)]


def sketch(case: tuple[str, str, list[np.ndarray], dict[str, Any], int, int], rows: tuple[Any, Any]) -> Sketch:
    op, domain, others, attrs, outputs, opset = case
    s = Sketch(opset)
    s.domains |= {domain} - {""}
    names = [f"y{number}" for number in range(outputs)]
    s.op(op, s.input("x", [*rows, D]), *map(s.weight, others), out=names, domain=domain, **attrs)
    kind = attrs.get("to", TensorProto.UINT8 if op == "QuantizeLinear" else FLOAT)
    for name in names:
        s.output(name, None, kind)
    return s


def node_of(s: Sketch, folder: Any) -> gs.Node:
    [node] = Model.load(s.save(folder / "model.onnx")).graphs()[0][1].nodes
    return node


def kind_of(shapes: dict[str, tuple[int, ...]]) -> Any:
    """As measured: by shape, a value with one row for each token or none."""
    def kind(tensor: gs.Tensor) -> Kind:
        shape = tuple(tensor.shape) if isinstance(tensor, gs.Constant) else shapes[tensor.name]
        if len(shape) == 3 and shape[:2] == (B, T):
            return Kind.TOKENS
        if all(dim == 1 for dim in shape[:-1]):
            return Kind.SAME
        return Kind.MATRIX if len(shape) == 2 else Kind.OTHER
    return kind


@pytest.mark.parametrize(("case", "wise"), ALL, ids=NAMES)
def test_what_acts_on_each_token_by_itself(tmp_path, case, wise):
    x = RANDOM.normal(size=(B, T, D)).astype(np.float32)
    s = sketch(case, ("b", "t"))
    found = run(s.model(), {"x": x})
    shapes = {"x": x.shape, **{name: value.shape for name, value in found.items()}}
    assert is_token_wise(node_of(s, tmp_path), kind_of(shapes), case[-1]) is wise
    if wise:
        kept = np.asarray([True, False, True, True, False, False])
        some = run(s.model(), {"x": x.reshape(-1, D)[kept][None]})
        for name, value in found.items():
            assert np.allclose(some[name][0], value.reshape(-1, value.shape[-1])[kept], atol=1e-6)


def test_another_domain_is_not_known(tmp_path):
    s = Sketch()
    s.op("Erf", s.input("x", [B, T, D]), out=s.output("y", [B, T, D]), domain="of.mine")
    assert not is_token_wise(node_of(s, tmp_path), kind_of({"x": (B, T, D), "y": (B, T, D)}), 17)


def test_a_matrix_in_front_mixes(tmp_path):
    s = Sketch()
    s.op("MatMul", s.weight(RANDOM.normal(size=(T, T)).astype(np.float32)), s.input("x", [B, T, D]), out=s.output("y", [B, T, D]))
    assert not is_token_wise(node_of(s, tmp_path), kind_of({"x": (B, T, D), "y": (B, T, D)}), 17)
