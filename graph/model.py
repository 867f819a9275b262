"""The model being rewritten: the original proto without its weights, the view over it, and where every weight lies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from .check import check_structure, prune
from .errors import InputError
from .export import Exporter
from .names import Names
from .save import Staged, stage_model
from .store import read_model
from .view import Importer
from .weights import StoredValues, Values, values_of

_LARGE = 1 << 10  # bytes; smaller initializers travel inside the bytes of a session


class Model:
    """An ONNX model in the course of being rewritten. All state of a rewrite lives here.

    Attributes:
        path: the file it was loaded from.
        proto: the ``ModelProto`` as loaded, tensors above about 1 KB replaced by stubs.
        graph: the editing view of the main graph (a ``gs.Graph``); passes edit this.
        names: gives out unused names.
        metadata: gives entries to put into ``metadata_props`` when it is saved.
    """

    def __init__(self, proto: onnx.ModelProto, values: dict[str, Values], path: Path, external: bool) -> None:
        check_structure(proto.graph, path)
        self.path = path
        self.external = external
        self.metadata: Callable[[], Mapping[str, str]] | None = None
        self._stored = dict(values)
        self._adopt(proto)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Model:
        """Read a model; its weights stay in the file.

        Raises:
            InputError: no such file, not an ONNX model, damaged, or external data missing.
        """
        stored = read_model(Path(path))
        return cls(stored.proto, stored.values, stored.path, stored.external)

    def save(self, path: str | PathLike[str], *, external: bool | None = None) -> None:
        """Write the model, whole or not at all.

        Args:
            external: weights in a data file beside the ``.onnx``; None: as the input was, and always above 2 GB.
        """
        with self.stage(path, external=external) as staged:
            staged.commit()

    def stage(self, path: str | PathLike[str], *, external: bool | None = None) -> Staged:
        """Write the model beside ``path`` under a temporary name, to be looked at before it is committed or discarded."""
        proto, values = self.to_proto()
        return stage_model(proto, values, Path(path), self.external if external is None else external, metadata=self.metadata)

    @property
    def stored(self) -> dict[str, Values]:
        """The weights of the file, by stub key."""
        return dict(self._stored)

    @property
    def data_files(self) -> set[Path]:
        """The files beside its own that its weights lie in."""
        return {each.source.path for each in self._stored.values() if isinstance(each, StoredValues)} - {self.path}

    @property
    def weights_folder(self) -> Path | None:
        """The folder in whose files most bytes of the weights lie, so that they can be mapped from there; None without any."""
        sizes: Counter[Path] = Counter()
        for values in self._stored.values():
            if isinstance(values, StoredValues) and values.place is not None:
                sizes[values.place.parent] += values.nbytes
        return max(sizes, key=sizes.__getitem__, default=None)

    @property
    def opset(self) -> int:
        """Version of the default operator set (``ai.onnx``)."""
        return self.opsets.get("", 1)

    @property
    def opsets(self) -> dict[str, int]:
        """Version of every operator set the model imports, by domain; the default domain is ``""``."""
        return {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in self.proto.opset_import}

    def graphs(self) -> list[tuple[str, gs.Graph]]:
        """Every graph with its path, ``main`` first, then the bodies of If, Loop and Scan, e.g. ``main/If_3/else_branch``."""
        return list(_walk("main", self.graph))

    @property
    def touched(self) -> bool:
        """Whether the view differs from the file."""
        return Exporter().graph(self.graph) is not self.proto.graph

    def inline_functions(self) -> None:
        """Replace calls of model-local functions by their bodies, so that what is in them can be rewritten.

        Only for a model that no pass has touched yet.
        """
        self._adopt(self._inlined_proto())

    def with_functions_inlined(self) -> Model:
        """A second model like this one, its local functions inlined."""
        return Model(self._inlined_proto(), self._stored, self.path, self.external)

    def replace(self, proto: onnx.ModelProto, values: Mapping[str, Values]) -> None:
        """Go on with ``proto`` in the place of the model as it stands. Nodes and values seen before are no longer of it.

        Args:
            values: what the stubs in it stand for that the model does not have yet.
        """
        self._stored = {**self._stored, **values}
        self._adopt(proto)

    def copy(self) -> Model:
        """A second model in the state this one is in, to try something on. The weights are not copied."""
        proto, values = self.to_proto()
        return Model(proto, values, self.path, self.external)

    def _inlined_proto(self) -> onnx.ModelProto:
        import onnx.inliner

        try:
            return onnx.inliner.inline_local_functions(self.proto)
        except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
            raise InputError(f"{self.path}: its local functions cannot be put in the place of their calls "
                             f"({str(error).strip()[:200]}): export the model again") from None

    def to_proto(self, outputs: Iterable[str] = ()) -> tuple[onnx.ModelProto, dict[str, Values]]:
        """The model as it stands now, weights as stubs, and what each stub stands for.

        Args:
            outputs: values of the main graph to add to its outputs.
        """
        exporter = Exporter()
        graph = exporter.graph(self.graph)
        added = [name for name in outputs if all(name != info.name for info in graph.output)]
        if graph is self.proto.graph and not added:
            return self.proto, self._stored
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        if graph is not self.proto.graph:
            proto.graph.CopyFrom(graph)
        known = {info.name: info for info in graph.value_info}
        proto.graph.output.extend(known.get(name) or onnx.ValueInfoProto(name=name) for name in added)
        imported = set(self.opsets)
        for _, view in self.graphs():
            for domain in {node.domain or "" for node in view.nodes} - imported - {"ai.onnx"}:
                proto.opset_import.add(domain=domain, version=1)
                imported.add(domain)
        return proto, {**self._stored, **exporter.values}

    def session_parts(self, outputs: Sequence[str] = (), *, only: bool = False, inputs: Mapping[str, int] | None = None,
                      folder: Path | None = None) -> tuple[bytes, dict[str, Values]]:
        """What ONNX Runtime needs for a session without a copy of the weights.

        Args:
            outputs: values of the main graph to give out besides its outputs.
            only: give out nothing but ``outputs``; what they do not need is left out.
            inputs: values of the main graph that will be fed, with their element types: what computes them is left out, and
                so are inputs that nothing needs then (implies ``only``).
            folder: weights that lie in files of this folder are named there, for ONNX Runtime to map into memory itself.

        Returns:
            The bytes of a model whose large main-graph initializers are external, and those initializers by name, except
            those in ``folder``. Everything else (weights inside subgraphs and Constant nodes) is in the bytes.
        """
        proto, values = self.to_proto(outputs)
        parts = onnx.ModelProto()
        parts.CopyFrom(proto)
        if only or inputs is not None:
            prune(parts.graph, set(outputs), inputs)
        large: dict[str, Values] = {}
        for tensor in parts.graph.initializer:
            weight = values_of(tensor, values)
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            if weight.nbytes < _LARGE:
                tensor.CopyFrom(_inlined(tensor, values))
                continue
            place = weight.place if isinstance(weight, StoredValues) and folder is not None else None
            del tensor.external_data[:]
            if place is not None and place.parent == folder:
                assert isinstance(weight, StoredValues)
                entries = {"location": place.name, "offset": str(weight.offset), "length": str(weight.nbytes)}
            else:
                large[tensor.name] = weight
                entries = {"location": "ffnfold"}
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=value)
        for tensor in _other_stubs(parts):
            tensor.CopyFrom(_inlined(tensor, values))
        return parts.SerializeToString(), large

    def _adopt(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.names = Names(proto.graph)
        self.graph = Importer(self._stored, self.opset).graph(proto.graph)


def _walk(path: str, graph: gs.Graph) -> Iterator[tuple[str, gs.Graph]]:
    yield path, graph
    for number, node in enumerate(graph.nodes):
        for key, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                yield from _walk(f"{path}/{node.name or f'{node.op}_{number}'}/{key}", value)


def _other_stubs(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """The stubs that are not initializers of the main graph."""
    pending: list[tuple[list[onnx.NodeProto], list[onnx.TensorProto]]] = [(list(model.graph.node), [])]
    pending += [(list(function.node), []) for function in model.functions]
    while pending:
        nodes, initializers = pending.pop()
        for tensor in initializers:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                yield tensor
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t") and attribute.t.data_location == onnx.TensorProto.EXTERNAL:
                    yield attribute.t
                for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    pending.append((list(graph.node), list(graph.initializer)))


def _inlined(tensor: onnx.TensorProto, values: dict[str, Values]) -> onnx.TensorProto:
    weight = values_of(tensor, values)
    raw = b"".join(weight.tiles(1 << 24))
    return onnx.TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, raw_data=raw)


