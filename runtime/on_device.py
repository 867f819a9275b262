"""Runs whose inputs and outputs stay where they are computed, so that one session can feed another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .feeds import name_of
from .onnx_runtime import complaints
from .ort_values import device_value
from .sessions import Session


class OnDevice:
    """A session that takes arrays and ``OrtValue``s and gives ``OrtValue``s, on its own device where they are large.

    Args:
        session: opened for ``cpu`` or ``cuda``.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._kinds = {spec.name: spec.element_type for spec in session.inputs}
        self._held: dict[str, Any] = {}

    def hold(self, inputs: Mapping[str, Any]) -> None:
        """Take these inputs along in every run from now on, in the place of those held under the same names."""
        self._held |= {name: self.value(name, array) for name, array in inputs.items()}

    def __call__(self, feed: Mapping[str, Any], names: Sequence[str], *, of: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Run once; what of ``feed`` the session does not take is left out.

        Args:
            names: the outputs wanted.
            of: the feed that ``feed`` was made from, for messages.

        Raises:
            InputError: ONNX Runtime fails.
        """
        binding = self._session.raw.io_binding()
        with complaints(self._session.name, "run", name_of(feed if of is None else of)):
            given = self._held | {name: self.value(name, array) for name, array in feed.items() if name in self._kinds}
            for name, value in given.items():  # alive until the run is over
                binding.bind_ortvalue_input(name, value)
            for name in names:
                binding.bind_output(name, self._session.device_of(name))
            self._session.raw.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return dict(zip(names, binding.get_outputs(), strict=True))

    def value(self, name: str, array: Any) -> Any:
        """``array`` where the input ``name`` is wanted; it must not change while that is in use. An ``OrtValue`` stays."""
        return device_value(array, self._kinds[name], self._session.device_of(name)) if hasattr(array, "ndim") else array
