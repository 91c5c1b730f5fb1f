"""The base of the library's models and guides."""

import itertools
from typing import Any, ClassVar

import torch
from pyro.nn import PyroModule
from torch import nn

_numbers = itertools.count()


class Program(PyroModule):
    """A Pyro model or guide that shares no parameter with any other in Pyro's global store.

    Pyro keys its parameter store by name, so two modules with equal names silently share one
    parameter and the second never trains. Each program therefore has a name of its own in the
    store (``VAE_0``, ``VAE_1``, ...), copies and unpickled ones too. Names in ``state_dict`` do
    not change. Pyro's own ``pyro.infer.SVI`` trains programs as it is.
    """

    def __init__(self) -> None:
        super().__init__(self._new_name())

    def _new_name(self) -> str:
        return f"{type(self).__name__}_{next(_numbers)}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        old, new = self._pyro_name, self._new_name()
        for module in self.modules():
            if isinstance(module, PyroModule):
                module._pyro_name = new + module._pyro_name.removeprefix(old)


class Referring(nn.Module):
    """A module with attributes that it does not register, even if they are modules; a program puts it first.

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


def batch_size(x: torch.Tensor | None, size: int | None) -> int:
    """Return the number of data: ``len(x)``, or ``size`` when there is no ``x``."""
    if x is not None:
        return x.shape[0]
    if size is None:
        raise ValueError("size: expected the number of data to draw when x is None, got None")
    return size


def check_event(x: torch.Tensor | None, x_given_z: Any) -> None:
    """Raise if data ``[n, *event]`` have another event shape than the likelihood."""
    if x is not None and x.shape[1:] != x_given_z.event_shape:
        raise ValueError(
            f"x: expected data of the likelihood's event shape {tuple(x_given_z.event_shape)}, "
            f"got {tuple(x.shape[1:])}"
        )
