"""ffnfold: rewrite the feed-forward blocks of an exported ONNX transformer and prove what it cost and gained.

    import ffnfold
    model = ffnfold.load("model.onnx")
    for block in ffnfold.find_ffn_blocks(model):
        print(block.index, block.name, block.d_model, block.d_ff, block.activation.name)
    ffnfold.optimize(model, ["fold-bias", "quantize-ffn:blocks=0+3-5"])
    model.save("optimized.onnx")
    print(ffnfold.verify("model.onnx", "optimized.onnx", "feeds/").to_json())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["FFNBlock", "Feeds", "InputError", "Model", "Plan", "find_ffn_blocks", "load", "load_feeds", "optimize", "verify"]

if TYPE_CHECKING:
    from .api import load, optimize, verify
    from .graph.block import FFNBlock
    from .graph.errors import InputError
    from .graph.ffn import find_ffn_blocks
    from .graph.model import Model
    from .passes.plan import Plan
    from .runtime import Feeds, load_feeds

_HOMES = {"load": "api", "optimize": "api", "verify": "api", "InputError": "graph.errors", "FFNBlock": "graph.block",
          "find_ffn_blocks": "graph.ffn", "Model": "graph.model", "Plan": "passes.plan", "Feeds": "runtime",
          "load_feeds": "runtime"}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: ONNX Runtime is not needed to look at a graph."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ffnfold' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
