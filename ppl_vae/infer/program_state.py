"""The state of programs: what a traced step depends on, and what a trial run must leave alone."""

import contextlib
import itertools
import operator
from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, type(None))
_RESULTS = {"terms", "analytic", "parts", "max_plate_nesting"}  # of an estimator, not settings


class ProgramState:
    """The modules of a pair and the objects beside them, as they are at one moment.

    Args:
        owners: the modules, and the estimator.
    """

    def __init__(self, owners: list[Any]) -> None:
        self.owners = owners
        self.dicts: list[dict[Any, Any]] = []
        self.holders: list[Any] = []  # of each of the dictionaries
        for owner in owners:
            held: list[Any] = [vars(owner)]
            if isinstance(owner, nn.Module):
                held += [owner._parameters, owner._buffers, owner._modules]
                held += [owner._forward_hooks, owner._forward_pre_hooks]
            self.dicts += held
            self.holders += [owner] * len(held)
        self.before = [dict(held) for held in self.dicts]
        self.values = list(self._values())
        self.tensors = [value for value in self.values if isinstance(value, Tensor)]
        self.marks = self._marks()

    def holds(self) -> bool:
        """Return whether nothing was replaced since; False is no proof that something was."""
        return (
            sum(map(len, self.dicts)) == len(self.values)
            and all(map(operator.is_, self._values(), self.values))
            and self.marks == self._marks()
        )

    def _values(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(map(dict.values, self.dicts))

    def _marks(self) -> list[Any]:
        """Return what changes where a tensor gets other memory, as by ``model.double()``, or is frozen."""
        return [
            *[t.data_ptr() for t in self.tensors],
            *[t.requires_grad for t in self.tensors],
            *[t._backward_hooks for t in self.tensors],
        ]

    def key(self, held: Mapping[int, Tensor], written: Collection[tuple[int, str]]) -> Hashable:
        """Return what is different where another trace is needed.

        It holds no reference: the state is to be kept along with it.

        Args:
            held: the tensors of the traces by their ids, of which attributes count.
            written: attributes ``(id(owner), name)`` that are left by a run, and read by none.
        """
        place = {id(owner): i for i, owner in enumerate(self.owners)}
        found: list[Any] = []
        for owner in self.owners:
            found.append(type(owner))
            for name, value in vars(owner).items():
                if (id(owner), name) in written or (name in _RESULTS and not isinstance(owner, nn.Module)):
                    continue
                if not isinstance(value, Tensor):
                    found.append((name, type(value), value if _is_hashable(value) else id(value)))
                elif id(value) in held:
                    found.append((name, id(value)))
            if isinstance(owner, nn.Module):
                found += [(name, place.get(id(child))) for name, child in owner._modules.items()]
                found += map(id, (*owner._forward_hooks.values(), *owner._forward_pre_hooks.values()))
                for tensor in (*owner._parameters.values(), *owner._buffers.values()):
                    found.append(id(tensor))
                    if tensor is not None:
                        found += [tensor.shape, tensor.stride(), tensor.dtype, tensor.device]
                        found += [tensor.requires_grad, *map(id, (tensor._backward_hooks or {}).values())]
        return tuple(found)

    def written(self, held: Mapping[int, Tensor]) -> set[tuple[int, str]]:
        """Return the attributes that a run has set since, ``(id(owner), name)``.

        Raises:
            RuntimeError: if what it set may matter to the next run: a number, a parameter or buffer that
                was replaced rather than changed in place, or a tensor that it has read (``held``).
        """
        found = set()
        for owner, attributes, before in zip(self.holders, self.dicts, self.before, strict=True):
            for name in {**before, **attributes}:
                old, new = before.get(name), attributes.get(name)
                if old is new or (not isinstance(owner, nn.Module) and name in _RESULTS):
                    continue
                of_module = attributes is not vars(owner)
                if of_module or isinstance(new, PLAIN) or isinstance(old, PLAIN[:-1]) or id(old) in held:
                    if type(old) is type(new) and isinstance(new, PLAIN) and old == new:
                        continue
                    what = f"{type(owner).__name__}.{name}"
                    raise RuntimeError(
                        f"a run sets {what} anew; keep such state in a buffer, changed in place"
                    )
                found.add((id(owner), name))
        return found

    @contextlib.contextmanager
    def undone(self, devices: Collection[int]) -> Iterator[None]:
        """Let a run change nothing of it, and no random stream of the CPU and of CUDA ``devices``."""
        held = [(tensor, tensor.detach().clone()) for tensor in self.tensors]
        try:
            with torch.random.fork_rng(devices=devices):
                yield
        finally:
            for now, before in zip(self.dicts, self.before, strict=True):
                if len(now) != len(before) or not all(map(operator.is_, now.values(), before.values())):
                    now.clear()
                    now.update(before)
            with torch.no_grad():
                for tensor, value in held:
                    if not torch.equal(tensor, value):
                        tensor.copy_(value)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
