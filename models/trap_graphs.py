"""Small exported graphs for the tests of detection, one a trap: random weights, PyTorch's two exporters.

    python -m ffnfold.models.trap_graphs FOLDER          needs the extra ``export``

Each trap is written as ``NAME__ts.onnx`` and ``NAME__dyn.onnx``; ``tests/graph/test_traps.py`` knows what is in each.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .recipe import require

_D, _FF, _TOKENS = 16, 48, 6


def traps() -> dict[str, Any]:
    """Name → module over ``x [2, 6, 16]``."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Mlp(nn.Module):  # type: ignore[misc]
        def __init__(self, act: Any, bias: bool = True) -> None:
            super().__init__()
            self.up, self.down, self.act = nn.Linear(_D, _FF, bias), nn.Linear(_FF, _D, bias), act

        def forward(self, x: Any) -> Any:
            return self.down(self.act(self.up(x)))

    class FusedGateUp(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.both, self.down = nn.Linear(_D, 2 * _FF, False), nn.Linear(_FF, _D, False)

        def forward(self, x: Any) -> Any:
            gate, up = self.both(x).chunk(2, -1)
            return self.down(functional.silu(gate) * up)

    class Residual(nn.Module):  # type: ignore[misc]
        """``x + f(norm x)``, or ``norm(x + f(x))``."""

        def __init__(self, inner: Any, post: bool = False) -> None:
            super().__init__()
            self.inner, self.norm, self.post = inner, nn.LayerNorm(_D), post

        def forward(self, x: Any) -> Any:
            return self.norm(x + self.inner(x)) if self.post else x + self.inner(self.norm(x))

    class LmHead(nn.Module):  # type: ignore[misc]
        """BERT's transform in front of the vocabulary: looks like an FFN, joins nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.dense, self.norm, self.out = nn.Linear(_D, _D), nn.LayerNorm(_D), nn.Linear(_D, 50)

        def forward(self, x: Any) -> Any:
            return self.out(self.norm(functional.gelu(self.dense(x))))

    class Pooler(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.out = nn.Linear(_D, _D), nn.Linear(_D, 3)

        def forward(self, x: Any) -> Any:
            return self.out(torch.tanh(self.dense(x[:, 0])))

    class GatedAttention(nn.Module):  # type: ignore[misc]
        """Heads multiplied by a sigmoid of a linear: a gate, but tokens are mixed on the other side."""

        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.gate, self.out = (nn.Linear(_D, _D) for _ in range(5))

        def forward(self, x: Any) -> Any:
            weights = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2) / 4, -1)
            return self.out(torch.sigmoid(self.gate(x)) * (weights @ self.value(x)))

    class SqueezeExcite(nn.Module):  # type: ignore[misc]
        """Two linears with an activation between, of the mean of all tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.reduce, self.expand = nn.Linear(_D, 4), nn.Linear(4, _D)

        def forward(self, x: Any) -> Any:
            return x * torch.sigmoid(self.expand(torch.relu(self.reduce(x.mean(1, keepdim=True)))))

    return {
        "pre_norm_gelu": nn.Sequential(Residual(Mlp(nn.GELU())), Residual(Mlp(nn.GELU()))),
        "post_norm_relu": nn.Sequential(Residual(Mlp(nn.ReLU()), post=True), Residual(Mlp(nn.ReLU()), post=True)),
        "tanh_gelu_no_bias": Residual(Mlp(nn.GELU(approximate="tanh"), bias=False)),
        "fused_gate_up": Residual(FusedGateUp()),
        "lm_head": nn.Sequential(Residual(Mlp(nn.GELU())), LmHead()),
        "pooler": nn.Sequential(Residual(Mlp(nn.GELU())), Pooler()),
        "gated_attention": nn.Sequential(Residual(GatedAttention()), Residual(Mlp(nn.SiLU()))),
        "squeeze_excite": nn.Sequential(Residual(Mlp(nn.GELU())), SqueezeExcite()),
    }


def main(folder: Path) -> None:
    """Export every trap both ways."""
    require("trap graphs", ("torch", "onnxscript"))
    import torch

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    x = torch.randn(2, _TOKENS, _D)
    for name, module in traps().items():
        module.eval()
        torch.onnx.export(module, (x,), str(folder / f"{name}__ts.onnx"), input_names=["x"], output_names=["y"], dynamo=False,
                          opset_version=14, dynamic_axes={"x": {0: "batch", 1: "tokens"}})
        torch.onnx.export(module, (x,), str(folder / f"{name}__dyn.onnx"), input_names=["x"], output_names=["y"], dynamo=True,
                          external_data=False, verbose=False,
                          dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
