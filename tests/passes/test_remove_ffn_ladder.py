"""remove-ffn: scale, thin and full maps in the place of a block, and the ladder that stops at the cheapest that will do."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, ops, run, transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.ffn import find_ffn_blocks
from onnx import numpy_helper
from rewriting import Branch, feeds_of, in_branch, rewrite

D, FF = 8, 32
FIT = feeds_of((4, 8, D), 10, seed=11)
CHOOSE = feeds_of((4, 8, D), 3, seed=12)
[X] = feeds_of((2, 5, D))


def one_block(activation: str = "gelu", **kind) -> Sketch:
    s = Sketch(**kind)
    x = s.input("x", ["batch", "tokens", D])
    s.op("Add", x, s.ffn(x, activation=activation), out=s.output("y"))
    return s


def ratio(feeds, after) -> float:
    """E[‖r + f‖ / ‖r‖] of what goes in and what comes out."""
    return float(np.mean([np.linalg.norm(y, axis=-1) / np.linalg.norm(feed["x"], axis=-1)
                          for feed, y in zip(feeds, after, strict=True)]))


def test_the_residual_is_scaled_as_the_block_did_on_average(tmp_path):
    s = one_block()
    model, [result] = rewrite(s, tmp_path, "remove-ffn:keep=scale", fit=FIT)
    assert (result.fired, ops(model)) == (1, ["Mul"])
    factor = ratio(FIT, [run(s.model(), feed)["y"] for feed in FIT])
    assert abs(factor - 1) > 0.01
    np.testing.assert_allclose(run(model, X)["y"], factor * X["x"], rtol=1e-5)


def test_scale_in_a_skip_norm_and_in_a_sum(tmp_path):
    """Behind a norm a scale is next to nothing: what is looked at is the sum that the operator gives out as well."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    s.op("SkipLayerNormalization", x, s.ffn(x), s.weight(np.ones(D, np.float32)), domain="com.microsoft",
         out=[s.output("y"), "", "", s.output("sum")])
    summed = Sketch()
    x = summed.input("x", ["batch", "tokens", D])
    summed.op("Sum", x, summed.ffn(x), out=summed.output("sum"))
    for each in (s, summed):
        model, [result] = rewrite(each, tmp_path, "remove-ffn:keep=scale", fit=FIT)
        assert result.fired == 1
        factor = ratio(FIT, [run(each.model(), feed)["sum"] for feed in FIT])
        np.testing.assert_allclose(run(model, X)["sum"], factor * X["x"], rtol=1e-4, atol=1e-6)


def beside_attention() -> Sketch:
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    attention = s.op("MatMul", s.op("Softmax", s.op("MatMul", x, s.op("Transpose", x, perm=[0, 2, 1]))), x)
    s.op("Add", x, s.op("Add", s.linear(attention, D, D), s.ffn(x)), out=s.output("y"))
    return s


def test_scale_is_refused_where_the_branch_carries_more(tmp_path):
    model, [result] = rewrite(beside_attention(), tmp_path, "remove-ffn:keep=scale", fit=FIT)
    assert result.fired == 0
    assert "something else too" in result.refused[0].reason
    assert drift(run(beside_attention().model(), X), run(model, X)) == 0


def always_open(rank: int = D, scale: float = 1.0) -> Sketch:
    """Affine where it is looked at, its map of the rank given."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    up = s.numbers(D, rank) @ s.numbers(rank, FF, scale=0.1)
    hidden = s.op("Relu", s.op("Add", s.op("MatMul", x, s.weight(up)), s.weight(np.full(FF, 5, np.float32))))
    s.op("Add", x, s.op("MatMul", hidden, s.weight(scale * s.numbers(FF, D))), out=s.output("y"))
    return s


def test_a_map_of_low_rank_is_found_exactly(tmp_path):
    s = always_open(rank=2)
    before = run(s.model(), X)
    model, [result] = rewrite(s, tmp_path, "remove-ffn:keep=rank,rank=2", fit=FIT)
    assert (result.fired, ops(model)) == (1, ["MatMul", "MatMul", "Add", "Add"])
    assert sorted(each.shape for each in model.graph.constants) == [(2, D), (D,), (D, 2)]
    assert drift(before, run(model, X)) < 1e-4
    less, _ = rewrite(s, tmp_path, "remove-ffn:keep=rank,rank=1", fit=FIT)
    mean, _ = rewrite(s, tmp_path, "remove-ffn:keep=mean", fit=FIT)
    assert 1e-3 < drift(before, run(less, X)) < drift(before, run(mean, X))


def test_no_map_of_the_rank_fits_better(tmp_path):
    """Against the full map cut by its plain singular values, on what was fitted to."""
    s = one_block()
    feeds = feeds_of((4, 8, D), 10, seed=11)
    for feed in feeds:
        feed["x"] *= np.linspace(0.1, 3, D, dtype=np.float32)
    rows = np.concatenate([feed["x"].reshape(-1, D) for feed in feeds]).astype(np.float64)
    target = np.concatenate([run(s.model(), feed)["y"].reshape(-1, D) for feed in feeds]) - rows
    size = ((rows + target - (rows + target).mean(axis=1, keepdims=True)) ** 2).mean(axis=1)
    centred = rows - np.average(rows, axis=0, weights=1 / size), target - np.average(target, axis=0, weights=1 / size)
    root = np.sqrt(1 / size)[:, None]
    full, *_ = np.linalg.lstsq(root * centred[0], root * centred[1], rcond=None)
    u, values, v = np.linalg.svd(full)

    def error(matrix: np.ndarray) -> float:
        return float(((root * (centred[1] - centred[0] @ matrix)) ** 2).sum())

    model, _ = rewrite(s, tmp_path, "remove-ffn:keep=rank,rank=2", fit=feeds)
    factors = {each.shape: each._values.load() for each in model.graph.constants}
    assert error(full) < error(factors[D, 2] @ factors[2, D]) < 0.95 * error((u[:, :2] * values[:2]) @ v[:2])


def test_a_rank_that_costs_as_much_as_the_whole_map_is_refused(tmp_path):
    _, [result] = rewrite(one_block(), tmp_path, "remove-ffn:keep=rank,rank=0.5", fit=FIT)
    assert result.fired == 0
    assert "rank 4 cost as much as one of 8×8" in result.refused[0].reason


@pytest.mark.parametrize("kind", [{}, {"pre_norm": False}, {"gated": True}])
def test_affine_is_what_linearize_ffn_gives(tmp_path, kind):
    written = []
    for plan in ("remove-ffn:keep=affine", "linearize-ffn"):
        rewrite(transformer(2, **kind), tmp_path, plan, fit=FIT)
        written.append((tmp_path / "after.onnx").read_bytes())
    assert written[0] == written[1]


def of_every_kind() -> Sketch:
    """Five blocks: one that writes nothing, one a constant, one of rank 1, one a full map, one that bends."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    kinds = ((D, 0, 0, 1e-6), (D, 0, 1, 1e-6), (1, 0, 0, 1), (D, 0, 0, 1), (D, 1, 0, 3))
    for number, (rank, bend, bias, size) in enumerate(kinds):
        up = s.numbers(D, rank) @ s.numbers(rank, FF)
        open_to = np.full(FF, 0 if bend else 40, np.float32)
        hidden = s.op("Relu", s.op("Add", s.op("MatMul", x, s.weight(up), name=f"/layer.{number}/up"), s.weight(open_to)))
        weight = size * s.numbers(FF, D)
        added = s.op("MatMul", hidden, s.weight(weight), name=f"/layer.{number}/down")
        added = s.op("Add", added, s.weight(bias * s.numbers(D, scale=1) - open_to @ weight))
        x = s.op("Add", x, added)
    s.op("Identity", x, out=s.output("y"))
    return s


def test_the_ladder_stops_at_the_cheapest_rung_that_will_do(tmp_path):
    model, [result] = rewrite(of_every_kind(), tmp_path, "remove-ffn:keep=ladder,rank=1,within=1e-4", fit=FIT, choose=CHOOSE)
    taken = [note.split(",")[0] for note in result.notes]
    assert taken == ["block 0: nothing", "block 1: mean", "block 2: rank", "block 3: affine"]
    assert [block.name for block in find_ffn_blocks(model)] == ["/layer.4"]
    [left] = result.refused
    assert left.block == 4
    assert "nothing keeps the outputs within 0.0001 (nothing 1.0" in left.reason
    assert drift(run(of_every_kind().model(), X), run(model, X)) < 0.02


def test_limits_that_nothing_and_that_everything_meets(tmp_path):
    for within, left in ((0, 5), (100, 0)):
        model, [result] = rewrite(of_every_kind(), tmp_path, f"remove-ffn:keep=ladder,within={within}", fit=FIT, choose=CHOOSE)
        assert (result.fired, len(find_ffn_blocks(model))) == (5 - left, left)
    assert all(note.split(",")[0].endswith("nothing") for note in result.notes)


@pytest.mark.parametrize(("plan", "fired"), [("keep=mean,within=1e-9", 0), ("keep=mean,within=100", 1),
                                             ("keep=nothing,within=1e-9", 0), ("keep=affine,within=1e-9", 0)])
def test_within_limits_every_kind(tmp_path, plan, fired):
    model, [result] = rewrite(one_block(), tmp_path, f"remove-ffn:{plan}", fit=FIT, choose=CHOOSE)
    assert (result.fired, len(result.refused), len(find_ffn_blocks(model))) == (fired, 1 - fired, 1 - fired)


def test_the_ladder_looks_at_the_feeds_that_choose(tmp_path):
    """Where the inputs are negative the ReLUs are closed and nothing is lost; where they are positive they are not."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    hidden = s.op("Relu", s.op("MatMul", x, s.weight(np.abs(s.numbers(D, FF)))))
    s.op("Add", x, s.op("MatMul", hidden, s.weight(s.numbers(FF, D))), out=s.output("y"))
    positive = [{"x": np.abs(feed["x"])} for feed in FIT]
    negative = [{"x": -feed["x"]} for feed in positive]
    for choose, fired in ((negative, 1), (positive, 0)):
        _, [result] = rewrite(s, tmp_path, "remove-ffn:keep=nothing,within=0.01", fit=negative, choose=choose)
        assert result.fired == fired


@pytest.mark.parametrize("keep", ["scale", "rank", "affine", "ladder"])
def test_half_precision(tmp_path, keep):
    s = one_block(dtype=np.float16)
    feeds = [{"x": feed["x"].astype(np.float16)} for feed in FIT]
    model, [result] = rewrite(s, tmp_path, f"remove-ffn:keep={keep},within=10", fit=feeds)
    assert result.fired == 1
    after = run(model, feeds[0])["y"]
    assert after.dtype == np.float16
    assert drift(run(s.model(), feeds[0]), {"y": after}) < 1


@pytest.mark.parametrize("keep", ["nothing", "mean", "scale", "affine"])
def test_a_half_block_in_a_single_precision_stream(tmp_path, keep):
    s = Sketch(dtype=np.float16)
    x = s.input("x", ["batch", "tokens", D], onnx.TensorProto.FLOAT)
    inside = s.ffn(s.op("Cast", x, to=onnx.TensorProto.FLOAT16))
    s.op("Add", x, s.op("Cast", inside, to=onnx.TensorProto.FLOAT), out=s.output("y", None, onnx.TensorProto.FLOAT))
    model, [result] = rewrite(s, tmp_path, f"remove-ffn:keep={keep}", fit=FIT)
    assert result.fired == 1
    after = run(model, X)["y"]
    assert after.dtype == np.float32
    assert drift(run(s.model(), X), {"y": after}) < 1


@pytest.mark.parametrize("keep", ["scale", "rank", "affine"])
def test_inside_an_if_nothing_is_measured(tmp_path, keep):
    inner = Branch()
    s = in_branch(inner, inner.op("Add", "x", inner.ffn("x")), ["batch", "tokens", D])
    feeds = [{**feed, "wanted": np.asarray(True)} for feed in FIT]
    _, [result] = rewrite(s, tmp_path, f"remove-ffn:keep={keep}", fit=feeds)
    assert result.fired == 0
    assert "subgraph main/" in result.refused[0].reason
    _, [result] = rewrite(s, tmp_path, "remove-ffn:keep=ladder,within=100", fit=feeds)
    assert (result.fired, result.notes[0].split(",")[0]) == (1, "block 0: nothing")


@pytest.mark.parametrize(("keep", "fired"), [("mean", 1), ("scale", 1), ("rank", 0), ("affine", 0)])
def test_packed_experts_have_no_map(tmp_path, keep, fired):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    chosen = s.input("expert", [], onnx.TensorProto.INT64)
    up, down = (s.op("Gather", s.weight(s.numbers(3, *shape)), chosen) for shape in ((D, FF), (FF, D)))
    s.op("Add", x, s.op("MatMul", s.op("Relu", s.op("MatMul", x, up)), down), out=s.output("y"))
    _, [result] = rewrite(s, tmp_path, f"remove-ffn:keep={keep}", fit=[{**feed, "expert": np.asarray(1)} for feed in FIT])
    assert result.fired == fired
    assert [refused.reason for refused in result.refused] == ["its experts are packed in one weight"] * (1 - fired)


@pytest.mark.parametrize("keep", ["rank", "affine"])
def test_too_few_tokens_for_a_map(tmp_path, keep):
    _, [result] = rewrite(one_block(), tmp_path, f"remove-ffn:keep={keep}", fit=feeds_of((1, 7, D)))
    assert result.fired == 0
    assert "7 tokens are too few" in result.refused[0].reason


@pytest.mark.parametrize("keep", ["mean", "scale", "rank", "affine"])
def test_weights_that_another_block_reads_stay(tmp_path, keep):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    up, down = s.weight(s.numbers(D, FF), "up"), s.weight(s.numbers(FF, D), "down")
    for number in range(2):
        x = s.op("Add", x, s.op("MatMul", s.op("Relu", s.op("MatMul", x, up)), down), out=f"stream_{number}")
    s.op("Identity", x, out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, f"remove-ffn:keep={keep},blocks=0", fit=FIT)
    assert result.fired == 1
    kept = {each.name: each._values.load() for each in model.graph.constants}
    for name in ("up", "down"):
        np.testing.assert_array_equal(kept[name], numpy_helper.to_array(s.initializers[name]))


def test_the_same_feeds_give_the_same_bytes(tmp_path):
    written = []
    for _ in range(2):
        rewrite(of_every_kind(), tmp_path, "remove-ffn:keep=ladder,rank=1,within=1e-4", fit=FIT, choose=CHOOSE)
        written.append((tmp_path / "after.onnx").read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize("options", ["keep=scale", "keep=rank", "keep=affine", "keep=ladder", "keep=nothing,within=0.1"])
def test_without_feeds_nothing_runs(tmp_path, options):
    with pytest.raises(InputError, match="needs real inputs"):
        rewrite(one_block(), tmp_path, f"remove-ffn:{options}")


@pytest.mark.parametrize(("options", "said"), [("keep=rank,rank=0", "rank=0.0 must be"), ("rank=2.5", "rank=2.5 must be"),
                                               ("within=-1", "within=-1.0 must be"), ("within=nan", "not a real number")])
def test_options_that_make_no_sense(tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        rewrite(one_block(), tmp_path, f"remove-ffn:{options}")
