"""Plans: which passes in which order with which options."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..graph.errors import InputError
from .base import Pass
from .options import describe, given_options
from .registry import PASSES, make_pass


@dataclass(frozen=True)
class Plan:
    """An ordered list of passes.

    A plan file is YAML: a list whose entries are the name of a pass, or a mapping of one name to its options::

        - fold-bias
        - quantize-ffn:
            form: dynamic
            blocks: 0+3-5
    """

    passes: tuple[Pass, ...]

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    @property
    def needs_feeds(self) -> list[str]:
        """Names of the passes that cannot run without feeds."""
        return [each.name for each in self.passes if each.needs_feeds]

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Plan:
        """A plan from ``NAME`` and ``NAME:KEY=VALUE,...`` texts.

        Raises:
            InputError: an unknown pass or option, or a text of another form.
        """
        return cls(tuple(_parse(text) for text in texts))

    @classmethod
    def load(cls, path: Path) -> Plan:
        """A plan from a YAML file.

        Raises:
            InputError: no such file, not YAML of the form above, or an unknown pass or option.
        """
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except FileNotFoundError:
            raise InputError(f"{path}: no such plan file: check the path") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read ({error}): give a YAML file") from None
        except (yaml.YAMLError, RecursionError) as error:
            raise InputError(f"{path}: not YAML ({' '.join(str(error).split())[:200]}): see docs/plans.md") from None
        return cls.from_entries(content, str(path))

    @classmethod
    def from_entries(cls, content: object, where: str = "plan") -> Plan:
        """A plan from what a YAML file holds."""
        if isinstance(content, dict) and set(content) == {"passes"}:
            content = content["passes"]
        if not isinstance(content, list):
            raise InputError(f"{where}: a plan is a list of passes: begin each with '- ', see docs/plans.md")
        return cls(tuple(_entry(item, where) for item in content))

    def entries(self) -> list[object]:
        """The plan as a YAML file holds it, options at their defaults left out."""
        found: list[object] = []
        for each in self.passes:
            options = given_options(each)
            found.append({each.name: options} if options else each.name)
        return found

    def to_yaml(self) -> str:
        """The text of a plan file."""
        return yaml.safe_dump(self.entries(), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """One that takes no key twice in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"'{twice}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


EXACT_PLAN = ("clean-up", "dedupe-weights", "canonicalize-ffn", "drop-neurons", "fold-norm", "fold-bias", "fuse-matmul",
              "separate-resize", "merge-linears")
"""The exact passes, as texts for :meth:`Plan.parse`, in this order:

* ``clean-up`` first, so that the others see through Identity; ``dedupe-weights`` next, so that they know what is shared;
* ``canonicalize-ffn`` before what folds, which then meets fewer forms, and no Reshape between a norm and a linear;
* then what folds; ``separate-resize``, which has to do with none of them;
* ``merge-linears`` last, which goes by what the others left (and does nothing unless it is forced).
"""


def default_plan(target: str) -> Plan:
    """What ``optimize`` runs when it is told nothing: the exact passes, then int8. Needs no feeds.

    Without ``fold-norm``: where a few features of the residual stream are a hundred times the others, γ evens them out, and
    what is rounded should be behind it.
    """
    exact = [each for each in EXACT_PLAN if each != "fold-norm"]
    return Plan.parse([*exact, "quantize-ffn:form=weight-only" if target == "cuda" else "quantize-ffn"])


def _parse(text: str) -> Pass:
    name, colon, rest = text.partition(":")
    given: dict[str, object] = {}
    for part in rest.split(",") if colon else []:
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise InputError(f"'{text}': write a pass as NAME or NAME:KEY=VALUE,KEY=VALUE")
        if key.strip() in given:
            raise InputError(f"'{text}': the option '{key.strip()}' is given twice")
        given[key.strip()] = value.strip()
    return make_pass(name.strip(), given)


def _entry(item: object, where: str) -> Pass:
    if isinstance(item, str):
        return _parse(item)
    if isinstance(item, dict) and len(item) == 1:
        name, given = next(iter(item.items()))
        given = {} if given is None else given
        if isinstance(given, dict):
            _check_values(str(name), given, where)
            return make_pass(str(name), {str(key): value for key, value in given.items()})
    raise InputError(f"{where}: '{str(item)[:80]}' is no pass: write its name, or its name and a mapping of options")


def _check_values(name: str, given: Mapping[Any, object], where: str) -> None:
    """Nothing is a value only of options that may be nothing."""
    types = {str(option["name"]): str(option["type"]) for option in describe(PASSES[name])} if name in PASSES else {}
    for key, value in given.items():
        if value is None and not types.get(str(key), "nothing").endswith("nothing"):
            raise InputError(f"{where}: option '{key}' of '{name}' has no value: give it one, or leave it out")
