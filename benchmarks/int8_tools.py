"""Other quantization tools, each in a virtual environment of its own; run by ``int8_peers.py``, and by itself inside of those.

    VENV/bin/python benchmarks/int8_tools.py KEY MODEL OUT FEEDS COUNT

FEEDS is a folder of .npz files, of which the first COUNT calibrate. Each tool is called as its own documentation does it for a
transformer in ONNX format.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

TOOLS = {"olive": "Olive OnnxDynamicQuantization", "optimum": "Optimum ORTQuantizer, dynamic, avx512_vnni, per channel",
         "nncf": "NNCF quantize, static, model_type=TRANSFORMER", "nncf-weights": "NNCF compress_weights, INT8_SYM",
         "neural-compressor": "onnx-neural-compressor DynamicQuantConfig"}
PACKAGES = {"olive": ["olive-ai", "requests"], "optimum": ["optimum-onnx"], "nncf": ["nncf"], "nncf-weights": ["nncf"],
            "neural-compressor": ["onnx-neural-compressor"]}
SECONDS = 1500


def run_tool(key: str, folder: Path, model: Path, target: Path, feeds: Path, count: int) -> str:
    """Let the tool write ``target``; it is installed on first use, over the packages that are here.

    Returns:
        The tool's package with its version.

    Raises:
        RuntimeError: it does not install, or fails: its last line.
    """
    package = PACKAGES[key][0]
    place = folder / package
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
        inner = next((place / "lib").glob("python*")) / "site-packages"
        here = [path for path in sys.path if path.endswith("site-packages")]
        (inner / "over.pth").write_text("\n".join(here) + "\n", encoding="utf-8")
    constraint = folder / "constraints.txt"
    listed = subprocess.run([sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    held = [line for line in listed.splitlines() if line.partition("==")[0] == "torch"]  # what needs another does not install
    constraint.write_text("\n".join(held) + "\n", encoding="utf-8")
    call([str(python), "-m", "pip", "install", "-q", "-c", str(constraint), *PACKAGES[key]])
    call([str(python), __file__, key, str(model), str(target), str(feeds), str(count)])
    shown = subprocess.run([str(python), "-m", "pip", "show", package], capture_output=True, text=True, check=True).stdout
    version = next(line for line in shown.splitlines() if line.startswith("Version"))
    return f"{package} {version.partition(': ')[2]}"


def call(command: list[str]) -> None:
    """Run ``command``; its last line is the error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise RuntimeError(next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no word"))


def olive(model: str, target: Path, feeds: list[Path]) -> None:
    """``quantize_dynamic`` through Olive's workflow."""
    from olive.workflows import run

    with tempfile.TemporaryDirectory() as folder:
        run({"input_model": {"type": "ONNXModel", "model_path": model},
             "systems": {"here": {"type": "LocalSystem", "accelerators": [{"device": "cpu", "execution_providers":
                                                                           ["CPUExecutionProvider"]}]}},
             "passes": {"quantize": {"type": "OnnxDynamicQuantization", "precision": "int8", "per_channel": True}},
             "host": "here", "target": "here", "output_dir": folder, "cache_dir": f"{folder}/cache"})
        take(next(Path(folder).rglob("model.onnx"), None) or next(Path(folder).glob("**/*.onnx")), target)


def optimum(model: str, target: Path, feeds: list[Path]) -> None:
    """``quantize_dynamic`` through Optimum."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    with tempfile.TemporaryDirectory() as folder:
        quantizer = ORTQuantizer(Path(model))
        quantizer.quantize(AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True), folder)
        take(next(Path(folder).glob("*.onnx")), target)


def nncf(model: str, target: Path, feeds: list[Path]) -> None:
    """Static int8, QuantizeLinear and DequantizeLinear, calibrated on the feeds."""
    import nncf
    import onnx

    data = nncf.Dataset([loaded(feed) for feed in feeds])
    onnx.save_model(nncf.quantize(onnx.load(model), data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds)), target)


def nncf_weights(model: str, target: Path, feeds: list[Path]) -> None:
    """int8 weights behind DequantizeLinear."""
    import nncf
    import onnx

    onnx.save_model(nncf.compress_weights(onnx.load(model), mode=nncf.CompressWeightsMode.INT8_SYM), target)


def neural_compressor(model: str, target: Path, feeds: list[Path]) -> None:
    """Dynamic int8."""
    from onnx_neural_compressor.quantization import config, quantize

    quantize(model, str(target), config.DynamicQuantConfig())


def loaded(feed: Path) -> dict[str, Any]:
    """Input name → array."""
    import numpy as np

    with np.load(feed) as arrays:
        return dict(arrays)


def take(written: Path, target: Path) -> None:
    """Move a model and its external data, if any, to ``target``."""
    shutil.move(written, target)
    for data in written.parent.glob("*.data"):
        shutil.move(data, target.parent / data.name)


if __name__ == "__main__":
    made = {"olive": olive, "optimum": optimum, "nncf": nncf, "nncf-weights": nncf_weights,
            "neural-compressor": neural_compressor}
    _, which, source, out, folder, number = sys.argv
    made[which](source, Path(out), sorted(Path(folder).glob("*.npz"))[:int(number)])
