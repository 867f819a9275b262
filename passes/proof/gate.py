"""What a model must pass after each pass: our own checks, onnx.checker, and ONNX Runtime itself."""

from __future__ import annotations

from functools import cached_property

import onnx

from ...graph.check import check_structure, sort_nodes
from ...graph.errors import BrokenByPass, InputError
from ...graph.model import Model
from ...graph.tensors import tensors
from ...graph.weights import stub_key
from ...runtime.load import is_missing_kernel, load_complaint


class Gate:
    """Lets through what is valid, and what is wrong with the input already: only what a pass broke counts.

    Args:
        model: the plan's input.
        provider: where it will run; what only the CPU has no kernel for counts for the CPU alone.
    """

    def __init__(self, model: Model, provider: str = "cpu") -> None:
        self._provider = provider
        self._proto, self._values = model.to_proto()
        self._model = model
        self._interface = _interface(self._proto)

    def check(self, model: Model, pass_name: str) -> None:
        """Check ``model`` as it stands after the pass called ``pass_name``.

        Raises:
            BrokenByPass: it is not valid any more.
        """
        try:
            proto, _ = model.to_proto()
            check_structure(proto.graph, model.path)
        except InputError as error:
            raise BrokenByPass(f"pass '{pass_name}' broke the graph: {error}") from error
        if _interface(proto) != self._interface:
            raise BrokenByPass(f"pass '{pass_name}' changed the inputs or outputs of the graph")
        complaint = checker_complaint(proto)
        if complaint is not None and self._input_is_accepted:
            raise BrokenByPass(f"pass '{pass_name}' made a graph that onnx.checker refuses: {complaint}")
        complaint = load_complaint(model)
        if complaint is not None and self._provider != "cpu" and is_missing_kernel(complaint):
            return
        if complaint is not None and self._input_loads:
            raise BrokenByPass(f"pass '{pass_name}' made a graph that ONNX Runtime does not load: {complaint}")

    @cached_property
    def _input_is_accepted(self) -> bool:
        return checker_complaint(self._proto) is None

    @cached_property
    def _input_loads(self) -> bool:
        return load_complaint(Model(self._proto, self._values, self._model.path, self._model.external)) is None


def checker_complaint(proto: onnx.ModelProto) -> str | None:
    """The first line of what onnx.checker says against the model, weights left out and nodes sorted; None if nothing."""
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(proto)
    sort_nodes(skeleton.graph)
    for tensor, _ in tensors(skeleton):
        if stub_key(tensor) is not None:  # the checker would look for the file
            tensor.dims[:] = [0]
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    try:
        onnx.checker.check_model(skeleton)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        return str(error).strip().splitlines()[0][:300]
    return None


def _interface(proto: onnx.ModelProto) -> tuple[list[bytes], list[bytes]]:
    return ([info.SerializeToString(deterministic=True) for info in proto.graph.input],
            [info.SerializeToString(deterministic=True) for info in proto.graph.output])
