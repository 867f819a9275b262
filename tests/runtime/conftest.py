"""Small models for the tests of the runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper


class Workshop:
    """Makes small models in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, nodes, inputs, outputs, weights=None, name="model.onnx", opset=21, **settings) -> Path:
        """``inputs`` and ``outputs``: name → (type, shape); ``weights``: name → array or TensorProto."""
        tensors = []
        for key, value in (weights or {}).items():
            tensors.append(value if isinstance(value, TensorProto) else numpy_helper.from_array(value, key))
        infos = [[helper.make_tensor_value_info(key, *kind) for key, kind in edge.items()] for edge in (inputs, outputs)]
        graph = helper.make_graph(nodes, "small", *infos, tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        path = self.folder / name
        onnx.save_model(model, path, **settings)
        return path

    def linear(self, weight, name="linear.onnx", output="y", shape=("batch", "tokens", None), **settings) -> Path:
        """x → Relu(x W), the value ``hidden`` = x W in between. W ``[d, d_out]``."""
        nodes = [helper.make_node("MatMul", ["x", "w"], ["hidden"]), helper.make_node("Relu", ["hidden"], [output])]
        dims = [*shape[:-1], weight.shape[0]]
        return self.save(nodes, {"x": (TensorProto.FLOAT, dims)}, {output: (TensorProto.FLOAT, [*shape[:-1], weight.shape[1]])},
                         {"w": weight}, name, **settings)

    def identity(self, onnx_type, shape, name="identity.onnx", output="y", op="Identity") -> Path:
        """x → y = x."""
        return self.save([helper.make_node(op, ["x"], [output])], {"x": (onnx_type, shape)}, {output: (onnx_type, shape)},
                         name=name)


@pytest.fixture(autouse=True)
def _skip_without_cuda(request):
    if request.node.get_closest_marker("cuda") and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs an NVIDIA GPU and onnxruntime-gpu")


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def one_line():
    """Checks that an error is one line that says all of ``words``."""

    def check(error: BaseException, *words: str) -> None:
        text = str(error)
        assert "\n" not in text
        for word in words:
            assert word in text, text

    return check
