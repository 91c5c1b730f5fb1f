"""The precision of the networks' matrix products."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

Precision = Literal["float32", "tf32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "tf32", "bf16")


@contextmanager
def network_precision(precision: Precision) -> Iterator[None]:
    """Run linear layers, convolutions and attention in a precision; all else stays as it is.

    ``"tf32"`` lets CUDA round the inputs of float32 products to ten bits (its hardware's own format);
    ``"bf16"`` runs the layers in bfloat16, by ``torch.autocast``. Their results are float32 again, so that
    draws, densities and their sums, parameters and the optimiser are never in low precision.
    """
    if precision == "tf32":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
    elif precision == "bf16":
        with _BFloat16():
            yield
    else:
        yield


_LAYERS = {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    F.scaled_dot_product_attention,
    F.multi_head_attention_forward,
}


class _BFloat16(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _LAYERS:
            return func(*args, **kwargs)
        x: Tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            result = func(*args, **kwargs)
        return tree_map_only(Tensor, Tensor.float, result) if x.dtype == torch.float32 else result
