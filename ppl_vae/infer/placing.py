"""Where programs and data are put."""

from typing import Any

import torch
from torch import nn

from ppl_vae.data import as_split, check_data
from ppl_vae.infer.running import Program


def check_device(device: str | torch.device) -> torch.device:
    """Return the device, or raise if this machine has no such device."""
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected 'cpu', 'cuda' or 'cuda:N', got {device!r}") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected a device of this machine, got {device!r}; "
            f"it has {torch.cuda.device_count()} CUDA devices"
        )
    try:
        torch.zeros((), device=chosen).cpu()
    except (RuntimeError, AssertionError):
        raise ValueError(f"device: expected a device of this machine, got {device!r}") from None
    return chosen


def place(device: str | torch.device | None, *programs: Program) -> torch.device:
    """Move modules to a device, by default the one of their parameters, and return it.

    The networks of plain functions are the caller's to place.

    Raises:
        ValueError: if there is no such device.
    """
    modules = [program for program in programs if isinstance(program, nn.Module)]
    if device is None:
        parameters = [p for module in modules for p in module.parameters()]
        chosen = parameters[0].device if parameters else torch.device("cpu")
    else:
        chosen = check_device(device)
    for module in modules:
        module.to(chosen)
    return chosen


def prepare_data(data: Any, name: str, device: torch.device) -> Any:
    """Return data as a checked ``Split`` on the device; loaders stay as they are."""
    if isinstance(data, (torch.utils.data.DataLoader, torch.utils.data.IterableDataset)):
        return data
    split = as_split(data, name)
    check_data(split, name)
    if split.dynamic and (split.x.min() < 0 or split.x.max() > 1):
        row = int(((split.x < 0) | (split.x > 1)).reshape(len(split), -1).any(1).nonzero()[0])
        raise ValueError(
            f"{name}: expected probabilities in [0, 1] for dynamic binarization, "
            f"got values from {float(split.x.min()):.6g} to {float(split.x.max()):.6g}, first in row {row}"
        )
    return split.to(device)
