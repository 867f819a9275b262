"""quantize-ffn: the linears of attention, and the head."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import Sketch, drift, run
from ffnfold.graph.model import Model
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds
from onnx import TensorProto
from quantizing import FF, D, X, executed, lost, quantize
from rewriting import Branch


def attention() -> Sketch:
    """One layer with q, k, v and out projections, an FFN, a small linear, and a head."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    normed = s.norm(x, D)
    q, k, v = (s.linear(normed, D, 4 * D, name=f"/layer.0/attention/{which}") for which in "qkv")
    scores = s.op("Softmax", s.op("Div", s.op("MatMul", q, s.op("Transpose", k, perm=[0, 2, 1])), s.number(16)), axis=-1)
    mixed = s.linear(s.op("MatMul", scores, v), 4 * D, D, name="/layer.0/attention/out")
    x = s.op("Add", x, mixed)
    x = s.op("Add", x, s.ffn(s.norm(x, D), D, FF, activation="gelu", name="/layer.0/ffn"))
    s.op("MatMul", s.norm(x, D), s.weight(s.numbers(D, 1000)), out=s.output("logits"), name="/head/MatMul")
    s.op("MatMul", x, s.weight(s.numbers(D, 2)), out=s.output("score"), name="/score/MatMul")
    return s


def test_linears_of_attention(tmp_path):
    s = attention()
    model, result = quantize(s, tmp_path, "also=attention,row_scale=false")
    assert result.fired == 3, "the FFN block, what reads the first norm, the projection behind the heads"
    assert "head" in " ".join(refused.reason for refused in result.refused)
    assert drift(run(s.model(), X), run(model, X)) < 0.03
    ran = executed(tmp_path)
    assert (ran["MatMulIntegerToFloat"], ran["DynamicQuantizeMatMul"], ran["DynamicQuantizeLinear"]) == (3, 3, 1)
    _, result = quantize(s, tmp_path, "also=everything")
    assert result.fired == 4
    assert not result.refused
    _, result = quantize(s, tmp_path, "blocks=none,also=head,row_scale=false")
    assert (result.fired, result.refused) == (1, [])
    assert executed(tmp_path)["DynamicQuantizeMatMul"] == 1


def with_head(behind: str, width: int = 32 * D) -> Sketch:
    """An FFN block, then a linear ``[D, width]``, then what is ``behind``."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    x = s.op("Add", x, s.ffn(x, D, FF, activation="gelu"))
    x = s.op("MatMul", x, s.weight(s.numbers(D, width)))
    picked = {"Softmax": lambda: s.op("Softmax", x, axis=-1), "ArgMax": lambda: s.op("ArgMax", x, axis=-1),
              "Gather": lambda: s.op("Gather", x, s.weight(np.asarray(-1)), axis=1)}
    if behind == "linear":
        x = s.op("MatMul", s.op("Relu", x), s.weight(s.numbers(width, D)))
    s.op("Identity", picked[behind]() if behind in picked else x, out=s.output("y"))
    return s


@pytest.mark.parametrize("behind", ["nothing", "Softmax", "ArgMax", "Gather"])
def test_the_head_is_found_through_what_picks_from_it(tmp_path, behind):
    _, result = quantize(with_head(behind), tmp_path, "blocks=none,also=head")
    assert result.fired == 1
    _, result = quantize(with_head(behind), tmp_path, "blocks=none,also=attention")
    assert [each.reason for each in result.refused] == ["it is the head (also=head and also=everything include it)"]


@pytest.mark.parametrize("last", [True, False])
def test_a_wide_linear_in_a_branch_is_a_head_where_an_output_of_the_model_is_what_it_gives(tmp_path, last):
    s, branches = Sketch(), {}
    x = s.input("x", ["batch", "tokens", D])
    s.input("wanted", [], TensorProto.BOOL)
    x = s.op("Add", x, s.ffn(x, D, FF, activation="gelu"), name="/join")
    for name in ("then", "else"):
        inner = Branch()
        inner.op("MatMul", x, inner.weight(inner.numbers(D, 32 * D), f"{name}_w"), out=inner.output(f"{name}_y", None))
        branches[f"{name}_branch"] = inner.graph(name)
    chosen = s.op("If", "wanted", **branches)
    if not last:
        chosen = s.op("MatMul", s.op("Relu", chosen), s.weight(s.numbers(32 * D, D)))
    s.op("Identity", chosen, out=s.output("y"))
    _, result = quantize(s, tmp_path, "blocks=none,also=head")
    assert result.fired == (2 if last else 0)


@pytest.mark.parametrize(("behind", "width"), [("linear", 32 * D), ("nothing", 3 * D)])
def test_where_there_is_no_head_a_note_says_so(tmp_path, behind, width):
    _, result = quantize(with_head(behind, width), tmp_path, "blocks=none,also=head")
    assert result.fired == 0
    [note] = result.notes
    assert note.startswith("no linear gives logits here")


def test_a_head_that_is_stored_as_integers(tmp_path):
    quantize(with_head("nothing"), tmp_path, "blocks=none,also=head,form=weight-only")
    model = Model.load(tmp_path / "quantized.onnx")
    [result] = run_plan(model, Plan.parse(["quantize-ffn:blocks=none,also=head"]), threads=1)
    assert [each.reason for each in result.refused] == ["its weights are stored as integers already"]


def test_linears_of_attention_in_every_form(tmp_path):
    for options in ("also=attention,smooth=feeds", "also=everything,bits=4", "also=everything,form=weight-only",
                    "also=attention,smooth=feeds,gptq=true,bias_correction=true,scale=mse"):
        assert lost(attention(), tmp_path, options, Feeds.of([X])) < (0.15 if "bits" in options else 0.02), options


def test_attention_in_parallel_shares_the_quantization_of_the_ffn(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    y = s.norm(x, D)
    value = s.linear(y, D, 4 * D, name="/attention/v")
    mixed = s.linear(s.op("Softmax", value, axis=1), 4 * D, D, name="/attention/out")
    branch = s.ffn(y, D, FF, activation="gelu", name="/ffn")
    s.op("Add", s.op("Add", x, mixed), branch, out=s.output("y", ["batch", "tokens", D]))
    _, result = quantize(s, tmp_path, "also=attention,row_scale=false")
    assert result.fired == 2
    assert executed(tmp_path)["DynamicQuantizeLinear"] == 1
