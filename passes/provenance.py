"""Where a rewritten model comes from, as it says itself in its ``metadata_props``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .. import __version__
from ..graph.hashes import InputHash
from .plan import Plan
from .split import Split


@dataclass(frozen=True)
class Provenance:
    """The entries of a model that ``plan`` made from the input with the hash ``fingerprint``.

    Attributes:
        synthetic: whether something in it was fitted to feeds that were made up.
    """

    fingerprint: InputHash
    plan: Plan = field(default_factory=lambda: Plan(()))
    synthetic: bool = False

    def then(self, plan: Plan, fitting: Split | None) -> Provenance:
        """That of the model that ``plan`` makes of this one, with feeds to fit to or None."""
        synthetic = bool(plan.needs_feeds) and fitting is not None and fitting.fit.synthetic
        return replace(self, plan=Plan((*self.plan, *plan)), synthetic=self.synthetic or synthetic)

    def __call__(self) -> dict[str, str]:
        """Version, plan, ``synthetic`` feeds, and the hash of the input, which may take a while to be known."""
        made_up = {"ffnfold.feeds": "synthetic"} if self.synthetic else {}
        return {"ffnfold.version": __version__, "ffnfold.plan": self.plan.to_yaml(), **made_up,
                **{f"ffnfold.{key}": value for key, value in self.fingerprint.entries().items()}}
