"""Speed-ups compared with those of an earlier run, for CI."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..graph.errors import InputError

Key = tuple[str, str]


@dataclass(frozen=True)
class Baseline:
    """The speed-ups of an earlier result.

    Attributes:
        path: its file.
        speedups: model and point of the grid → speed-up.
    """

    path: Path
    speedups: Mapping[Key, float]

    @classmethod
    def load(cls, path: Path) -> Baseline:
        """Read a result of ``ffnfold bench --json``.

        Raises:
            InputError: no such file, or something else.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, {_key(each): float(each["speedup"]) for each in found["ratios"]})
        except FileNotFoundError:
            raise InputError(f"{path}: no such file: give a result that 'ffnfold bench --json' printed") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: is no result of 'ffnfold bench --json' ({type(error).__name__})") from None

    def check(self, models: Sequence[str]) -> None:
        """Check ahead of a long run that there will be something to compare.

        Raises:
            InputError: there is one model only, or one that the baseline does not have.
        """
        if len(models) < 2:
            raise InputError("--baseline compares speed-ups: give two models, the one to be faster than first")
        for model in models[1:]:
            if all(model != each and Path(model).name != Path(each).name for each, _ in self.speedups):
                known = ", ".join(sorted({each for each, _ in self.speedups})) or "none"
                raise InputError(f"{self.path}: has no speed-up of '{model}', but of {known}: measure the baseline with it")

    def behind(self, ratios: Sequence[Mapping[str, Any]], percent: float) -> list[str]:
        """A sentence for each of ``ratios`` that is more than ``percent`` per cent behind, or has nothing to be compared with."""
        said = []
        for each in ratios:
            earlier = self._earlier(each)
            where = f"{each['model']}{f' at {_point(each)}' if _point(each) else ''}"
            if earlier is None:
                said.append(f"{where}: the baseline has no speed-up to compare with: measure it again with the same options")
            elif each["speedup"] < earlier * (1 - percent / 100):
                said.append(f"{where}: speed-up {each['speedup']:.3f}, was {earlier:.3f}: more than {percent:g} % behind")
        return said

    def _earlier(self, ratio: Mapping[str, Any]) -> float | None:
        """By the path of the model, or by its file name where that is one model's alone."""
        model, point = _key(ratio)
        if (model, point) in self.speedups:
            return self.speedups[model, point]
        same = {value for (other, where), value in self.speedups.items()
                if where == point and Path(other).name == Path(model).name}
        return same.pop() if len(same) == 1 else None


def _key(ratio: Mapping[str, Any]) -> Key:
    return str(ratio["model"]), _point(ratio)


def _point(ratio: Mapping[str, Any]) -> str:
    shapes = [f"{name} {'x'.join(map(str, shape))}" for name, shape in ratio.get("shape", {}).items()]
    threads = ratio.get("threads")
    return ", ".join([*shapes, *([f"{threads} threads"] if threads else [])])
