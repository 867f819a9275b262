"""Blocks on whose tokens a value is not finite: refused with that reason, and nothing is complained of on the way."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from ffn_graphs import Sketch, drift, run
from rewriting import feeds_of, rewrite

D, FF = 8, 32
FIT = feeds_of((4, 8, D), 10, seed=11)
passes = pytest.mark.parametrize("plan", [
    "slim-ffn:multiple=1,refine=1", "linearize-ffn", "linearize-ffn:fit=stein", "factorize-ffn", "sparsify-ffn", "bilinear-ffn",
    "split-ffn:multiple=1", "prune-skip:fit=slim", "prune-bias", "remove-ffn", "remove-ffn:keep=scale", "remove-ffn:keep=rank"])


def endless() -> Sketch:
    """What the block adds is infinite in one feature, its inputs and its neurons are not."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    down = s.numbers(FF, D)
    down[:, 0] = np.inf
    hidden = s.activation("gelu", s.linear(s.norm(x, D), D, FF))
    s.op("Add", x, s.op("Add", s.op("MatMul", hidden, s.weight(down)), s.weight(s.numbers(D))), out=s.output("y"))
    return s


@passes
def test_no_token_with_finite_values(tmp_path, plan):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        _, [result] = rewrite(endless(), tmp_path, plan, fit=FIT)
    assert result.fired == 0
    assert [each.reason for each in result.refused] == ["none of the 320 tokens that reached it has finite values"]


@passes
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tokens_that_are_not_finite_are_left_out(tmp_path, plan, value):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    s.op("Add", x, s.ffn(x, activation="gelu"), out=s.output("y"))
    clean = [{"x": feed["x"][:, 1:]} for feed in FIT]
    dirty = [{"x": feed["x"].copy()} for feed in FIT]
    for feed in dirty:
        feed["x"][:, 0] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        after = [run(rewrite(s, tmp_path, plan, fit=feeds)[0], clean[0]) for feeds in (clean, dirty)]
    assert drift(*after) < 1e-4


@pytest.mark.parametrize("by", ["cosine", "output"])
def test_scores_of_what_is_not_finite_are_no_complaint(tmp_path, by):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        _, [result] = rewrite(endless(), tmp_path, f"remove-ffn:keep=nothing,count=1,by={by}", fit=FIT)
    assert result.fired == (1 if by == "cosine" else 0)
