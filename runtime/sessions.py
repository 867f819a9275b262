"""Sessions: a model, from a file or from memory, ready to run in ONNX Runtime."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ..graph.errors import InputError
from ..graph.model import Model
from .feed_check import check_keys
from .feeds import name_of
from .lean import make_lean
from .onnx_runtime import PROVIDERS, complaints, onnx_runtime, providers, session_options
from .ort_values import array_value, is_foreign, to_array, weight_value
from .placement import Placement, read_trace
from .specs import InputSpec, ValueSpec, specs_of

_FOLDER = "session.model_external_initializers_file_folder_path"
Source = Path | str | PathLike[str] | Model
"""Where a session comes from: the path of a model, or a model in the course of being rewritten."""


class Session:
    """A model that runs.

    Attributes:
        name: what to call it in messages: its path.
        provider: ``cpu`` or ``cuda``.
        inputs: what it takes, initializers that may be overridden last.
        outputs: what it gives, values asked for at opening last.
        raw: the ``onnxruntime.InferenceSession``.
    """

    def __init__(self, raw: Any, name: str, provider: str, held: Sequence[Any],
                 trace: tempfile.TemporaryDirectory[str] | None = None) -> None:
        self.raw = raw
        self.name = name
        self.provider = provider
        self.inputs: tuple[InputSpec, ...] = (
            *(InputSpec(*spec, optional=spec[1].startswith("optional(")) for spec in specs_of(raw.get_inputs())),
            *(InputSpec(*spec, optional=True) for spec in specs_of(raw.get_overridable_initializers())))
        self.outputs: tuple[ValueSpec, ...] = tuple(ValueSpec(*spec) for spec in specs_of(raw.get_outputs()))
        self._held = held  # ONNX Runtime reads these weights in place
        self._cpu_edges = _on_cpu(raw) if provider != "cpu" else frozenset()
        self._trace = trace
        self._placement: Placement | None = None

    def device_of(self, name: str) -> str:
        """Where the input or output ``name`` is best bound: where the nodes that read or write it want it.

        An input that only arithmetic on shapes reads is wanted on the CPU; on the device it would be copied at every run.
        """
        return "cpu" if name in self._cpu_edges else self.provider

    def placement(self) -> Placement | None:
        """Where each node ran, in all runs before the first call; None if it was opened without ``trace``."""
        if self._trace is not None:
            self._placement = read_trace(Path(self.raw.end_profiling()))
            self._trace.cleanup()
            self._trace = None
        return self._placement

    def check_placement(self) -> None:
        """Check that nothing fell back to the CPU, on another provider than that.

        Raises:
            InputError: nodes that compute did; names them and says how to mend it.
        """
        placement = None if self.provider == "cpu" else self.placement()
        complaint = None if placement is None else placement.complaint()
        if complaint is not None:
            raise InputError(f"{self.name}: {complaint}")

    def close(self) -> None:
        """Give back its memory; only ``inputs`` and ``outputs`` can be asked for then."""
        self.raw, self._held = None, ()

    def run(self, feed: Mapping[str, Any], names: Sequence[str] | None = None, *,
            of: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Run once.

        Args:
            feed: input name → array (list of arrays for a sequence, None for an optional without a value).
            names: the outputs wanted; None for all.
            of: the feed that ``feed`` was made from, for messages; ``feed`` itself where nothing is said.

        Returns:
            Output name → array; a list for a sequence.

        Raises:
            InputError: the feed does not fit, or ONNX Runtime fails while it runs.
        """
        wanted = [spec.name for spec in self.outputs] if names is None else list(names)
        outputs = {spec.name: spec for spec in self.outputs}
        unknown = [name for name in wanted if name not in outputs]
        if unknown:
            raise InputError(f"{self.name}: no output '{unknown[0]}': choose from {', '.join(outputs)}")
        if not wanted:
            return {}
        check_keys(self.name, feed, self.inputs)
        specs = [*(spec for spec in self.inputs if spec.name in feed), *(outputs[name] for name in wanted)]
        with complaints(self.name, "run", name_of(feed if of is None else of)):
            if any(spec.is_tensor and is_foreign(spec.element_type) for spec in specs):
                return self._run_bound(feed, wanted)
            return dict(zip(wanted, self.raw.run(wanted, dict(feed)), strict=True))

    def _run_bound(self, feed: Mapping[str, Any], wanted: list[str]) -> dict[str, Any]:
        """As ``run``, for element types that have no NumPy type of their own."""
        binding = self.raw.io_binding()
        kinds = {spec.name: spec.element_type for spec in self.inputs}
        values = {name: array_value(array, kinds[name]) for name, array in feed.items()}  # alive until the run is over
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in wanted:
            binding.bind_output(name, "cpu")
        self.raw.run_with_iobinding(binding)
        return {name: to_array(value) for name, value in zip(wanted, binding.get_outputs(), strict=True)}


def _on_cpu(raw: Any) -> frozenset[str]:
    """Inputs and outputs that ONNX Runtime has on the CPU; none where this version does not tell."""
    try:
        pairs = [*zip(raw.get_inputs(), raw.get_input_memory_infos(), strict=True),
                 *zip(raw.get_outputs(), raw.get_output_memory_infos(), strict=True)]
    except (AttributeError, RuntimeError, ValueError):
        return frozenset()
    return frozenset(value.name for value, place in pairs if place is not None and place.name in ("Cpu", "CudaPinned"))


def open_session(source: Source, *, provider: str = "cpu", threads: int | None = None, outputs: Sequence[str] = (),
                 only: bool = False, inputs: Mapping[str, int] | None = None, optimize: bool = True,
                 lean: bool = False, use_tf32: bool = False, config: Mapping[str, str] | None = None,
                 provider_options: Mapping[str, str] | None = None, trace: bool = False) -> Session:
    """A session over ``source``. ONNX Runtime opens a file itself; a ``Model`` gets its weights without a copy.

    Args:
        source: path of a model, or a ``Model`` as it stands now.
        provider: ``cpu`` or ``cuda``.
        threads: threads inside an operator; None lets ONNX Runtime choose.
        outputs: values of the main graph to give out besides the outputs.
        only: give out nothing but ``outputs``, and compute only what they need.
        inputs: values of the main graph that will be fed instead of computed, with their element types (implies ``only``).
        optimize: False turns ONNX Runtime's graph optimizations off.
        lean: keep memory down at the cost of speed (see :func:`~.lean.make_lean`).
        use_tf32: whether CUDA may round float32 operands of MatMul to TF32 (10 bits of mantissa).
        config: session configuration entries.
        provider_options: options of the CUDA provider.
        trace: write down where each node runs, until ``Session.placement`` is called.

    Raises:
        InputError: no such file or value, ONNX Runtime refuses the model, or the provider is missing.
    """
    options = session_options(config or {}, threads, optimize)
    chosen = providers(provider, provider_options or {}, use_tf32)
    folder = tempfile.TemporaryDirectory(prefix="ffnfold-") if trace else None
    if folder is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder.name) / "trace")
    if (outputs or lean) and not isinstance(source, Model):
        source = Model.load(source)
    held: list[Any] = []
    if isinstance(source, Model):
        name = str(source.path)
        opened: bytes | str
        folder_of_weights = source.weights_folder
        opened, weights = source.session_parts(tuple(outputs), only=only, inputs=inputs, folder=folder_of_weights)
        if folder_of_weights is not None:
            options.add_session_config_entry(_FOLDER, str(folder_of_weights))
        if lean and provider == "cpu":
            make_lean(options, opened)
        with complaints(name, "take the weights of"):
            held = [weight_value(values) for values in weights.values()]
            if held:
                options.add_external_initializers(list(weights), held)
    else:
        name = opened = str(source)
        if not os.path.isfile(source):  # which, unlike Path.is_file, does not fail on a name that is too long
            raise InputError(f"{name}: no such file: check the path")
    with complaints(name, "load"):
        raw = onnx_runtime().InferenceSession(opened, options, providers=chosen, enable_fallback=False)
    if PROVIDERS[provider] not in raw.get_providers():
        raise InputError(f"provider '{provider}': its libraries cannot be loaded: check the NVIDIA driver, then "
                         "pip install 'onnxruntime-gpu[cuda,cudnn]'")
    session = Session(raw, name, provider, held, folder)
    missing = set(outputs) - {spec.name for spec in session.outputs}
    if missing:
        raise InputError(f"{name}: no value '{min(missing)}' in its main graph: check the name")
    return session
