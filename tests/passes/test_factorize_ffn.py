"""factorize-ffn: what the thin matrices are, and which blocks it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import Sketch, drift, ops, run, transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.model import Model
from ffnfold.passes.fitting.neuron_fit import Features
from ffnfold.passes.fitting.shrunk import product, shrink
from rewriting import Branch, feeds_of, in_branch, rewrite

D, FF = 16, 48
FIT = feeds_of((8, 16, D), 10, seed=11)
[X] = feeds_of((4, 9, D))


def numbers(model: Model) -> int:
    """In all weights."""
    return sum(int(np.prod(each.shape)) for each in model.graph.constants if len(each.shape) == 2)


def of_low_rank(rank: int, *, kind: str = "MatMul") -> Sketch:
    """A block whose two matrices have the rank ``rank``."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    up, down = (s.numbers(a, rank) @ s.numbers(rank, b) for a, b in ((D, FF), (FF, D)))
    if kind == "Conv":
        turned = s.op("Transpose", x, perm=[0, 2, 1])
        hidden = s.activation("gelu", s.op("Conv", turned, s.weight(up.T[..., None].copy()), s.weight(s.numbers(FF))))
        y = s.op("Conv", hidden, s.weight(down.T[..., None].copy()), s.weight(s.numbers(D)))
        s.op("Transpose", s.op("Add", turned, y), perm=[0, 2, 1], out=s.output("y"))
        return s
    if kind == "Gemm":
        flat = s.op("Reshape", x, s.weight(np.asarray([-1, D])))
        hidden = s.activation("gelu", s.op("Gemm", flat, s.weight(up.T.copy()), s.weight(s.numbers(FF)), transB=1))
        y = s.op("Add", flat, s.op("Gemm", hidden, s.weight(down.T.copy()), s.weight(s.numbers(D)), transB=1))
        s.op("Reshape", y, s.op("Shape", x), out=s.output("y"))
        return s
    hidden = s.activation("gelu", s.op("Add", s.op("MatMul", x, s.weight(up)), s.weight(s.numbers(FF))))
    s.op("Add", x, s.op("Add", s.op("MatMul", hidden, s.weight(down)), s.weight(s.numbers(D))), out=s.output("y"))
    return s


@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "Conv"])
@pytest.mark.parametrize("options", ["whiten=false", "whiten=true,target=own", "whiten=true"])
def test_a_matrix_of_low_rank_loses_nothing(tmp_path, kind, options):
    s = of_low_rank(4, kind=kind)
    model, [result] = rewrite(s, tmp_path, f"factorize-ffn:rank=4,{options}", fit=FIT)
    assert (result.fired, result.refused) == (1, [])
    assert ops(model).count(kind if kind == "Conv" else "MatMul") == 4
    assert drift(run(s.model(), X), run(model, X)) < 1e-4


def test_the_energy_finds_the_rank(tmp_path):
    model, _ = rewrite(of_low_rank(3), tmp_path, "factorize-ffn:energy=0.99999,whiten=false")
    assert numbers(model) == 2 * 3 * (D + FF)


@pytest.mark.parametrize("kind", [{"activation": "gelu"}, {"activation": "silu", "gated": True, "bias": False}])
def test_whitening_keeps_what_the_inputs_use(tmp_path, kind):
    """The inputs lie near a few directions, along which the matrices are small."""
    s = transformer(1, D, FF, pre_norm=False, **kind)
    size = np.where(np.arange(D) < 4, 4.0, 0.1)
    feeds = [{"x": (feed["x"] * size).astype(np.float32)} for feed in [*FIT, X]]
    before, found = run(s.model(), feeds[-1]), {}
    for options in ("whiten=false", "target=own", "target=stream"):
        model, [result] = rewrite(s, tmp_path, f"factorize-ffn:ratio=0.6,{options}", fit=feeds[:-1])
        assert result.fired == 1
        found[options] = drift(before, run(model, feeds[-1]))
    assert max(found["target=own"], found["target=stream"]) < 0.5 * found["whiten=false"]


def test_fitting_the_down_projection_makes_good_what_up_has_lost(tmp_path):
    s = transformer(2, D, FF, activation="gelu")
    before, found = run(s.model(), X), {}
    for target in ("own", "stream"):
        model, _ = rewrite(s, tmp_path, f"factorize-ffn:target={target}", fit=FIT)
        found[target] = drift(before, run(model, X))
    assert found["stream"] < 0.9 * found["own"]


def test_the_bias_takes_the_mean_of_what_is_lost(tmp_path):
    """All tokens are alike but for a little noise: what a low rank loses is nearly constant."""
    s = transformer(1, D, FF, pre_norm=False, activation="relu")
    base = np.linspace(-3, 3, D)
    feeds = [{"x": (base + 0.01 * feed["x"]).astype(np.float32)} for feed in [*FIT, X]]
    model, _ = rewrite(s, tmp_path, "factorize-ffn:rank=1,target=own", fit=feeds[:-1])
    assert drift(run(s.model(), feeds[-1]), run(model, feeds[-1])) < 0.01


def test_the_part_that_stays(tmp_path):
    whole = 2 * D * FF
    for ratio in (0.25, 0.5, 0.75):
        model, _ = rewrite(transformer(1, D, FF), tmp_path, f"factorize-ffn:ratio={ratio},whiten=false")
        assert ratio - 0.1 < numbers(model) / whole <= ratio


def test_ranks_follow_what_reaches_the_output(tmp_path):
    """Block 0 hardly adds anything: its rank is given to block 1, under the same number of parameters."""
    s = Sketch()
    stream = s.input("x", ["batch", "tokens", D])
    for size in (0.01, 1.0):
        hidden = s.activation("gelu", s.linear(s.norm(stream, D), D, FF))
        stream = s.op("Add", stream, s.op("MatMul", hidden, s.weight(size * s.numbers(FF, D))))
    s.op("Identity", stream, out=s.output("y"))
    before, errors, sizes = run(s.model(), X), {}, {}
    for spread in ("uniform", "sensitivity"):
        model, [result] = rewrite(s, tmp_path, f"factorize-ffn:spread={spread}", fit=FIT, choose=FIT[:2])
        assert result.fired == 2
        errors[spread], sizes[spread] = drift(before, run(model, X)), numbers(model)
    assert sizes["sensitivity"] <= sizes["uniform"]
    assert errors["sensitivity"] < 0.8 * errors["uniform"]


@pytest.mark.parametrize("options", ["whiten=false", "whiten=true", "whiten=true,shrink=true"])
def test_weights_that_blocks_share_stay_one(tmp_path, options):
    s = Sketch()
    stream = s.input("x", ["batch", "tokens", D])
    up, down = (s.weight(s.numbers(a, 10) @ s.numbers(10, b)) for a, b in ((D, FF), (FF, D)))
    bias = s.weight(s.numbers(FF))
    for _ in range(3):
        hidden = s.activation("gelu", s.op("Add", s.op("MatMul", s.norm(stream, D), up), bias))
        stream = s.op("Add", stream, s.op("MatMul", hidden, down))
    s.op("Identity", stream, out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, f"factorize-ffn:ratio=0.9,{options}", fit=FIT)
    assert (result.fired, result.refused) == (3, [])
    assert numbers(model) < 2 * D * FF
    assert drift(run(s.model(), X), run(model, X)) < 1e-3


def test_a_weight_that_something_else_reads(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    up = s.weight(s.numbers(D, FF))
    s.op("MatMul", x, up, out=s.output("scores"))
    s.op("Add", x, s.linear(s.activation("gelu", s.op("MatMul", x, up)), FF, D), out=s.output("y"))
    _, [result] = rewrite(s, tmp_path, "factorize-ffn:whiten=false")
    assert result.fired == 0
    assert "shared with something that stays" in result.refused[0].reason


def test_a_float16_model_stays_one(tmp_path):
    s = Sketch(dtype=np.float16)
    x = s.input("x", ["batch", "tokens", D])
    s.op("Add", x, s.ffn(s.norm(x, D), D, FF, activation="gelu"), out=s.output("y"))
    feeds = [{"x": feed["x"].astype(np.float16)} for feed in FIT]
    model, [result] = rewrite(s, tmp_path, "factorize-ffn:ratio=0.9", fit=feeds)
    after = run(model, feeds[0])
    assert (result.fired, after["y"].dtype) == (1, np.float16)
    assert drift(run(s.model(), feeds[0]), after) < 0.25


@pytest.mark.parametrize("options", ["whiten=false", "whiten=true"])
def test_a_block_inside_a_branch(tmp_path, options):
    inner = Branch()
    s = in_branch(inner, inner.op("Add", "x", inner.ffn("x", D, FF)), ["batch", "tokens", D])
    feeds = [{**feed, "wanted": np.asarray(True)} for feed in FIT]
    model, [result] = rewrite(s, tmp_path, f"factorize-ffn:ratio=0.9,{options}", fit=feeds)
    if options == "whiten=false":
        assert result.fired == 1
        assert drift(run(s.model(), feeds[0]), run(model, feeds[0])) < 0.3
    else:
        assert result.fired == 0
        assert "subgraph" in result.refused[0].reason


def test_where_nothing_would_get_smaller(tmp_path):
    _, [result] = rewrite(transformer(1, D, FF), tmp_path, "factorize-ffn:rank=12,whiten=false")
    assert result.fired == 0
    assert "nothing would get smaller" in result.refused[0].reason
    _, [result] = rewrite(transformer(1, D, FF), tmp_path, "factorize-ffn:energy=1,whiten=false")
    assert (result.fired, result.refused[0].reason) == (0, "nothing would get smaller")


def test_a_factorized_block_is_no_block_for_later_passes(tmp_path):
    _, results = rewrite(transformer(2, D, FF), tmp_path, "factorize-ffn:blocks=0,whiten=false", "remove-ffn:keep=nothing")
    assert [each.fired for each in results] == [1, 1]
    assert results[1].refused[0].reason == "factorized by factorize-ffn earlier in the plan"


@pytest.mark.parametrize("text", ["ratio=0", "ratio=1", "rank=0", "energy=0", "rank=4,energy=0.9", "target=best",
                                  "spread=sensitivity,energy=0.9", "spread=sensitivity,whiten=false"])
def test_options_that_make_no_sense(tmp_path, text):
    with pytest.raises(InputError):
        rewrite(transformer(1), tmp_path, f"factorize-ffn:{text}", fit=FIT)


def test_without_feeds_it_is_refused(tmp_path):
    with pytest.raises(InputError, match="needs real inputs"):
        rewrite(transformer(1), tmp_path, "factorize-ffn")


def test_quantizing_reaches_the_thin_matrices(tmp_path):
    s = transformer(1, 256, 512)
    x = feeds_of((4, 9, 256))[0]
    model, results = rewrite(s, tmp_path, "factorize-ffn:whiten=false,rank=100", "quantize-ffn:also=attention,row_scale=false")
    assert [each.fired for each in results] == [1, 4]
    assert ops(model).count("MatMulInteger") == 4
    factorized, _ = rewrite(s, tmp_path, "factorize-ffn:whiten=false,rank=100")
    assert drift(run(factorized, x), run(model, x)) < 0.03


def test_moments_that_rounding_left_indefinite_are_solved_with_more_ridge():
    ones, prior = np.ones((20, 20)), np.eye(20, 3)
    features = Features(ones - 1e-3 * np.eye(20), ones[:, :3], 3.0, np.zeros(20), np.zeros(3), 0, prior)
    found = features.solve(np.arange(20), 1e-5)
    assert np.abs(found.sum(axis=0) - 1).max() < 0.1  # all features are one, and the target is it
    assert np.abs(found - prior).max() < 1


@pytest.mark.parametrize("kind", [{"activation": "gelu"}, {"activation": "silu", "gated": True, "bias": False}])
def test_shrunk_matrices_give_the_same_with_an_identity_less(tmp_path, kind):
    s = transformer(1, D, FF, pre_norm=False, **kind)
    plain, _ = rewrite(s, tmp_path, "factorize-ffn:rank=6,whiten=false")
    shrunk, [result] = rewrite(s, tmp_path, "factorize-ffn:rank=6,whiten=false,shrink=true")
    matrices = 3 if kind.get("gated") else 2
    assert result.fired == 1
    assert numbers(plain) - numbers(shrunk) == matrices * 6 * 6
    assert drift(run(plain, X), run(shrunk, X)) < 1e-4


def test_shrunk_matrices_get_a_larger_rank_at_the_same_ratio(tmp_path):
    s = transformer(1, D, FF, pre_norm=False, activation="gelu")
    whole = numbers(rewrite(s, tmp_path, "clean-up")[0])
    plain, _ = rewrite(s, tmp_path, "factorize-ffn:ratio=0.6,whiten=false")
    shrunk, _ = rewrite(s, tmp_path, "factorize-ffn:ratio=0.6,whiten=false,shrink=true")
    gone = 2 * D * FF - 0.6 * 2 * D * FF
    for model in (plain, shrunk):
        assert whole - numbers(model) >= gone
    before = run(s.model(), X)
    assert drift(before, run(shrunk, X)) < drift(before, run(plain, X))


def test_rows_that_will_not_do_are_found_elsewhere_or_nowhere():
    random = np.random.default_rng(4)
    first, second = random.normal(size=(12, 4)), random.normal(size=(4, 9))
    first[0] = first[1]  # the first four rows are singular
    found = shrink(first, second, 1e-7)
    assert found is not None
    assert not {0, 1} <= set(found[0].taken.tolist())
    np.testing.assert_allclose(product(found), first @ second, atol=1e-12)
    assert shrink(first, second, 0.9) is None


def test_float16_is_shrunk_where_pivoting_finds_good_rows(tmp_path):
    s = transformer(1, D, FF, pre_norm=False, activation="gelu")
    plain, _ = rewrite(s, tmp_path, "to-half", "factorize-ffn:rank=6,whiten=false")
    shrunk, _ = rewrite(s, tmp_path, "to-half", "factorize-ffn:rank=6,whiten=false,shrink=true")
    assert numbers(plain) - numbers(shrunk) == 2 * 6 * 6
    assert drift(run(plain, X), run(shrunk, X)) < 3e-2


def test_an_opset_whose_split_has_no_sizes_keeps_both_matrices(tmp_path):
    s = transformer(1, D, FF, pre_norm=False, activation="gelu", opset=12)
    model, [result] = rewrite(s, tmp_path, "factorize-ffn:rank=6,whiten=false,shrink=true")
    assert result.fired == 1
    assert not {"Split", "Gather"} & set(ops(model))


def test_a_convolution_is_not_shrunk(tmp_path):
    model, [result] = rewrite(of_low_rank(4, kind="Conv"), tmp_path, "factorize-ffn:rank=4,whiten=false,shrink=true")
    assert result.fired == 1
    assert ops(model).count("Conv") == 4
