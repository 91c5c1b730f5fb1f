"""Zuko's networks and transforms, imported without its change of a default of torch."""

from torch.distributions import Distribution

_validated = Distribution._validate_args
import zuko.nn  # noqa: E402
import zuko.transforms  # noqa: E402

Distribution.set_default_validate_args(_validated)  # its import switches argument validation off

MLP = zuko.nn.MLP
MaskedMLP = zuko.nn.MaskedMLP
AutoregressiveTransform = zuko.transforms.AutoregressiveTransform
DependentTransform = zuko.transforms.DependentTransform
MonotonicAffineTransform = zuko.transforms.MonotonicAffineTransform
MonotonicRQSTransform = zuko.transforms.MonotonicRQSTransform
