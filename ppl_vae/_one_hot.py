"""Labels as rows."""

import torch
from torch import Tensor


def one_hot(y: Tensor, classes: int) -> Tensor:
    """Return which class each label is, booleans ``[*batch, classes]``; none for a label out of range.

    Unlike torch's it looks at no value, so that a step can be traced.
    """
    return y.unsqueeze(-1) == torch.arange(classes, device=y.device)
