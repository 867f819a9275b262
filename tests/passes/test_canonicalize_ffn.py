"""canonicalize-ffn: what a block looks like afterwards, that it computes the same, and what stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from ffn_graphs import ACTIVATIONS, Sketch, drift, ops, optimized_ops, run, transformer
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.passes.base import PassResult
from onnx import TensorProto
from rewriting import Branch, feeds_of, in_branch, rewrite

D, WIDE = 8, 32
X = feeds_of((2, 5, D))[0]
ALL = "canonicalize-ffn:all=true"


def canonicalize(source: Sketch, folder: Path, *, again: bool = False, tolerance: float = 2e-6) -> tuple[Model, PassResult]:
    """The model afterwards: it computes the same, ONNX Runtime executes no more nodes, and the file is no larger."""
    model, [result] = rewrite(source, folder, ALL if again else "canonicalize-ffn")
    feed = {info.name: X[info.name] for info in source.inputs if info.name in X}
    feed |= {info.name: np.asarray(True) for info in source.inputs if info.type.tensor_type.elem_type == TensorProto.BOOL}
    feed |= {info.name: np.asarray([1, 0], np.int64) for info in source.inputs
             if info.type.tensor_type.elem_type == TensorProto.INT64}
    if source.dtype == np.float16:
        feed = {name: array.astype(np.float16) if array.dtype == np.float32 else array for name, array in feed.items()}
    assert drift(run(folder / "before.onnx", feed), run(folder / "after.onnx", feed)) < tolerance
    before, after = (optimized_ops(folder / name, folder) for name in ("before.onnx", "after.onnx"))
    assert len(after) <= len(before), (before, after)
    assert _stored(folder / "after.onnx") <= _stored(folder / "before.onnx")
    return model, result


def _stored(path: Path) -> int:
    """Bytes of the weights: of what is more than a number."""
    model = onnx.load(path)
    tensors = [*model.graph.initializer, *(attribute.t for node in model.graph.node for attribute in node.attribute)]
    return sum(len(tensor.raw_data) for tensor in tensors if np.prod(tensor.dims) > 1)


def residual(branch: Callable[[Sketch, str], str], opset: int = 17, shape: tuple[object, ...] = ("batch", "tokens", D),
             dtype: type = np.float32) -> Sketch:
    """y = x + branch(x)"""
    s = Sketch(opset, dtype=dtype)
    x = s.input("x", shape)  # type: ignore[arg-type]
    s.op("Add", x, branch(s, x), out=s.output("y", shape))  # type: ignore[arg-type]
    return s


def gemm(s: Sketch, x: str, d_in: int, d_out: int, *, turned: bool = True, bias: bool = True) -> str:
    """A Gemm as TorchScript (weight [d_out, d_in]) or the dynamo exporter writes it."""
    weight = s.numbers(d_in, d_out)
    inputs = [s.weight(np.ascontiguousarray(weight.T) if turned else weight)]
    return s.op("Gemm", x, *inputs, *([s.weight(s.numbers(d_out, scale=0.3))] if bias else []), transB=int(turned))


def sizes_of(s: Sketch, x: str, *last: int) -> str:
    """The list [x.shape[0], x.shape[1], last]."""
    shape = s.op("Shape", x)
    dims = [s.op("Unsqueeze", s.op("Gather", shape, s.weight(np.asarray(axis))), s.weight(np.asarray([0]))) for axis in (0, 1)]
    return s.op("Concat", *dims, s.weight(np.asarray(last)), axis=0)


def flat(s: Sketch, x: str, activation: str, *, order: tuple[int, int] = (0, 1)) -> str:
    """A block on rows flattened to two dimensions."""
    rows = s.op("Reshape", x, s.weight(np.asarray([-1, D])))
    y = gemm(s, s.activation(activation, gemm(s, rows, D, WIDE)), WIDE, D)
    shape = sizes_of(s, x, D)
    return s.op("Reshape", y, shape if order == (0, 1) else s.op("Gather", shape, s.weight(np.asarray([*order, 2]))))


def initializers(model: Model) -> dict[str, list[int]]:
    return {tensor.name: list(tensor.dims) for tensor in model.to_proto()[0].graph.initializer}


# what is canonical already

@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"identity"}))
@pytest.mark.parametrize("gated", [False, True])
def test_a_canonical_block_stays_byte_for_byte(activation, gated, tmp_path):
    source = transformer(1, activation=activation, gated=gated)
    _, result = canonicalize(source, tmp_path)
    assert (result.fired, result.refused) == (0, [])
    assert onnx.load(tmp_path / "after.onnx").graph == source.model().graph


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"identity"}))
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("opset", [13, 20])
def test_all_writes_a_canonical_block_again(activation, gated, opset, tmp_path):
    source = transformer(2, activation=activation, gated=gated, opset=opset)
    source.dtype = np.dtype(np.float32)
    if opset < 17:
        source = transformer(2, activation=activation, gated=gated, opset=opset, pre_norm=False)
    model, result = canonicalize(source, tmp_path, again=True)
    assert result.fired == 2
    matrices = {name for name, dims in initializers(model).items() if len(dims) == 2}
    assert len(matrices) == (6 if gated else 4)
    assert not matrices & set(source.initializers)
    assert [(b.d_model, b.d_ff, b.gated, b.activation.name) for b in find_ffn_blocks(model)] == [(D, WIDE, gated, activation)] * 2


# linears

def test_a_transposed_weight_is_stored_as_it_is_multiplied(tmp_path):
    def branch(s: Sketch, x: str) -> str:
        up = s.op("MatMul", x, s.op("Transpose", s.weight(s.numbers(WIDE, D)), perm=[1, 0]))
        return s.op("MatMul", s.op("Relu", up), s.op("Identity", s.weight(s.numbers(WIDE, D))))

    model, result = canonicalize(residual(branch), tmp_path)
    assert result.fired == 1
    assert ops(model) == ["MatMul", "Relu", "MatMul", "Add"]
    assert sorted(initializers(model).values()) == [[D, WIDE], [WIDE, D]]


def test_a_weight_in_a_constant_node_becomes_an_initializer(tmp_path):
    def branch(s: Sketch, x: str) -> str:
        up = s.op("Constant", value=onnx.numpy_helper.from_array(s.numbers(D, WIDE)))
        return s.op("MatMul", s.op("Relu", s.op("MatMul", x, up)), s.weight(s.numbers(WIDE, D)))

    model, result = canonicalize(residual(branch), tmp_path)
    assert result.fired == 1
    assert ops(model) == ["MatMul", "Relu", "MatMul", "Add"]


def test_a_gemm_of_two_dimensional_rows_stays_one_and_keeps_its_activation_fused(tmp_path):
    def branch(s: Sketch, x: str) -> str:
        return gemm(s, s.op("Relu", gemm(s, x, D, WIDE)), WIDE, D)

    X2 = {"x": X["x"].reshape(-1, D)}
    source = residual(branch, shape=("rows", D))
    model, [result] = rewrite(source, tmp_path, "canonicalize-ffn")
    assert result.fired == 1
    assert drift(run(source.model(), X2), run(model, X2)) < 1e-6
    assert ops(model) == ["Gemm", "Relu", "Gemm", "Add"]
    assert sorted(initializers(model).values()) == [[D], [D, WIDE], [WIDE], [WIDE, D]]
    assert optimized_ops(tmp_path / "after.onnx", tmp_path) == ["FusedGemm", "Gemm", "Add"]


def test_factors_of_a_gemm_go_into_its_weights(tmp_path):
    def branch(s: Sketch, x: str) -> str:
        up = s.op("Gemm", x, s.weight(s.numbers(D, WIDE)), s.weight(s.numbers(WIDE)), alpha=0.5, beta=3.0)
        return gemm(s, s.op("Relu", up), WIDE, D, turned=False)

    source = residual(branch, shape=("rows", D))
    model, [result] = rewrite(source, tmp_path, "canonicalize-ffn")
    X2 = {"x": X["x"].reshape(-1, D)}
    assert result.fired == 1
    assert drift(run(source.model(), X2), run(model, X2)) < 1e-6
    assert not any("alpha" in node.attrs or "beta" in node.attrs for node in model.graph.nodes if node.op == "Gemm"
                   and node.attrs.get("alpha", 1.0) != 1.0)


def test_a_convolution_stays_one(tmp_path):
    s = Sketch(17)
    x = s.input("x", [2, D, 3, 3])
    up = s.op("Conv", x, s.weight(s.numbers(WIDE, D, 1, 1)), s.weight(s.numbers(WIDE)), kernel_shape=[1, 1])
    y = s.op("Conv", s.activation("gelu", up), s.weight(s.numbers(D, WIDE, 1, 1)), s.weight(s.numbers(D)), kernel_shape=[1, 1])
    s.op("Add", x, y, out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, ALL)
    feed = feeds_of((2, D, 3, 3))[0]
    assert result.fired == 1
    assert drift(run(s.model(), feed), run(model, feed)) < 1e-6
    assert ops(model).count("Conv") == 2


# reshapes

def test_rows_are_not_flattened_where_that_saves_nodes(tmp_path):
    model, result = canonicalize(residual(lambda s, x: flat(s, x, "gelu")), tmp_path)
    assert result.fired == 1
    assert ops(model) == ["MatMul", "Add", "Div", "Erf", "Add", "Mul", "Mul", "MatMul", "Add", "Add"]
    assert optimized_ops(tmp_path / "after.onnx", tmp_path).count("Reshape") == 0


def test_rows_stay_flattened_where_that_saves_nothing(tmp_path):
    model, result = canonicalize(residual(lambda s, x: flat(s, x, "relu")), tmp_path)
    assert result.fired == 1  # its weights were transposed
    assert ops(model).count("Reshape") == 2
    assert ops(model).count("Gemm") == 2


def test_rows_that_come_back_in_other_dimensions_stay_flattened(tmp_path):
    source = residual(lambda s, x: flat(s, x, "gelu", order=(1, 0)), shape=(5, 5, D))
    model, [_] = rewrite(source, tmp_path, "canonicalize-ffn")
    feed = feeds_of((5, 5, D))[0]
    assert drift(run(source.model(), feed), run(model, feed)) < 1e-6
    assert ops(model).count("Reshape") == 2


def test_rows_stay_flattened_where_something_else_reads_them(tmp_path):
    def branch(s: Sketch, x: str) -> str:
        rows = s.op("Reshape", x, s.weight(np.asarray([-1, D])))
        up = gemm(s, rows, D, WIDE)
        s.op("ReduceMean", up, out=s.output("mean_of_rows"))
        return s.op("Reshape", gemm(s, s.activation("gelu", up), WIDE, D), sizes_of(s, x, D))

    model, _ = canonicalize(residual(branch), tmp_path)
    assert ops(model).count("Gemm") == 2


# activations

def _scaled_erf(s: Sketch, x: str) -> str:
    inner = s.op("Add", s.op("Erf", s.op("Mul", x, s.number(np.sqrt(0.5)))), s.number(1))
    return s.op("Mul", s.op("Mul", x, s.number(0.5)), inner)


def _cube_by_products(s: Sketch, x: str) -> str:
    cube = s.op("Mul", s.op("Mul", s.op("Mul", x, x), x), s.number(0.044715))
    inner = s.op("Tanh", s.op("Mul", s.op("Add", x, cube), s.number(np.sqrt(2 / np.pi))))
    return s.op("Mul", s.op("Mul", x, s.number(0.5)), s.op("Add", inner, s.number(1)))


@pytest.mark.parametrize(("activation", "opset", "becomes"), [
    (_scaled_erf, 17, "BiasGelu"), (_scaled_erf, 20, "BiasGelu"), (_cube_by_products, 17, "FastGelu"),
    (_cube_by_products, 20, "FastGelu")])
def test_an_activation_that_is_not_fused_as_it_is_written_is_written_so_that_it_is(activation, opset, becomes, tmp_path):
    source = residual(lambda s, x: s.linear(activation(s, s.linear(x, D, WIDE)), WIDE, D), opset)
    _, result = canonicalize(source, tmp_path)
    assert result.fired == 1
    assert becomes not in optimized_ops(tmp_path / "before.onnx", tmp_path)
    assert optimized_ops(tmp_path / "after.onnx", tmp_path) == ["MatMul", becomes, "MatMul", "Add", "Add"]


def test_from_opset_20_gelu_is_one_operator(tmp_path):
    source = residual(lambda s, x: s.linear(_scaled_erf(s, s.linear(x, D, WIDE)), WIDE, D), 20)
    model, _ = canonicalize(source, tmp_path)
    assert ops(model) == ["MatMul", "Add", "Gelu", "MatMul", "Add", "Add"]


@pytest.mark.parametrize("factor", [0.5, 1.01])
def test_an_activation_that_is_only_nearly_the_known_one_keeps_its_nodes(factor, tmp_path):
    def branch(s: Sketch, x: str) -> str:
        return s.linear(s.op("Mul", _cube_by_products(s, s.linear(x, D, WIDE)), s.number(factor)), WIDE, D)

    model, result = canonicalize(residual(branch), tmp_path, again=True)
    assert result.fired == 1
    assert ops(model).count("Tanh") == 1
    assert ops(model).count("Pow") == 0


def test_a_clipped_gate_keeps_its_nodes(tmp_path):
    def branch(s: Sketch, x: str) -> str:
        gate = s.op("Clip", s.linear(x, D, WIDE), "", s.number(0.4))
        return s.linear(s.op("Mul", s.op("Mul", gate, s.op("Sigmoid", gate)), s.linear(x, D, WIDE)), WIDE, D)

    model, result = canonicalize(residual(branch), tmp_path, again=True)
    assert result.fired == 1
    assert ops(model).count("Clip") == 1


def test_a_norm_inside_keeps_its_nodes(tmp_path):
    def branch(s: Sketch, x: str) -> str:
        return s.linear(s.norm(s.activation("gelu", s.linear(x, D, WIDE)), WIDE), WIDE, D)

    model, result = canonicalize(residual(branch), tmp_path, again=True)
    assert result.fired == 1
    assert ops(model).count("LayerNormalization") == 1


def test_an_activation_that_something_else_reads_stays(tmp_path):
    def branch(s: Sketch, x: str) -> str:
        z = s.linear(x, D, WIDE)
        error = s.op("Erf", s.op("Mul", z, s.number(np.sqrt(0.5))))
        s.op("ReduceMean", error, out=s.output("mean_error"))
        h = s.op("Mul", s.op("Mul", z, s.number(0.5)), s.op("Add", error, s.number(1)))
        return s.linear(h, WIDE, D)

    _, result = canonicalize(residual(branch), tmp_path)
    assert result.fired == 0


def test_operators_of_onnx_runtime_stay(tmp_path):
    def branch(s: Sketch, x: str) -> str:
        up = s.op("MatMul", x, s.weight(s.numbers(D, WIDE)))
        return s.linear(s.op("BiasGelu", up, s.weight(s.numbers(WIDE)), domain="com.microsoft"), WIDE, D)

    source = residual(branch)
    _, result = canonicalize(source, tmp_path)
    assert result.fired == 0
    _, result = canonicalize(source, tmp_path, again=True)
    assert result.fired == 1
    assert optimized_ops(tmp_path / "after.onnx", tmp_path) == ["MatMul", "BiasGelu", "MatMul", "Add", "Add"]


# gate and up in one matrix

def _fused(s: Sketch, x: str, starts: tuple[int, int], step: int = 1, *, bias: bool = False) -> str:
    z = s.linear(x, D, 2 * WIDE, bias=bias)
    ends = [start + WIDE if step == 1 else 2 * WIDE for start in starts]
    gate, up = (s.op("Slice", z, *(s.weight(np.asarray([each])) for each in (start, end, 2, step)))
                for start, end in zip(starts, ends, strict=True))
    return s.linear(s.op("Mul", s.activation("silu", gate), up), WIDE, D, bias=False)


@pytest.mark.parametrize("starts", [(0, WIDE), (WIDE, 0)])
def test_a_fused_gate_up_is_cut_by_one_split(starts, tmp_path):
    model, result = canonicalize(residual(lambda s, x: _fused(s, x, starts)), tmp_path)
    assert result.fired == 1
    assert ops(model) == ["MatMul", "Split", "Sigmoid", "Mul", "Mul", "MatMul", "Add"]


@pytest.mark.parametrize("opset", [13, 17, 20])
@pytest.mark.parametrize("starts", [(0, 1), (1, 0)])
def test_interleaved_columns_are_put_in_order(starts, opset, tmp_path):
    model, result = canonicalize(residual(lambda s, x: _fused(s, x, starts, 2, bias=True), opset), tmp_path)
    assert result.fired == 1
    assert ops(model) == ["MatMul", "Add", "Split", "Sigmoid", "Mul", "Mul", "MatMul", "Add"]


def test_interleaved_columns_of_a_shared_matrix_stay_where_they_are(tmp_path):
    def branch(s: Sketch, x: str) -> str:
        y = _fused(s, x, (0, 1), 2)
        s.op("ReduceSum", "weight_0", out=s.output("sum_of_weights"))
        return y

    model, _ = canonicalize(residual(branch), tmp_path, again=True)
    assert ops(model).count("Slice") == 2


# shared weights

def _tied(s: Sketch, x: str, weight: str) -> str:
    up = s.op("MatMul", x, s.op("Transpose", weight, perm=[1, 0]))
    return s.op("MatMul", s.op("Relu", up), s.weight(s.numbers(WIDE, D)))


def test_a_weight_that_something_else_reads_is_not_untied(tmp_path):
    def branch(s: Sketch, x: str) -> str:
        tied = s.weight(s.numbers(WIDE, D), "tied")
        s.op("ReduceSum", tied, out=s.output("sum_of_weights"))
        return _tied(s, x, tied)

    model, result = canonicalize(residual(branch), tmp_path)
    assert result.fired == 0
    [refused] = result.refused
    assert "another reader" in refused.reason
    model, result = canonicalize(residual(branch), tmp_path, again=True)
    assert result.fired == 1
    assert "tied" in initializers(model)


def test_blocks_that_share_a_weight_go_on_sharing_it(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    shared = s.weight(s.numbers(WIDE, D), "shared")
    for number in range(3):
        x = s.op("Add", x, _tied(s, x, shared), out=f"stream_{number}")
    s.op("Identity", x, out=s.output("y"))
    model, result = canonicalize(s, tmp_path)
    assert result.fired == 3
    assert sorted(initializers(model).values()) == [[D, WIDE], *[[WIDE, D]] * 3]
    assert "shared" not in initializers(model)


def test_a_block_left_out_keeps_the_weight_it_shares(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    shared = s.weight(s.numbers(WIDE, D), "shared")
    for number in range(2):
        x = s.op("Add", x, _tied(s, x, shared), out=f"stream_{number}")
    s.op("Identity", x, out=s.output("y"))
    _, [result] = rewrite(s, tmp_path, "canonicalize-ffn:blocks=0")
    assert result.fired == 0
    assert len(result.refused) == 1


@pytest.mark.parametrize("shared", [False, True])
def test_a_weight_joined_from_two_is_stored_whole_unless_one_of_them_has_another_reader(shared, tmp_path):
    def branch(s: Sketch, x: str) -> str:
        parts = [s.weight(s.numbers(D, WIDE // 2)) for _ in range(2)]
        if shared:
            s.op("ReduceSum", parts[1], out=s.output("sum_of_weights"))
        return s.linear(s.op("Relu", s.op("MatMul", x, s.op("Concat", *parts, axis=1))), WIDE, D)

    model, result = canonicalize(residual(branch), tmp_path)
    assert result.fired == (not shared)
    assert ops(model).count("Concat") == shared


def test_a_weight_stored_in_fewer_bits_is_not_unpacked(tmp_path):
    def branch(s: Sketch, x: str) -> str:
        half = s.weight(s.numbers(D, WIDE).astype(np.float16))
        return s.linear(s.op("Relu", s.op("MatMul", x, s.op("Cast", half, to=TensorProto.FLOAT))), WIDE, D)

    _, result = canonicalize(residual(branch), tmp_path)
    assert result.fired == 0
    assert "more room" in result.refused[0].reason


def test_a_weight_that_the_caller_may_override_stays_an_input(tmp_path):
    source = transformer(1, pre_norm=False)
    proto = source.model()
    given = proto.graph.initializer[0]
    proto.graph.input.append(onnx.helper.make_tensor_value_info(given.name, given.data_type, given.dims))
    _, [result] = rewrite(proto, tmp_path, ALL)
    assert result.fired == 1
    for feed in (X, {**X, given.name: np.ones((D, WIDE), np.float32)}):
        assert drift(run(tmp_path / "before.onnx", feed), run(tmp_path / "after.onnx", feed)) < 1e-6


# refused

def test_weights_stored_as_integers_are_refused(tmp_path):
    def branch(s: Sketch, x: str) -> str:
        stored = s.weight(np.ones((D, WIDE), np.int8))
        up = s.op("MatMul", x, s.op("DequantizeLinear", stored, s.number(0.02)))
        return s.linear(s.op("Relu", up), WIDE, D)

    _, result = canonicalize(residual(branch), tmp_path, again=True)
    assert result.fired == 0
    assert "integers" in result.refused[0].reason


def test_a_product_that_is_an_output_is_refused(tmp_path):
    def branch(s: Sketch, x: str) -> str:
        product = s.op("MatMul", x, s.weight(s.numbers(D, WIDE)), out=s.output("product"))
        return s.linear(s.op("Relu", s.op("Add", product, s.weight(s.numbers(WIDE)))), WIDE, D)

    _, result = canonicalize(residual(branch), tmp_path, again=True)
    assert result.fired == 0
    assert "output" in result.refused[0].reason


# other places and types

def test_a_block_in_a_branch(tmp_path):
    then = Branch(17)
    up = then.op("MatMul", "x", then.op("Transpose", then.weight(then.numbers(WIDE, D)), perm=[1, 0]))
    y = then.op("MatMul", _scaled_erf(then, up), then.weight(then.numbers(WIDE, D)))
    source = in_branch(then, then.op("Add", "x", y), [2, 5, D])
    model, result = canonicalize(source, tmp_path)
    assert result.fired == 1
    [branch] = [graph for path, graph in model.graphs() if path.endswith("then_branch")]
    assert [node.op for node in branch.nodes] == ["MatMul", "Div", "Erf", "Add", "Mul", "Mul", "MatMul", "Add", "Identity"]


def test_blocks_in_two_branches_that_share_a_weight_from_outside(tmp_path):
    s = Sketch()
    s.input("x", ["batch", "tokens", D])
    s.input("wanted", [], TensorProto.BOOL)
    s.weight(s.numbers(WIDE, D), "outside")
    branches = []
    for name in ("then", "else"):
        b = Branch(17, seed=len(name))
        b.op("Add", "x", _tied(b, "x", "outside"), out=b.output(f"{name}_y"))
        for node in b.nodes:
            node.output[0] = node.output[0] if node.output[0].endswith("_y") else f"{name}_{node.output[0]}"
            for index, value in enumerate(node.input):
                node.input[index] = f"{name}_{value}" if value.startswith("inner_") and value not in b.initializers else value
        branches.append(b.graph(name))
    s.op("If", "wanted", out=s.output("y"), then_branch=branches[0], else_branch=branches[1])
    model, result = canonicalize(s, tmp_path)
    assert result.fired == 2
    assert sorted(initializers(model).values()) == [[D, WIDE]]


def test_a_block_in_a_loop(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    body = Branch(17)
    body.input("i", [], TensorProto.INT64)
    body.input("go_on", [], TensorProto.BOOL)
    state = body.input("state", ["batch", "tokens", D])
    y = body.op("MatMul", _cube_by_products(body, body.linear(state, D, WIDE)), body.weight(body.numbers(WIDE, D)))
    body.op("Identity", "go_on", out=body.output("still", [], TensorProto.BOOL))
    body.op("Add", state, y, out=body.output("next", ["batch", "tokens", D]))
    s.op("Loop", s.weight(np.asarray(3)), s.weight(np.asarray(True)), x, out=s.output("y", ["batch", "tokens", D]),
         body=body.graph("body"))
    model, result = canonicalize(s, tmp_path, tolerance=1e-5)
    assert result.fired == 1
    [_, (_, inner)] = model.graphs()
    assert sum(node.op == "Pow" for node in inner.nodes) == 1


def test_experts_picked_at_run_time(tmp_path):
    s = Sketch()
    x = s.input("x", [2, 5, D])
    chosen = s.input("chosen", [2], TensorProto.INT64)
    up = s.op("MatMul", x, s.op("Gather", s.weight(s.numbers(4, D, WIDE, scale=0.3)), chosen, axis=0))
    turned = s.op("Transpose", s.op("Gather", s.weight(s.numbers(4, D, WIDE, scale=0.3)), chosen, axis=0), perm=[0, 2, 1])
    y = s.op("MatMul", _scaled_erf(s, up), turned)
    s.op("Add", x, y, out=s.output("y", [2, 5, D]))
    model, result = canonicalize(s, tmp_path, again=True)
    assert result.fired == 1
    assert sorted(dims for dims in initializers(model).values() if dims) == [[4, D, WIDE]] * 2
    assert not {"weight_0"} & set(initializers(model))


def test_all_experts_in_one_einsum(tmp_path):
    s = Sketch()
    x = s.input("x", [2, 5, D])
    up = s.op("Einsum", x, s.weight(s.numbers(4, D, WIDE, scale=0.3)), equation="btd,edf->betf")
    down = s.weight(s.numbers(4, WIDE, D, scale=0.3))
    y = s.op("ReduceSum", s.op("MatMul", _scaled_erf(s, up), down), s.weight(np.asarray([1])), keepdims=0)
    s.op("Add", x, y, out=s.output("y", [2, 5, D]))
    model, result = canonicalize(s, tmp_path, again=True)
    assert result.fired == 1
    assert ops(model).count("Einsum") == 1


def test_float16(tmp_path):
    source = residual(lambda s, x: s.linear(_scaled_erf(s, s.linear(x, D, WIDE)), WIDE, D), dtype=np.float16)
    _, result = canonicalize(source, tmp_path, again=True, tolerance=3e-3)
    assert result.fired == 1


def test_twice_is_once(tmp_path):
    source = residual(lambda s, x: flat(s, x, "gelu"))
    _, [first, second] = rewrite(source, tmp_path, "canonicalize-ffn", "canonicalize-ffn")
    assert (first.fired, second.fired) == (1, 0)


def _nearly_gelu_tanh(s: Sketch, z: str, shape: tuple[int, ...] = ()) -> str:
    def number(value: float) -> str:
        return s.weight(np.full(shape, value, np.float32))

    cube = s.op("Mul", s.op("Pow", z, number(3)), number(0.0447))
    inner = s.op("Tanh", s.op("Mul", s.op("Add", z, cube), number(0.7979)))
    return s.op("Mul", s.op("Mul", z, number(0.5)), s.op("Add", inner, number(1)))


def test_rows_are_not_flattened_around_an_activation_that_keeps_its_nodes(tmp_path):
    def branch(s: Sketch, x: str) -> str:
        rows = s.op("Reshape", x, s.weight(np.asarray([-1, D])))
        hidden = s.op("Reshape", gemm(s, rows, D, WIDE), sizes_of(s, x, WIDE))
        back = s.op("Reshape", _nearly_gelu_tanh(s, hidden), s.weight(np.asarray([-1, WIDE])))
        return s.op("Reshape", gemm(s, back, WIDE, D), sizes_of(s, x, D))

    model, result = canonicalize(residual(branch), tmp_path)
    assert result.fired == 1
    assert "Reshape" not in ops(model)


def test_numbers_that_add_an_axis_stay(tmp_path):
    def branch(s: Sketch, x: str) -> str:
        z = s.linear(x, D, WIDE)
        one, half = (s.weight(np.full((1, 1, 1, 1), value, np.float32)) for value in (1, 0.5))
        error = s.op("Erf", s.op("Div", z, s.number(2 ** 0.5)))
        return s.linear(s.op("Mul", s.op("Mul", z, s.op("Add", error, one)), half), WIDE, D)

    s = residual(branch)
    s.outputs.clear()
    s.output("y", None)
    _, result = canonicalize(s, tmp_path)
    assert result.fired == 0
