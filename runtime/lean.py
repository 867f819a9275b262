"""Sessions that take little memory: weights are read where they lie in the file, and what a run does not need is given back."""

from __future__ import annotations

from typing import Any

import onnx

_INTEGER_WEIGHTS = frozenset({"MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "ConvInteger",
                              "QLinearMatMul", "QLinearConv", "QGemm", "DequantizeLinear", "GatherBlockQuantized", "QMoE",
                              "QAttention", "DynamicQuantizeLSTM", "QuantizeLinear"})


def make_lean(options: Any, model: bytes) -> list[str]:
    """Set the session ``options`` so that no second copy of the weights of ``model`` is made.

    ONNX Runtime packs the weights of matrix products anew and computes what follows from constants alone (the transpose of
    a tied embedding), which doubles the memory of a model and makes it somewhat faster. Float weights are used as they are
    here, and freed activations go back to the system. A model with integer weights is left as ever: some of its kernels
    compute otherwise without packing, and its drift would be another one.

    Returns:
        The names of the optimizers to switch off.
    """
    proto = onnx.ModelProto.FromString(model)
    graphs = [proto.graph]
    while graphs:
        for node in graphs.pop().node:
            if node.op_type in _INTEGER_WEIGHTS:
                return []
            for attribute in node.attribute:
                graphs += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    return ["ConstantFolding"]
