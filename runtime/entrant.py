"""A model in a race: loaded, its inputs and outputs bound to the device, ready to be run and clocked."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..graph.errors import InputError
from ..graph.model import Model
from ..graph.store import read_model
from .feed_check import check_keys
from .feeds import Feed, Feeds, name_of
from .machine import ResidentMemory
from .onnx_runtime import complaints, onnx_runtime
from .ort_values import device_value
from .placement import Placement
from .sessions import Session, Source, open_session

_CONFIG = {"session.force_spinning_stop": "1"}  # threads of the model that just ran must not spin into the other's time
_NO_GRAPH = "-1"  # the ``gpu_graph_id`` of a run that neither captures nor replays


@dataclass(frozen=True)
class Variant:
    """A model and how ONNX Runtime is to run it.

    Attributes:
        source: the model.
        name: what to call it; its path where nothing is said.
        config: session configuration entries.
    """

    source: Source
    name: str = ""
    config: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What to call it."""
        return self.name or str(self.source.path if isinstance(self.source, Model) else self.source)

    @property
    def bytes(self) -> int:
        """Size of the file and of its external data; of the weights where the model was never saved so."""
        if isinstance(self.source, Model):
            proto, weights = self.source.session_parts()
            return len(proto) + sum(values.nbytes for values in weights.values())
        return read_model(Path(self.source)).nbytes


class Entrant:
    """One model of a race.

    Attributes:
        variant: the model.
        load_ms: how long opening its session took.
        peak_bytes: how far resident memory rose at most while it was loaded and warmed up; None where unknown.
        placement: where each node ran.
    """

    def __init__(self, variant: Variant, feeds: Feeds, *, provider: str, threads: int | None, cuda_graph: bool,
                 use_tf32: bool, warm_up: int, allow_cpu: bool) -> None:
        self.variant = variant
        settings = {"enable_cuda_graph": "1"} if cuda_graph else {}
        with ResidentMemory() as memory:
            start = time.perf_counter()
            self.session = open_session(variant.source, provider=provider, threads=threads, use_tf32=use_tf32,
                                        config={**_CONFIG, **variant.config}, provider_options=settings, trace=True)
            self.load_ms = (time.perf_counter() - start) * 1e3
            self._runs = [_Run(self.session, variant.title, feed, number, cuda_graph) for number, feed in enumerate(feeds, 1)]
            self._runs[0].milliseconds(graph=False)
            with complaints(variant.title, "run"):
                self.placement: Placement | None = self.session.placement()
                if not allow_cpu:
                    self.session.check_placement()
            for run in self._runs * warm_up:
                for graph in {False, cuda_graph}:
                    run.milliseconds(graph=graph)
        self.peak_bytes = memory.peak_bytes

    def milliseconds(self, feed: int, *, graph: bool) -> float:
        """Run feed number ``feed`` once, as a CUDA graph or not, and say how long it took, the device synchronized."""
        return self._runs[feed].milliseconds(graph=graph)

    def outputs(self, feed: int, *, graph: bool) -> dict[str, Any]:
        """What a run on feed number ``feed`` gives, as arrays."""
        return self._runs[feed].outputs(graph=graph)


class _Run:
    """One feed bound to the device, with room for its outputs there."""

    def __init__(self, session: Session, title: str, feed: Feed, number: int, cuda_graph: bool) -> None:
        self.session = session
        self._title, self._feed = title, name_of(feed)
        self.binding = session.raw.io_binding()
        self.plain = _quiet_options({"gpu_graph_id": _NO_GRAPH} if cuda_graph else {})
        self.graphed = _quiet_options({"gpu_graph_id": str(number)}) if cuda_graph else None
        self._held: list[Any] = []  # the binding does not keep the arrays alive
        check_keys(session.name, feed, session.inputs)
        with complaints(self._title, "run", self._feed):
            self._bind(feed, cuda_graph)

    def _bind(self, feed: Feed, cuda_graph: bool) -> None:
        session = self.session
        kinds = {spec.name: spec for spec in session.inputs}
        for name, array in feed.items():
            if not hasattr(array, "dtype") or not kinds[name].is_tensor:
                raise InputError(f"{session.name}: input '{name}' is {kinds[name].onnx_type}: only tensors can be timed")
            self._held.append(device_value(array, kinds[name].element_type, session.device_of(name)))
            self.binding.bind_ortvalue_input(name, self._held[-1])
        for spec in session.outputs:
            self.binding.bind_output(spec.name, session.device_of(spec.name))
        if cuda_graph:
            self._fix_addresses()

    def milliseconds(self, *, graph: bool) -> float:
        """How long one run takes, from binding to results on the device."""
        options = self.graphed if graph else self.plain
        with complaints(self._title, "run", self._feed):
            self.binding.synchronize_inputs()
            start = time.perf_counter()
            self.session.raw.run_with_iobinding(self.binding, options)
            self.binding.synchronize_outputs()
            return (time.perf_counter() - start) * 1e3

    def outputs(self, *, graph: bool) -> dict[str, Any]:
        """The outputs of one run, copied to the CPU."""
        self.milliseconds(graph=graph)
        with complaints(self._title, "run", self._feed):
            return dict(zip((spec.name for spec in self.session.outputs), self.binding.copy_outputs_to_cpu(), strict=True))

    def _fix_addresses(self) -> None:
        """A CUDA graph replays on the same addresses: run once without one, then keep the outputs where they came out."""
        self.session.raw.run_with_iobinding(self.binding, self.plain)
        for spec, value in zip(self.session.outputs, self.binding.get_outputs(), strict=True):
            self._held.append(value)
            self.binding.bind_ortvalue_output(spec.name, value)


def _quiet_options(config: Mapping[str, str]) -> Any:
    options = onnx_runtime().RunOptions()
    options.log_severity_level = 4
    for key, value in config.items():
        options.add_run_config_entry(key, value)
    return options
