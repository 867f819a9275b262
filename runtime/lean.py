"""Sessions that take little memory: weights are read where they lie in the file, and what a run does not need is given back."""

from __future__ import annotations

from typing import Any

import onnx

_INTEGER_WEIGHTS = frozenset({"MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "ConvInteger",
                              "QLinearMatMul", "QLinearConv", "QGemm", "DequantizeLinear", "GatherBlockQuantized", "QMoE",
                              "QAttention", "DynamicQuantizeLSTM", "QuantizeLinear"})


_LARGEST_FOLDED = 1 << 24  # bytes of a value computed from constants when the model is opened


def make_lean(options: Any, model: bytes) -> None:
    """Set the session ``options`` so that no second copy of the weights of ``model`` is made.

    ONNX Runtime packs the weights of matrix products anew and computes what follows from constants alone (the transpose of
    a tied embedding), which doubles the memory of a model and makes it somewhat faster. Float weights are used as they are
    here, and freed activations go back to the system. Two things stay as ever. A model with integer weights: some of its
    kernels compute otherwise without packing, and its drift would be another one. Constants up to 16 MB: ONNX Runtime's
    other optimizations rely on their being folded, and fail on some models where they are not (a position table that is
    transposed and resized).
    """
    proto = onnx.ModelProto.FromString(model)
    graphs = [proto.graph]
    while graphs:
        for node in graphs.pop().node:
            if node.op_type in _INTEGER_WEIGHTS:
                return
            for attribute in node.attribute:
                graphs += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(_LARGEST_FOLDED))
