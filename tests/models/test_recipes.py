"""Recipes of the sample models: pinned, checked by SHA-256, whole or not there, and with inputs that are disjoint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feed_files import write_feeds
from ffn_graphs import transformer
from ffnfold import models
from ffnfold.graph.errors import InputError
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.models import gemma3, minilm, text, vit_s
from ffnfold.models.download import Wheel, file_sha256
from ffnfold.models.pictures import PICTURES
from ffnfold.models.recipe import Recipe, require
from ffnfold.runtime import compare, load_feeds
from ffnfold.runtime.specs import input_specs

PARTS = ("fit", "choose", "report")
every_recipe = pytest.mark.parametrize("recipe", models.RECIPES.values(), ids=lambda recipe: recipe.name)


def wheels() -> Iterator[Wheel]:
    """Every wheel that a recipe downloads."""
    for module in (vit_s, minilm, gemma3, text):
        for value in vars(module).values():
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, Wheel):
                    yield each
    yield from (pictures.wheel for pictures in PICTURES)


@every_recipe
def test_what_a_recipe_is_made_from_is_pinned(recipe):
    listed = json.dumps(recipe.sources())
    assert re.findall(r"[\w.-]+==[\w.]+", listed)
    digests = re.findall(r'"sha256": "(\w+)"', listed)
    assert digests
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)


def test_every_wheel_is_pinned():
    found = list(wheels())
    assert len(found) >= len(models.RECIPES)
    for wheel in found:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", wheel.requirement)
        assert re.fullmatch("[0-9a-f]{64}", wheel.sha256)
    assert len({wheel.sha256 for wheel in found}) == len(found)


def pictures(part: str) -> list[tuple[str, str]]:
    """Of each picture of a part, the name of its feeds and the SHA-256 of the file."""
    return [(name, file["sha256"]) for package in vit_s.sources()["pictures"] for name, file in package.get(part, {}).items()]


def test_no_picture_is_there_twice():
    names, digests = zip(*(picture for part in PARTS for picture in pictures(part)), strict=True)
    assert len(set(names)) == len(set(digests)) == len(names)


def test_there_are_enough_pictures_to_choose_by():
    """Plans that kept their limit on three pictures missed it on others."""
    assert [len(pictures(part)) for part in PARTS] == [25, 12, 5]


def test_every_package_of_pictures_has_a_licence():
    assert all(package["licence"] for package in vit_s.sources()["pictures"])


def test_no_article_is_in_two_parts():
    ranges = text.sources()["text"]["articles"]
    assert set(ranges) == set(PARTS)
    numbers = [number for part in PARTS for number in range(*ranges[part])]
    assert len(numbers) == len(set(numbers)) == 300


@pytest.mark.parametrize(("height", "width", "rows", "columns"), [
    (448, 448, (0, 224), (0, 224)), (100, 200, (56, 168), (0, 224)), (300, 100, (0, 224), (74, 149))])
def test_an_image_is_scaled_and_padded_with_black(height, width, rows, columns):
    pytest.importorskip("PIL")
    prepared = vit_s.prepare(np.full((height, width, 3), 255, np.uint8))
    assert (prepared.shape, prepared.dtype) == ((1, 3, 224, 224), np.float32)
    white = prepared[0, 0] > 0
    assert white[rows[0]:rows[1], columns[0]:columns[1]].all()
    assert white.sum() == (rows[1] - rows[0]) * (columns[1] - columns[0])
    np.testing.assert_allclose(prepared[0, :, 112, 112], (1 - vit_s._MEAN) / vit_s._DEVIATION, rtol=1e-5)


def made_by(make, version: int = 1) -> Recipe:
    return Recipe("small", "a small one", "MIT", version, False, make, lambda: {"model": {"sha256": "0" * 64}})


def make_small(folder: Path, progress: Any) -> None:
    transformer(1).save(folder / "model.onnx")
    for part in PARTS:
        write_feeds(folder / "feeds" / part, 2)


@pytest.fixture
def small(monkeypatch):
    """Puts a recipe in the place of all others; returns how often it was made."""
    calls: list[int] = []

    def use(make=make_small, version: int = 1) -> list[int]:
        def counted(folder: Path, progress: Any) -> None:
            calls.append(1)
            make(folder, progress)

        monkeypatch.setattr(models, "RECIPES", {"small": made_by(counted, version)})
        return calls

    return use


def test_a_model_comes_with_its_feeds_and_its_receipt(small, tmp_path):
    small()
    path = models.get("small", tmp_path / "deep" / "small")
    assert path == tmp_path / "deep" / "small" / "model.onnx"
    assert sorted(item.name for item in path.parent.iterdir()) == ["feeds", "model.onnx", "recipe.json"]
    assert json.loads((path.parent / "recipe.json").read_text()) == {
        "name": "small", "licence": "MIT", "version": 1, "model": {"sha256": "0" * 64}}
    assert [len(load_feeds(path.parent / "feeds" / part, input_specs(Model.load(path)))) for part in PARTS] == [2, 2, 2]


def test_what_is_there_whole_is_left(small, tmp_path):
    calls = small()
    for _ in range(2):
        models.get("small", tmp_path / "small")
    assert len(calls) == 1


@pytest.mark.parametrize("spoil", ["model.onnx", "recipe.json"])
def test_what_is_there_in_part_is_made_again(small, tmp_path, spoil):
    calls = small()
    models.get("small", tmp_path / "small")
    (tmp_path / "small" / spoil).unlink()
    models.get("small", tmp_path / "small")
    assert len(calls) == 2
    assert (tmp_path / "small" / spoil).exists()


def test_a_recipe_that_changed_is_made_again_without_its_old_feeds(small, tmp_path):
    calls = small()
    models.get("small", tmp_path / "small")
    write_feeds(tmp_path / "small" / "feeds" / "fit", 7)
    small(version=2)
    models.get("small", tmp_path / "small")
    assert len(calls) == 2
    assert len(list((tmp_path / "small" / "feeds" / "fit").iterdir())) == 2


@pytest.mark.parametrize("error", [InputError("no network"), KeyboardInterrupt()])
def test_a_recipe_that_fails_leaves_nothing(small, tmp_path, error):
    def fail(folder: Path, progress: Any) -> None:
        make_small(folder, progress)
        raise error

    small(fail)
    with pytest.raises(type(error)):
        models.get("small", tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_fails_leaves_what_was_there(small, tmp_path):
    def fail(folder: Path, progress: Any) -> None:
        raise InputError("no network")

    small()
    models.get("small", tmp_path / "small")
    before = file_sha256(tmp_path / "small" / "model.onnx")
    small(fail, version=2)
    with pytest.raises(InputError):
        models.get("small", tmp_path / "small")
    assert file_sha256(tmp_path / "small" / "model.onnx") == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_package_that_is_missing_is_named():
    require("minilm", ("json",))
    with pytest.raises(InputError, match=r"no_such_package is not installed: pip install 'ffnfold\[export\]'"):
        require("minilm", ("json", "no_such_package"))


def check_made(recipe: Recipe, path: Path, blocks: tuple[int, int, int, str, bool]) -> None:
    """What a recipe made fits together: the blocks, the feeds, and that no feed is in two parts."""
    model = Model.load(path)
    found = find_ffn_blocks(model)
    assert {(block.d_model, block.d_ff, block.activation.name, block.gated) for block in found} == {blocks[1:]}
    assert len(found) == blocks[0]
    specs = input_specs(model)
    digests: dict[str, set[str]] = {}
    for part in PARTS:
        feeds = load_feeds(path.parent / "feeds" / part, specs)
        digests[part] = {hashlib.sha256(b"".join(np.ascontiguousarray(feed[spec.name]).tobytes() for spec in specs)).hexdigest()
                         for feed in feeds}
    assert all(digests.values())
    assert not digests["report"] & (digests["fit"] | digests["choose"])
    assert not digests["choose"] & digests["fit"]
    receipt = json.loads((path.parent / "recipe.json").read_text())
    assert receipt["name"] == recipe.name
    report = load_feeds(path.parent / "feeds" / "report", specs)[:1]
    assert compare(path, path, report).outputs


@pytest.mark.network
def test_no_article_of_the_report_stands_elsewhere(tmp_path):
    """The corpus prints some stories twice: those it reports on must begin like none of the others."""
    parts = text.articles(lambda message: None)
    assert [len(parts[part]) for part in ("report", "choose", "fit")] == [30, 30, 240]
    beginnings = {part: {article[:100] for article in parts[part]} for part in PARTS}
    assert not beginnings["report"] & (beginnings["choose"] | beginnings["fit"])


@pytest.mark.network
@pytest.mark.slow
def test_vit_s(tmp_path):
    path = models.get("vit-s", tmp_path / "vit-s")
    assert file_sha256(path) == vit_s.sources()["model"]["sha256"]
    check_made(models.RECIPES["vit-s"], path, (12, 384, 1536, "gelu", False))


@pytest.mark.network
@pytest.mark.export
@pytest.mark.slow
@pytest.mark.parametrize("name", ["minilm", "minilm-dynamo"])
def test_minilm(tmp_path, name):
    pytest.importorskip("torch")
    path = models.get(name, tmp_path / name)
    check_made(models.RECIPES[name], path, (6, 384, 1536, "gelu", False))
    feed = load_feeds(path.parent / "feeds" / "report", input_specs(Model.load(path)))[0]
    from ffnfold.runtime import open_session

    outputs = open_session(path).run(feed)
    assert list(outputs) == ["token_embeddings", "sentence_embedding"]
    mask = feed["attention_mask"][..., None]
    mean = (outputs["token_embeddings"] * mask).sum(axis=1) / mask.sum(axis=1)
    np.testing.assert_allclose(outputs["sentence_embedding"], mean, atol=1e-5)


@pytest.mark.network
@pytest.mark.export
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_gemma(tmp_path):
    pytest.importorskip("torch")
    path = models.get("gemma3-270m", tmp_path / "gemma3-270m")
    check_made(models.RECIPES["gemma3-270m"], path, (18, 640, 2048, "gelu_tanh", True))
