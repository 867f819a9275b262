"""Recipes that fetch or build the sample models; weights never go into git.

Each model comes with its inputs for fitting, choosing and reporting, disjoint, from real images or real English text.
Importing this needs neither torch nor a network.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..graph.errors import InputError
from ..graph.places import check_folder
from . import gemma3, minilm, vit_s
from .recipe import Recipe

__all__ = ["RECIPES", "Recipe", "get"]

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in
                              (vit_s.VIT_S, minilm.MINILM, minilm.MINILM_DYNAMO, gemma3.GEMMA3)}


def get(name: str, directory: Path, progress: Callable[[str], None] = lambda message: None) -> Path:
    """Make the model called ``name`` in ``directory``.

    Writes ``model.onnx``, ``feeds/{fit,choose,report}/*.npz`` and ``recipe.json`` (the sources with their SHA-256 and
    which part of them is for what). What is there already, whole, is left as it is.

    Returns:
        The path of ``model.onnx``.

    Raises:
        InputError: no such recipe, no network, a download with another SHA-256, or the extra ``export`` is not installed.
    """
    if name not in RECIPES:
        raise InputError(f"there is no model '{name}': there are {', '.join(RECIPES)}")
    check_folder(directory, "the model")
    recipe = RECIPES[name]
    described = json.loads(json.dumps({"name": recipe.name, "licence": recipe.licence, "version": recipe.version,
                                       **recipe.sources()}))
    target = directory / "model.onnx"
    receipt = directory / "recipe.json"
    if target.exists() and receipt.exists() and _read(receipt) == described:
        return target
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    try:
        (partial / "feeds").mkdir(parents=True)
        for part in ("fit", "choose", "report"):
            (partial / "feeds" / part).mkdir()
        recipe.make(partial, progress)
        receipt_text = json.dumps(described, indent=2) + "\n"
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(directory / "feeds", ignore_errors=True)
        for item in sorted(partial.iterdir(), key=lambda path: path.name == "model.onnx"):  # the model itself last
            os.replace(item, directory / item.name)
        receipt.write_text(receipt_text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error.strerror or error}): choose another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
