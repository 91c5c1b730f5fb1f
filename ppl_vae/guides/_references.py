"""Attributes of a program that are no part of it."""

from typing import Any, ClassVar

from ppl_vae.program import Program


class Referring(Program):
    """A program with attributes that it does not register, even if they are modules.

    ``parameters()``, ``state_dict()``, ``train()`` and ``to()`` leave them alone. ``copy.deepcopy`` copies
    them as any attribute: what is copied together, as a model and its guide, stays together.

    Attributes:
        references: their names, which a subclass sets.
    """

    references: ClassVar[tuple[str, ...]] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.references:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)
