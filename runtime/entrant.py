"""A model in a race: loaded, its inputs and outputs bound to the device, ready to be run and clocked."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..graph.errors import InputError
from ..graph.model import Model
from ..graph.store import read_model
from .feed_check import check_keys
from .feeds import Feed, Feeds
from .machine import ResidentMemory
from .onnx_runtime import complaints, onnx_runtime
from .ort_values import array_value, is_foreign
from .sessions import Session, Source, open_session
from .specs import Array

_CONFIG = {
    "session.force_spinning_stop": "1",  # threads of the model that just ran must not spin into the other's time
    "session.record_ep_graph_assignment_info": "1",
}


class Entrant:
    """One model of a race.

    Attributes:
        name: its path.
        load_ms: how long opening its session took.
        peak_bytes: how far resident memory rose at most while it was loaded and warmed up; None where unknown.
    """

    def __init__(self, source: Source, feeds: Feeds, *, provider: str, threads: int | None, cuda_graph: bool,
                 use_tf32: bool, warm_up: int) -> None:
        self.name = str(source.path if isinstance(source, Model) else source)
        self.source = source
        settings = {"enable_cuda_graph": "1"} if cuda_graph else {}
        with ResidentMemory() as memory:
            start = time.perf_counter()
            self.session = open_session(source, provider=provider, threads=threads, use_tf32=use_tf32, config=_CONFIG,
                                        provider_options=settings)
            self.load_ms = (time.perf_counter() - start) * 1e3
            with complaints(self.name, "run"):
                self._runs = [_Run(self.session, feed, number, cuda_graph) for number, feed in enumerate(feeds, 1)]
                for run in self._runs * warm_up:
                    run.milliseconds()
        self.peak_bytes = memory.peak_bytes

    def milliseconds(self, feed: int) -> float:
        """Run feed number ``feed`` once and say how long it took, the device synchronized."""
        with complaints(self.name, "run"):
            return self._runs[feed].milliseconds()

    @property
    def bytes(self) -> int:
        """Size of the file and of its external data; of the weights where the model was never saved so."""
        if isinstance(self.source, Model):
            proto, weights = self.source.session_parts()
            return len(proto) + sum(values.nbytes for values in weights.values())
        return read_model(Path(self.source)).nbytes

    @property
    def nodes_by_provider(self) -> Mapping[str, int] | None:
        """Provider → nodes given to it, counted when ONNX Runtime divided the graph (later fusions make them fewer).

        None where this ONNX Runtime does not tell.
        """
        tell = getattr(self.session.raw, "get_provider_graph_assignment_info", None)
        if tell is None:
            return None
        try:
            parts = tell()
        except Exception:  # a build that knows the call and not the configuration entry
            return None
        count: Counter[str] = Counter()
        for part in parts:
            count[part.ep_name] += len(part.get_nodes())
        return dict(sorted(count.items()))


class _Run:
    """One feed bound to the device, with room for its outputs there."""

    def __init__(self, session: Session, feed: Feed, number: int, cuda_graph: bool) -> None:
        self.session = session.raw
        self.device = session.provider
        self.binding = session.raw.io_binding()
        self.options = _quiet_options()
        self._held: list[Any] = []  # the binding does not keep the arrays alive
        check_keys(session.name, feed, session.inputs)
        kinds = {spec.name: spec for spec in session.inputs}
        for name, array in feed.items():
            if not hasattr(array, "dtype") or not kinds[name].is_tensor:
                raise InputError(f"{session.name}: input '{name}' is {kinds[name].onnx_type}: only tensors can be timed")
            self._held.append(self._on_device(array, kinds[name].element_type))
            self.binding.bind_ortvalue_input(name, self._held[-1])
        for spec in session.outputs:
            self.binding.bind_output(spec.name, self.device)
        if cuda_graph:
            self._fix_addresses(session, number)

    def milliseconds(self) -> float:
        """How long one run takes, from binding to results on the device."""
        self.binding.synchronize_inputs()
        start = time.perf_counter()
        self.session.run_with_iobinding(self.binding, self.options)
        self.binding.synchronize_outputs()
        return (time.perf_counter() - start) * 1e3

    def _on_device(self, array: Array, onnx_type: int) -> Any:
        if self.device == "cpu":
            return array_value(array, onnx_type)
        ort_value = onnx_runtime().OrtValue
        if not is_foreign(onnx_type):
            return ort_value.ortvalue_from_numpy(array, self.device, 0)
        there = ort_value.ortvalue_from_shape_and_type(list(array.shape), onnx_type, self.device)
        onnx_runtime().copy_tensors([array_value(array, onnx_type)], [there])
        return there

    def _fix_addresses(self, session: Session, number: int) -> None:
        """A CUDA graph replays on the same addresses: run once without one, then keep the outputs where they came out."""
        self.options.add_run_config_entry("gpu_graph_id", "-1")
        self.session.run_with_iobinding(self.binding, self.options)
        for spec, value in zip(session.outputs, self.binding.get_outputs(), strict=True):
            self._held.append(value)
            self.binding.bind_ortvalue_output(spec.name, value)
        self.options = _quiet_options()
        self.options.add_run_config_entry("gpu_graph_id", str(number))


def _quiet_options() -> Any:
    options = onnx_runtime().RunOptions()
    options.log_severity_level = 4
    return options
