"""Which blocks a pass works on, by their index in ``inspect`` of the plan's input."""

from __future__ import annotations

from dataclasses import dataclass

from ..graph.errors import InputError


@dataclass(frozen=True)
class Blocks:
    """A choice of blocks: all, or a list written ``0+3-5``.

    Attributes:
        indices: the indices in ascending order, or None for all blocks.
    """

    indices: tuple[int, ...] | None = None

    @classmethod
    def parse(cls, text: object) -> Blocks:
        """Read ``all``, ``none``, ``3``, ``0+3-5`` or, from a plan file, a number or a list of these.

        Raises:
            InputError: it is none of them.
        """
        if text is None or text == "all":
            return cls()
        if text == "none":
            return cls(())
        if isinstance(text, (list, tuple)):
            parts = [part for item in text for part in cls.parse(item).indices or ()]
            return cls(tuple(sorted(set(parts))))
        found: set[int] = set()
        for part in str(text).split("+"):
            first, _, last = part.strip().partition("-")
            if not first.isdecimal() or (last and not last.isdecimal()) or part.strip().endswith("-") or len(part) > 20:
                raise InputError(f"'{text}' is no list of blocks: write it like 0+3-5, or all")
            if int(last or first) - int(first) > 100_000:
                raise InputError(f"'{text}' names more than 100,000 blocks: check the range")
            found.update(range(int(first), int(last or first) + 1))
            if int(last or first) < int(first):
                raise InputError(f"'{part}' in '{text}' runs backwards: write the smaller index first")
        return cls(tuple(sorted(found)))

    def __str__(self) -> str:
        if self.indices is None:
            return "all"
        if not self.indices:
            return "none"
        runs: list[list[int]] = []
        for index in self.indices:
            if runs and index == runs[-1][1] + 1:
                runs[-1][1] = index
            else:
                runs.append([index, index])
        return "+".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)

    def __contains__(self, index: int) -> bool:
        return self.indices is None or index in self.indices


ALL = Blocks()
