"""A sketch through a plan: written, read, rewritten, written and read again, as a user's model would be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from ffn_graphs import Sketch
from ffnfold.graph.model import Model
from ffnfold.passes.base import PassResult
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds


def rewrite(source: Sketch | onnx.ModelProto, folder: Path, *plan: str, fit: Sequence[Mapping[str, Any]] | None = None,
            choose: Sequence[Mapping[str, Any]] | None = None) -> tuple[Model, list[PassResult]]:
    """The rewritten model, read back from ``after.onnx`` (``before.onnx`` beside it), and what each pass did."""
    onnx.save_model(source.model() if isinstance(source, Sketch) else source, folder / "before.onnx")
    model = Model.load(folder / "before.onnx")
    results = run_plan(model, Plan.parse(plan), fit=None if fit is None else Feeds.of(fit),
                       choose=None if choose is None else Feeds.of(choose), threads=1)
    model.save(folder / "after.onnx")
    return Model.load(folder / "after.onnx"), results


def feeds_of(shape: Sequence[int], count: int = 1, *, seed: int = 3, name: str = "x", dtype: Any = np.float32,
             **others: Any) -> list[dict[str, Any]]:
    """``count`` feeds of normal numbers for the input ``name``; ``others`` are the same in all of them."""
    random = np.random.default_rng(seed)
    return [{name: random.standard_normal(shape).astype(dtype), **others} for _ in range(count)]


class Branch(Sketch):
    """What goes into the branch of an If: its names differ from those of the graph around it."""

    def weight(self, array: Any, name: str | None = None) -> str:
        return super().weight(array, name or f"inner_weight_{len(self.initializers)}")

    def op(self, op: str, *inputs: str, out: Any = None, name: str | None = None, domain: str = "", **attrs: Any) -> str:
        return super().op(op, *inputs, out=out or f"inner_{op}_{len(self.nodes)}", name=name, domain=domain, **attrs)


def in_branch(then: Branch, value: str, shape: Sequence[int | str], opset: int = 17) -> Sketch:
    """``y = value`` of the branch ``then`` where the input ``wanted`` is true, else ``y = x``; both read x from outside."""
    then.op("Identity", value, out=then.output("then_y", shape))
    otherwise = Branch(opset)
    otherwise.op("Identity", "x", out=otherwise.output("else_y", shape))
    s = Sketch(opset)
    s.input("x", shape)
    s.input("wanted", [], onnx.TensorProto.BOOL)
    s.op("If", "wanted", out=s.output("y", shape), then_branch=then.graph("then"), else_branch=otherwise.graph("else"))
    return s
