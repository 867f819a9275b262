"""The models of the plans on the front, kept as they are built, so that no plan is made twice."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..graph.errors import InputError
from ..graph.leftovers import scratch_folder
from ..graph.model import Model
from ..passes.plan import Plan
from ..passes.provenance import Provenance


class FrontModels:
    """A folder with ``plan-HASH.onnx`` for each plan of the front, the bytes that ``optimize --plan`` would write.

    What is built lies in a hidden folder in it until it is known which plans are on the front; a model that is there from
    an earlier search of the same model, feeds, machine and options is not built again. What a killed search left is removed.

    Args:
        folder: made where it is missing.
        identity: what a search is known by, beside the plan.
        source: the input, for the models' metadata.
        external: as in :meth:`~ffnfold.graph.model.Model.save`.

    Raises:
        InputError: the folder cannot be made or written into.
    """

    def __init__(self, folder: Path, identity: str, source: Provenance, external: bool | None) -> None:
        self.folder, self._identity, self._source, self._external = folder, identity, source, external
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._scratch, self._claim = scratch_folder(folder, ".search-")
        except OSError as error:
            raise InputError(f"{folder}: models cannot be kept there ({error.strerror}): give another folder") from None

    def path_of(self, plan: Plan) -> Path:
        """Where the model of ``plan`` comes to lie."""
        digest = hashlib.sha256(repr((self._identity, plan.to_yaml())).encode()).hexdigest()
        return self.folder / f"plan-{digest[:12]}.onnx"

    def put(self, plan: Plan, model: Model, fired: bool) -> None:
        """Keep a model that was built, for now. ``fired``: whether the plan did something."""
        place = self._scratch / self.path_of(plan).stem
        place.mkdir(exist_ok=True)
        if fired:
            model.metadata = self._source.then(plan, None)
        model.save(place / self.path_of(plan).name, external=self._external)

    def settle(self, plan: Plan, build: Callable[[], object]) -> Path:
        """The model of a plan of the front in its place; ``build`` is called where it was not built, and puts it."""
        path = self.path_of(plan)
        place = self._scratch / path.stem
        if not place.exists() and not path.exists():
            build()
        if place.exists():
            for file in sorted(place.iterdir(), key=lambda each: each.suffix == ".onnx"):  # the weights before what names them
                os.replace(file, self.folder / file.name)
        return path

    def close(self) -> None:
        """Remove what was built and is not on the front."""
        self._claim.close()
        shutil.rmtree(self._scratch, ignore_errors=True)
