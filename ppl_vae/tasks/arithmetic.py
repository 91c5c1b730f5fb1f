"""Arithmetic of latents: a - b + c, and moves along the difference of two classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppl_vae._checks import check_seed
from ppl_vae._random import seeded
from ppl_vae.data import Split
from ppl_vae.evaluation.evaluate import CPU_ROWS
from ppl_vae.evaluation.generation import decode, encode, is_on_sphere, prior_site
from ppl_vae.infer.placing import place
from ppl_vae.infer.running import Program, evaluating
from ppl_vae.tasks._passes import arguments, in_memory, mean_and_error


@dataclass(frozen=True, eq=False)
class LatentArithmetic:
    """The mean latents of three groups of data, and a - b + c.

    Attributes:
        z: the latents of a, b, c and a - b + c, ``[4, latent]``.
        x: the likelihood's means there, ``[4, *event]``.
    """

    z: Tensor
    x: Tensor


@dataclass(frozen=True, eq=False)
class AttributeVectors:
    """The mean latent of each class.

    Attributes:
        classes: the labels, in order, ``[classes]``.
        means: ``[classes, latent]``.
        counts: the data of each, ``[classes]``.
    """

    classes: Tensor
    means: Tensor = field(repr=False)
    counts: Tensor

    def between(self, source: int, target: int) -> Tensor:
        """Return the way from one class to another: the difference of their means, ``[latent]``.

        Raises:
            ValueError: if there is no such class.
        """
        rows = []
        for name, label in (("source", source), ("target", target)):
            found = (self.classes == label).nonzero()
            if not len(found):
                raise ValueError(
                    f"{name}: expected one of the classes {self.classes.tolist()}, got {label!r}"
                )
            rows.append(int(found[0]))
        return self.means[rows[1]] - self.means[rows[0]]


@dataclass(frozen=True, eq=False)
class Edits:
    """Data whose latents moved along a vector.

    Attributes:
        original: the data, ``[n, *event]``.
        x: the likelihood's means along the way, ``[n, strengths, *event]``.
        strengths: how many times the vector was added, ``[strengths]``.
    """

    original: Tensor = field(repr=False)
    x: Tensor
    strengths: Tensor


@dataclass(frozen=True, eq=False)
class EditAccuracy:
    """The share of edited data that a classifier finds to be of the wanted class, for each strength.

    Attributes:
        share: in [0, 1], ``[strengths]``.
        standard_error: over data, ``[strengths]``.
        strengths: ``[strengths]``.
        target: the wanted class.
        num_data: how many data were edited.
    """

    share: Tensor
    standard_error: Tensor
    strengths: Tensor
    target: int
    num_data: int

    def summary(self) -> dict[str, Any]:
        """Return plain numbers, for a file."""
        return {
            "target": self.target,
            "num_data": self.num_data,
            "strengths": self.strengths.tolist(),
            "share": self.share.tolist(),
            "standard_error": self.standard_error.tolist(),
        }

    def __str__(self) -> str:
        rows = [
            f"{strength:>8g} {share:>8.3f} +- {error:.3f}"
            for strength, share, error in zip(
                self.strengths.tolist(), self.share.tolist(), self.standard_error.tolist(), strict=True
            )
        ]
        head = f"share of {self.num_data} edited data that are found to be of class {self.target}"
        return "\n".join([head, f"{'strength':>8} {'share':>8}", *rows])


def latent_arithmetic(
    model: Program,
    guide: Program,
    a: Any,
    b: Any,
    c: Any,
    *,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> LatentArithmetic:
    """Return the mean latent of a minus that of b plus that of c, and what it decodes to.

    On a sphere, the sum's direction is taken.

    Args:
        model: a program that takes ``model(None, size=n)``.
        guide: program over the latent site ``z``.
        a: a group of data: what ``evaluate`` takes.
        b: the group to subtract.
        c: the group to add.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of draws, for a guide whose family has no mean.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    References:
        Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks
        (Radford et al., 2016), arXiv:1511.06434

    Example:
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 4), MeanFieldGuide(MLP(4), 2)
        >>> latent_arithmetic(model, guide, *torch.randn(3, 6, 4)).x.shape
        torch.Size([4, 4])
    """
    check_seed(seed)
    where = place(device, model, guide)
    with seeded(seed), evaluating(model, guide):
        groups = [in_memory(data, name, where, seed) for name, data in (("a", a), ("b", b), ("c", c))]
        means = [
            _encode(model, guide, split, name).mean(0) for name, split in zip("abc", groups, strict=True)
        ]
        z = torch.stack([*means, means[0] - means[1] + means[2]])
        prior = prior_site(model, z)
        if is_on_sphere(prior):
            z = F.normalize(z, dim=-1)
        return LatentArithmetic(z.cpu(), decode(model, prior, z))


def attribute_vectors(
    model: Program,
    guide: Program,
    data: Any,
    y: Tensor | None = None,
    *,
    device: str | torch.device | None = None,
    seed: int = 0,
) -> AttributeVectors:
    """Return the mean latent of each class; differences of these are attribute vectors.

    Args:
        model: program over the latent site ``z`` and the data.
        guide: program over the latent site ``z``.
        data: data with labels: a ``Split``, a tuple ``(x, y)``, a torch ``Dataset`` or ``DataLoader``.
        y: labels ``[n]`` in place of those of the data, an attribute of two values say.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of draws, for a guide whose family has no mean.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    References:
        Autoencoding beyond pixels using a learned similarity metric (Larsen et al., 2016), arXiv:1512.09300

    Example:
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 4), MeanFieldGuide(MLP(4), 2)
        >>> vectors = attribute_vectors(model, guide, (torch.randn(6, 4), torch.arange(6) % 3))
        >>> vectors.between(0, 2).shape
        torch.Size([2])
    """
    check_seed(seed)
    where = place(device, model, guide)
    with seeded(seed), evaluating(model, guide):
        split = in_memory(data, "data", where, seed)
        labels = split.y if y is None else torch.as_tensor(y, device=where)
        if labels is None or labels.shape != (len(split),) or labels.is_floating_point():
            got = "None" if labels is None else f"{labels.dtype} of shape {list(labels.shape)}"
            raise ValueError(f"y: expected a whole number for each of {len(split)} data, got {got}")
        z = _encode(model, guide, split, "data").double()
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    means = z.new_zeros(len(classes), z.shape[1]).index_add_(0, index, z) / counts[:, None]
    return AttributeVectors(classes.cpu(), means.to(split.x.dtype).cpu(), counts.cpu())


def edit(
    model: Program,
    guide: Program,
    data: Any,
    vector: Tensor,
    *,
    strengths: Sequence[float] | Tensor = (0.0, 0.5, 1.0, 1.5),
    device: str | torch.device | None = None,
    seed: int = 0,
) -> Edits:
    """Add an attribute vector to the latent of each datum, in several strengths, and decode.

    On a sphere, the sum's direction is taken.

    Args:
        model: a program that takes ``model(None, size=n)``.
        guide: program over the latent site ``z``.
        data: what ``evaluate`` takes.
        vector: ``[latent]``, from ``AttributeVectors.between`` say.
        strengths: how many times it is added; 0 reconstructs.
        device: where to work, and where modules stay; by default where the model's parameters are.
        seed: of draws, for a guide whose family has no mean.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 4), MeanFieldGuide(MLP(4), 2)
        >>> edit(model, guide, torch.randn(6, 4), torch.ones(2), strengths=[0.0, 1.0]).x.shape
        torch.Size([6, 2, 4])
    """
    check_seed(seed)
    where = place(device, model, guide)
    if not isinstance(vector, Tensor) or vector.dim() != 1 or not bool(torch.isfinite(vector).all()):
        got = f"shape {list(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
        raise ValueError(f"vector: expected a finite tensor [latent], got {got}")
    steps = torch.as_tensor(strengths, dtype=torch.get_default_dtype())
    if steps.dim() != 1 or not len(steps) or not bool(torch.isfinite(steps).all()):
        raise ValueError(f"strengths: expected a sequence of numbers, got {strengths!r}")
    with seeded(seed), evaluating(model, guide):
        split = in_memory(data, "data", where, seed)
        z = _encode(model, guide, split, "data")
        if z.shape[-1] != len(vector):
            raise ValueError(f"vector: expected the latent's size {z.shape[-1]}, got {len(vector)}")
        prior = prior_site(model, z)
        rows = max(1, CPU_ROWS // len(steps))
        decoded = []
        for part in z.split(rows):
            moved = part[:, None] + steps.to(z)[:, None] * vector.to(z)
            if is_on_sphere(prior):
                moved = F.normalize(moved, dim=-1)
            decoded.append(decode(model, prior, moved))
    return Edits(split.x.cpu(), torch.cat(decoded), steps)


def edit_accuracy(edits: Edits, target: int, classifier: Callable[[Tensor], Any] | Any) -> EditAccuracy:
    """Return the share of edited data that a classifier finds to be of the wanted class.

    Args:
        edits: what ``edit`` returns.
        target: the wanted class.
        classifier: a fitted classifier of scikit-learn; a function from data ``[m, *event]`` to labels
            ``[m]``; or a module that gives labels or logits ``[m, classes]``, a ``Classifier`` say, which
            runs in evaluation mode.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Example:
        >>> x = torch.tensor([[[0.1], [0.9]], [[0.2], [0.4]]])
        >>> edits = Edits(original=x[:, 0], x=x, strengths=torch.tensor([0.0, 1.0]))
        >>> edit_accuracy(edits, 1, lambda x: x[:, 0] > 0.5).share
        tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    flat = edits.x.flatten(0, 1)
    predict = getattr(classifier, "predict", None)
    if callable(predict):
        found = predict(flat.reshape(len(flat), -1).numpy())
    elif callable(classifier):
        owners = [classifier] if isinstance(classifier, nn.Module) else []
        with evaluating(classifier):
            found = classifier(flat.to(place(None, *owners)))
    else:
        raise TypeError(
            f"classifier: expected one with `predict`, or a function, got {type(classifier).__name__}"
        )
    labels = torch.as_tensor(found).cpu()
    if isinstance(classifier, nn.Module) and labels.dim() == 2:
        labels = labels.argmax(1)
    if labels.shape != (len(flat),):
        raise ValueError(
            f"classifier: expected labels of shape [{len(flat)}] from it, got {list(labels.shape)}"
        )
    hits = (labels == target).double().reshape(edits.x.shape[:2])
    measured = torch.tensor([mean_and_error(column) for column in hits.unbind(1)], dtype=torch.float64)
    return EditAccuracy(measured[:, 0], measured[:, 1], edits.strengths, target, len(hits))


def _encode(model: Program, guide: Program, split: Split, name: str) -> Tensor:
    """Return the latent of each datum, ``[n, latent]``, on the split's device."""
    batch = arguments(model, split, name)
    parts = zip(*(t.split(CPU_ROWS) for t in batch), strict=True)
    return torch.cat([encode(guide, *part).z for part in parts]).to(split.x.device)
