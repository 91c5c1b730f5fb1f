"""A model that is trained with a guide of one row per datum."""

from typing import Any

from torch import Tensor, nn

from ppl_vae.program import Program


class IndexedModel(Program):
    """A model beside a guide that takes each datum's number: ``model(x, index)`` is ``model(x)``.

    Model and guide are called with the same batch. ``LocalGuide`` needs the data's numbers in it; this
    model leaves them out.

    Args:
        model: the model, called with all tensors of the batch but the last.

    Example:
        >>> import torch
        >>> from ppl_vae.models import LinearGaussian
        >>> model = IndexedModel(LinearGaussian(2, 5))
        >>> x = model(None, size=3)
        >>> model(x, torch.arange(3)) is x
        True
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor | None = None, *others: Tensor, size: int | None = None) -> Any:
        """Run the model.

        Args:
            x: data ``[n, *event]``, or None to draw from the prior.
            *others: what else the model takes, then the data's numbers, ``[n]``.
            size: the number of data to draw when ``x`` is None.

        Returns:
            What the model returns.
        """
        if size is None:
            return self.model(x, *others[:-1])
        return self.model(x, *others[:-1], size=size)
