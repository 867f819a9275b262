"""distill-ffn: the weights that other passes put in, moved together by what the original model gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ..graph.builder import Builder
from ..graph.edit import consumers, producer, replace_uses
from ..graph.export import constants_read
from ..graph.gradient.tape import NoDerivativeError
from ..graph.model import Model
from .base import Context, Pass, PassResult, Refused
from .distilling.descent import descend
from .distilling.student import Student, why_no_student

_WORTH = 0.99  # of the loss before, which the feeds that choose must see less than
_LINEAR = ("MatMul", "Gemm")
_NORM = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")


@dataclass(frozen=True)
class DistillFFN(Pass):
    """Move the weights that passes before it put in, all together, towards what the original model gives.

        minimize over W   Σ_t w_t ‖y_t(W) − y_t‖² / ‖y_t‖²       (KL divergence where the output is ``logits``)

    Passes fit one block after the other, from what goes into a block to what should come out. This one goes through the whole
    graph: its derivatives are written as more nodes of it, which ONNX Runtime runs, so that no training framework is needed; the
    original model says what is right, so that no labels are. Adam goes ``epochs`` times through the feeds; a step moves a number
    by about ``rate`` times the root mean square of its matrix. With ``vary=true`` it seldom sees a text or a picture
    twice (see :mod:`joined_texts`, :mod:`varied_pictures`). The weights after the epoch that lost least on the feeds that choose
    are kept, where that is less than before.

    The original is the model as it was before the first approximate pass of the plan, or the file ``teacher``. ``weights=new``
    moves the matrices and vectors that it does not have (by name), ``weights=all`` those of all other linears (MatMul, Gemm, the
    bias added to one) and norms too. Zeros of sparse matrices stay. Shapes stay, so the model is as fast as it was.

    Does not fire where no pass before it in the plan is approximate and no ``teacher`` is given; on models of an opset before 13;
    where what is new is not float32 (let ``to-half`` and ``quantize-ffn`` come after it); where no derivative leads from there to
    anything that the original has too. Operators of other domains and graphs inside (If, Loop) have none: what they read is
    compared then, and a note says so.

    Source: knowledge distillation, arXiv 1503.02531; Adam, arXiv 1412.6980; docs/approximations.md.
    """

    name: ClassVar[str] = "distill-ffn"
    exact: ClassVar[bool] = False
    weights: Literal["new", "all"] = field(default="new", metadata={"help": "which weights move"})
    epochs: int = field(default=8, metadata={"help": "how often it goes through the feeds"})
    rate: float = field(default=0.004, metadata={"help": "size of a step at its largest, as a part of that of a matrix"})
    teacher: str = field(default="", metadata={"help": "file of the original model, where the plan does not begin with it"})
    vary: bool = field(default=True, metadata={"help": "make other texts and pictures of those of the feeds"})

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs={self.epochs}: it has to go through the feeds at least once")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate={self.rate} must lie between 0 and 1: it is a part of the size of a matrix")

    @property
    def needs_feeds(self) -> bool:
        """Always."""
        return True

    def run(self, model: Model, context: Context) -> PassResult:
        """Move the weights where that helps."""
        original = Model.load(self.teacher) if self.teacher else context.original
        if original is None:
            return self._refused("there is no original to come nearer to: put it behind a pass that approximates blocks, or "
                                 "name the original with teacher=FILE")
        constants = _movable(model, original, everything=self.weights == "all")
        if not constants:
            return self._refused("nothing in the main graph that the original does not have is a float32 weight: passes that put "
                                 "one in come before this one, to-half and quantize-ffn after it")
        refusal = why_no_student(model, original, list(constants))
        if refusal is not None:
            return self.result(0, [refusal])
        assert context.fit is not None
        try:
            student = Student(model, original, list(constants), context)
        except NoDerivativeError as error:
            return self._refused("the way back is cut by too many nodes that no rule covers", str(error))
        start = {name: constants[name]._values.load().astype(np.float32) for name in student.weights}
        found = descend(student, start, model, context, epochs=self.epochs, rate=self.rate, vary=self.vary,
                        progress=lambda message: context.progress(f"{self.name}: {message}"))
        notes = _where(model, student)
        if len(student.weights) < len(constants):
            notes.append(f"{len(constants) - len(student.weights)} of {len(constants)} weights stay: no derivative leads to them")
        if not found.after < _WORTH * found.before:
            return self._refused(f"the feeds that choose do not see it (loss {found.before:.4g} before, {found.after:.4g} after)",
                                 student.ends[0], notes)
        for name in student.weights:
            build = Builder(model, model.graph, name, onnx.TensorProto.FLOAT)
            replace_uses(constants[name], build.constant(found.weights[name], "distilled"))
        return self.result(len(student.weights), [], [
            f"loss on the feeds that choose {found.before:.4g} before, {found.after:.4g} after epoch {found.epochs} of "
            f"{self.epochs}", *notes])

    def _refused(self, reason: str, value: str = "", notes: Sequence[str] = ()) -> PassResult:
        return self.result(0, [Refused(reason, value)], notes)


def _movable(model: Model, original: Model, *, everything: bool) -> dict[str, gs.Constant]:
    """Float32 weights of linears and norms of the main graph by name: those that ``original`` does not have, or all."""
    outputs = {id(tensor) for tensor in model.graph.outputs}
    known = {constant.name for constant in constants_read(original.graph.nodes)}
    found = {}
    for node in model.graph.nodes:
        for tensor in node.inputs:
            if not isinstance(tensor, gs.Constant) or tensor._values.onnx_type != onnx.TensorProto.FLOAT:
                continue
            private = id(tensor) not in outputs and not getattr(tensor, "captured", False)
            new = tensor.name not in known
            if private and (new or everything) and all(_weighs(reader, tensor, new) for reader in consumers(tensor)):
                found[tensor.name] = tensor
    return {name: tensor for name, tensor in found.items() if np.isfinite(tensor._values.load()).all()}


def _weighs(node: gs.Node, tensor: gs.Tensor, new: bool) -> bool:
    """Whether ``tensor`` is the matrix of a linear, its bias, or of a norm; where it is new also any other vector."""
    place = next(index for index, each in enumerate(node.inputs) if each is tensor)
    rank, size = len(tensor.shape), int(np.prod(tensor.shape))
    if rank == 2:
        return node.op in _LINEAR and place == 1
    if rank != 1 or size < 2:
        return False
    if node.op in _LINEAR or node.op in _NORM:
        return place > 0
    beside = node.op == "Add" and getattr(producer(node.inputs[1 - place]), "op", "") in _LINEAR
    return beside or (new and node.op in ("Add", "Mul"))


def _where(model: Model, student: Student) -> list[str]:
    inside = sorted(set(student.ends) - {tensor.name for tensor in model.graph.outputs})
    if not inside:
        return []
    return [f"compared at {', '.join(inside)}, as no derivative leads through {', '.join(student.blocked) or 'what is behind'}"]
