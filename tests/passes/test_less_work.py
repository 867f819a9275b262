"""slim-ffn where a block would be no less work, and where the file grows because weights stay."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import Sketch, drift, run, transformer
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.passes.base import PassResult
from rewriting import feeds_of, rewrite

D, FF = 8, 32
FIT = feeds_of((8, 16, D), 10, seed=11)
PLAIN = "slim-ffn:affine=false,refit=none,select=magnitude,multiple=1"


def stored(model: Model) -> int:
    return sum(each._values.nbytes for each in model.graph.constants)


def notes_on_bytes(result: PassResult) -> list[str]:
    return [note for note in result.notes if "bytes more" in note]


@pytest.mark.parametrize(("options", "says"), [
    ("keep=32", "all of its 32 neurons would stay, and an affine map"), ("keep=1e30", "all of its 32 neurons would stay"),
    ("multiple=1000000", "all of its 32 neurons would stay"), ("widths=32@0", "all of its 32 neurons would stay"),
    ("keep=30,multiple=1", "544 multiply-adds a token, no fewer than the 512"),
    ("keep=28,multiple=1", "512 multiply-adds a token, no fewer than the 512")])
def test_no_less_work_is_refused(tmp_path, options, says):
    s = transformer(1, activation="gelu")
    model, [result] = rewrite(s, tmp_path, f"slim-ffn:{options},refine=0", fit=FIT)
    assert result.fired == 0
    assert says in result.refused[0].reason
    assert drift(run(s.model(), FIT[0]), run(model, FIT[0])) < 1e-6


@pytest.mark.parametrize("gated", [False, True])
def test_one_neuron_fewer_is_less_work(tmp_path, gated):
    s = transformer(1, activation="gelu", gated=gated)
    width = FF - 5 if not gated else FF - 3
    model, [result] = rewrite(s, tmp_path, f"slim-ffn:keep={width},multiple=1,refine=0", fit=FIT)
    assert (result.fired, notes_on_bytes(result)) == (1, [])
    [before], [after] = (find_ffn_blocks(each) for each in (Model.load(tmp_path / "before.onnx"), model))
    assert after.macs_per_token + D * D < before.macs_per_token
    _, [result] = rewrite(s, tmp_path, f"slim-ffn:keep={width + 1},multiple=1,refine=0", fit=FIT)
    assert result.fired == 0


def test_where_spread_leaves_all_neurons_the_block_stays(tmp_path):
    """Block 0 hardly adds anything, so block 1 is given all of its neurons: with a map beside them it would be more work."""
    s = Sketch()
    stream = s.input("x", ["batch", "tokens", D])
    for size in (1e-4, 1.0):
        hidden = s.activation("gelu", s.linear(s.norm(stream, D), D, FF))
        stream = s.op("Add", stream, s.op("MatMul", hidden, s.weight(size * s.numbers(FF, D))))
    s.op("Identity", stream, out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "slim-ffn:keep=20,multiple=2,refine=0,spread=sensitivity", fit=FIT, choose=FIT[:2])
    assert result.fired == 1
    assert [each.block for each in result.refused] == [1]
    assert "all of its 32 neurons" in result.refused[0].reason
    assert find_ffn_blocks(model)[1].d_ff == FF


def shown(of: str) -> Sketch:
    """A value inside the block is an output as well, or its down projection is, or something else reads that."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    up, down = s.weight(s.numbers(D, FF), "up"), s.weight(s.numbers(FF, D), "down")
    product = s.op("MatMul", x, up, out="product")
    hidden = s.op("Relu", product, out="hidden")
    s.op("Add", x, s.op("MatMul", hidden, down), out=s.output("y"))
    if of in ("product", "hidden"):
        s.output(of, ["batch", "tokens", FF])
    elif of == "reader":
        s.op("ReduceSum", down, out=s.output("sum"), name="/sum")
    else:
        s.output("down", [FF, D])
    return s


@pytest.mark.parametrize("value", ["product", "hidden"])
def test_neurons_that_something_else_reads_are_still_computed(tmp_path, value):
    for keep, fired in ((16, 0), (15, 1)):
        _, [result] = rewrite(shown(value), tmp_path, f"{PLAIN},keep={keep}")
        assert result.fired == fired
        assert notes_on_bytes(result) == []
    _, [result] = rewrite(shown(value), tmp_path, f"{PLAIN},keep=16")
    assert f"what computes '{value}', which something else reads, would be 512 multiply-adds" in result.refused[0].reason


@pytest.mark.parametrize(("of", "by"), [("reader", "'down' is still read by '/sum'"),
                                        ("output", "'down' is still read by whoever reads the outputs")])
def test_a_weight_that_stays_is_named_where_the_file_grows(tmp_path, of, by):
    for keep in (24, 8):
        model, [result] = rewrite(shown(of), tmp_path, f"{PLAIN},keep={keep}")
        assert result.fired == 1
        grown = stored(model) - stored(Model.load(tmp_path / "before.onnx"))
        assert (grown > 0) == (keep == 24)
        says = f"less is multiplied, but the weights take {grown} bytes more: {by}"
        assert notes_on_bytes(result) == ([says] if grown > 0 else [])


@pytest.mark.parametrize(("plan", "fit"), [(PLAIN, None), ("slim-ffn:affine=false,refine=0,multiple=1", FIT)])
def test_blocks_that_had_weights_in_common_are_named(tmp_path, plan, fit):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    up, down = s.weight(s.numbers(D, FF)), s.weight(s.numbers(FF, D))
    for _ in range(3):
        x = s.op("Add", x, s.op("MatMul", s.activation("gelu", s.op("MatMul", x, up)), down))
    s.op("Identity", x, out=s.output("y"))
    _, [result] = rewrite(s, tmp_path, plan, fit=fit)
    assert result.fired == 3
    [note] = notes_on_bytes(result)
    assert note.endswith("blocks 0-2 had weights in common and have their own now")
    one, [result] = rewrite(s, tmp_path, f"{plan},blocks=1", fit=fit)
    [note] = notes_on_bytes(result)
    assert "is still read by" in note
    assert np.isfinite(run(one, FIT[0])["y"]).all()
