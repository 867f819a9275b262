"""quantize-ffn where blocks and branches share: what is written once, what is counted, what stays in float."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, run, transformer
from ffnfold.graph.ffn import find_ffn_blocks
from onnx import TensorProto
from rewriting import Branch, feeds_of, rewrite

D, FF = 64, 256
SHAPE = ["rows", D]
X = feeds_of([16, D])[0]


def integers(graph: onnx.GraphProto) -> int:
    """Numbers in the integer weights of ``graph``, those of its branches included."""
    own = sum(int(np.prod(each.dims)) for each in graph.initializer
              if each.data_type in (TensorProto.INT8, TensorProto.UINT8) and len(each.dims) > 1)
    return own + sum(integers(attribute.g) for node in graph.node for attribute in node.attribute if attribute.HasField("g"))


def both_branches() -> Sketch:
    """One block in both branches of an If, with one set of weights."""
    s = Sketch()
    s.input("x", SHAPE)
    s.input("wanted", [], TensorProto.BOOL)
    up, down = s.weight(s.numbers(D, FF), "up"), s.weight(s.numbers(FF, D), "down")
    graphs = []
    for side in ("then", "else"):
        b = Branch()
        hidden = b.op("Relu", b.op("MatMul", "x", up, out=f"{side}_up"), out=f"{side}_hidden")
        y = b.op("Add", "x", b.op("MatMul", hidden, down, out=f"{side}_down"), out=f"{side}_sum")
        b.op("Neg" if side == "then" else "Identity", y, out=b.output(f"{side}_y", SHAPE))
        graphs.append(b.graph(side))
    s.op("If", "wanted", out=s.output("y", SHAPE), then_branch=graphs[0], else_branch=graphs[1])
    return s


@pytest.mark.parametrize(("options", "times"), [("", 1), (":row_scale=false", 1), (":form=nbits", 1), (":form=weight-only", 2)])
def test_branches_that_read_one_weight_read_one_integer_weight(tmp_path, options, times):
    s = both_branches()
    _, [result] = rewrite(s, tmp_path, f"quantize-ffn{options}")
    assert result.fired == 2
    assert integers(onnx.load(tmp_path / "after.onnx").graph) == times * 2 * D * FF
    for wanted in (True, False):
        feed = {**X, "wanted": np.asarray(wanted)}
        assert drift(run(s.model(), feed), run(tmp_path / "after.onnx", feed)) < 0.02


def test_a_weight_that_two_forms_store_is_written_for_each(tmp_path):
    s = shared_weights()
    _, results = rewrite(s, tmp_path, "quantize-ffn:blocks=0,reduced_range=false,row_scale=true",
                         "quantize-ffn:blocks=1,form=weight-only")
    assert [each.fired for each in results] == [1, 1]
    assert integers(onnx.load(tmp_path / "after.onnx").graph) == 4 * D * FF
    assert drift(run(s.model(), X), run(tmp_path / "after.onnx", X)) < 0.1, "sums may saturate here with 8 bits"


# projections that two blocks run

def one_up_two_downs() -> Sketch:
    """``y = x + A relu(U x) + B relu(U x)``: two blocks, one up projection."""
    s = Sketch()
    x = s.input("x", SHAPE)
    hidden = s.op("Relu", s.linear(x, D, FF, name="/ffn/up"))
    for name in ("/first", "/second"):
        x = s.op("Add", x, s.linear(hidden, FF, D, name=name))
    s.op("Identity", x, out=s.output("y", SHAPE))
    return s


def test_two_blocks_with_one_up_projection_count_as_two(tmp_path):
    model, [result] = rewrite(one_up_two_downs(), tmp_path, "quantize-ffn")
    assert (result.fired, result.refused) == (2, [])
    assert [block.quantized for block in find_ffn_blocks(model)] == [True, True]


@pytest.mark.parametrize(("options", "others"), [("blocks=0", set()), ("blocks=1", set()), ("keep_float=1", {"kept in float"})])
def test_a_block_whose_projection_must_stay_is_refused(tmp_path, options, others):
    s = one_up_two_downs()
    _, [result] = rewrite(s, tmp_path, f"quantize-ffn:{options}", fit=[X], choose=[X])
    assert result.fired == 0
    reasons = {refused.reason.split(":")[0].rstrip("01") for refused in result.refused}
    tied = {each for each in reasons if each.startswith("it runs a projection of block")}
    assert len(tied) == 1
    assert reasons - tied == others
    assert drift(run(s.model(), X), run(tmp_path / "after.onnx", X)) == 0


def test_parallel_blocks_of_which_one_stays(tmp_path):
    """They read one value: the projections of the block that stays stay."""
    s = Sketch()
    x = s.input("x", SHAPE)
    y = s.op("Add", s.op("Add", x, s.ffn(x, D, FF, name="/a")), s.ffn(x, D, FF, name="/b"))
    s.op("Identity", y, out=s.output("y", SHAPE))
    for kept, done in (("/a", 1), ("/b", 0)):
        model, [result] = rewrite(s, tmp_path, f"quantize-ffn:blocks={done}")
        assert result.fired == 1
        assert integers(onnx.load(tmp_path / "after.onnx").graph) == 2 * D * FF
        assert {block.name: block.quantized for block in find_ffn_blocks(model)} == {"/a": kept != "/a", "/b": kept != "/b"}


# weights that stay in float beside their integers

def shared_weights() -> Sketch:
    s = Sketch()
    x = s.input("x", SHAPE)
    up, down = s.weight(s.numbers(D, FF)), s.weight(s.numbers(FF, D))
    for _ in range(3):
        x = s.op("Add", x, s.op("MatMul", s.op("Relu", s.op("MatMul", x, up)), down))
    s.op("Neg", x, out=s.output("y", SHAPE))
    return s


def test_a_weight_that_is_stored_twice_is_named(tmp_path):
    for options, kept in (("keep_float=1", "block "), ("blocks=1", "blocks 0+2 ")):
        _, [result] = rewrite(shared_weights(), tmp_path, f"quantize-ffn:{options}", fit=[X], choose=[X])
        [note] = [note for note in result.notes if "twice" in note]
        assert note.startswith(kept)
    _, [result] = rewrite(shared_weights(), tmp_path, "quantize-ffn")
    assert not any("twice" in note for note in result.notes)
    _, [result] = rewrite(transformer(2, D, FF), tmp_path, "quantize-ffn:blocks=1")
    assert not any("twice" in note for note in result.notes)
