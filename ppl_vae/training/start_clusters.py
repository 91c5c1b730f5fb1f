"""Where the clusters of a Gaussian mixture model start: at a mixture fitted to a trained guide's z."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppl_vae._checks import check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.guides.gaussian_mixture import GaussianMixtureGuide
from ppl_vae.guides.mean_field import MeanFieldGuide
from ppl_vae.infer.running import evaluating
from ppl_vae.models.gaussian_mixture_vae import GaussianMixtureVAE

ROWS = 1000  # data per pass of the encoder


def start_clusters(
    model: GaussianMixtureVAE,
    guide: GaussianMixtureGuide,
    start: MeanFieldGuide,
    x: Tensor,
    *,
    size: int = 20_000,
    seed: int = 0,
) -> None:
    """Start a Gaussian mixture model's clusters at those of a mixture fitted to the posterior means of z.

    From random clusters, the model often ends with two groups of data in one. ``start`` is the guide of a
    ``VAE`` that was trained before, with the decoder that ``model`` has now; a low KL weight keeps groups
    apart. Scikit-learn's ``GaussianMixture``, of full covariances, is fitted to its posterior means. The
    model's clusters start there, and the guide at ``start``: its encoder and q(z given x), and q(y given x)
    by logistic regression of the mixture's clusters on the encoder's features. No label is used.

    References:
        Variational Deep Embedding (Jiang et al., 2017), arXiv:1611.05148

    Args:
        model: whose clusters, and weights if they are learned, to set.
        guide: which to set, with an encoder as that of ``start``, or the same.
        start: the trained guide.
        x: data ``[n, *event]``.
        size: the number of data that the mixture and the regression are fitted to, chosen at random.
        seed: of that choice and of the mixture's start; the random stream is left alone.

    Raises:
        TypeError: if one of the three is of another kind.
        ValueError: if they differ in the number of latent dimensions or components, the encoders differ, the
            weights are those of sticks, or there are fewer data than components.

    Example:
        >>> from ppl_vae.likelihoods import Bernoulli
        >>> from ppl_vae.networks import MLP
        >>> encoder, decoder = MLP((1, 8, 8)), MLP(2, (1, 8, 8))
        >>> start = MeanFieldGuide(encoder, 2)  # trained with VAE(StandardNormal(2), Bernoulli(decoder))
        >>> model = GaussianMixtureVAE(3, 2, Bernoulli(decoder))
        >>> guide = GaussianMixtureGuide(encoder, 2, 3, per_cluster=False)
        >>> start_clusters(model, guide, start, torch.rand(100, 1, 8, 8))
    """
    _check(model, guide, start, x)
    from sklearn.mixture import GaussianMixture

    with seeded(check_seed(seed)), evaluating(start), torch.no_grad():
        chosen = x[torch.randperm(len(x))[: check_positive_int("size", size)].to(x.device)]
        chosen = chosen.to(next(start.parameters()))
        features = torch.cat([start.encoder(part) for part in chosen.split(ROWS)])
        z = start.family(start.head(features)).mean.double().cpu()
        fitted = GaussianMixture(model.components, n_init=3, random_state=seed).fit(z.numpy())
        factors = torch.linalg.cholesky(torch.from_numpy(fitted.covariances_))
        model.loc.copy_(torch.from_numpy(fitted.means_))
        if model.covariance == "full":
            model.log_scale.copy_(factors.diagonal(dim1=-2, dim2=-1).log())
            model.below_diagonal.copy_(factors.tril(-1))
        else:
            model.log_scale.copy_(factors.square().sum(-1).log() / 2)
        if model.weights == "learned":
            model.weight_logits.copy_(torch.from_numpy(fitted.weights_).log())
        guide.encoder.load_state_dict(start.encoder.state_dict())
        clusters = torch.from_numpy(fitted.predict_proba(z.numpy())).to(features)
    regression = _regress(features, clusters, seed)
    with torch.no_grad():
        copies = model.components if guide.per_cluster else 1
        for part in ("weight", "bias"):
            loc, log_scale = getattr(start.head, part).chunk(2)
            z_rows = [rows.repeat(copies, *[1] * (rows.ndim - 1)) for rows in (loc, log_scale)]
            getattr(guide.head, part).copy_(torch.cat([getattr(regression, part), *z_rows]))


def _regress(features: Tensor, clusters: Tensor, seed: int, steps: int = 300) -> nn.Linear:
    """Return the logistic regression of clusters, probabilities ``[n, components]``, on features."""
    with seeded(seed), torch.enable_grad():
        regression = nn.Linear(features.shape[1], clusters.shape[1]).to(features)
        optimizer = torch.optim.Adam(regression.parameters(), lr=1e-2)
        for _ in range(steps):
            rows = torch.randint(len(features), (min(len(features), 2000),), device=features.device)
            optimizer.zero_grad()
            F.cross_entropy(regression(features[rows]), clusters[rows]).backward()
            optimizer.step()
    return regression


def _check(model: Any, guide: Any, start: Any, x: Tensor) -> None:
    """Raise if the clusters can't start there."""
    kinds = {"model": GaussianMixtureVAE, "guide": GaussianMixtureGuide, "start": MeanFieldGuide}
    for (name, kind), given in zip(kinds.items(), (model, guide, start), strict=True):
        if not isinstance(given, kind):
            raise TypeError(f"{name}: expected a {kind.__name__}, got {type(given).__name__}")
    if model.weights == "stick-breaking":
        raise ValueError("model: expected equal or learned weights, got those of sticks")
    if guide.components != model.components:
        raise ValueError(f"guide: expected {model.components} components, got {guide.components}")
    for name, given in (("guide", guide), ("start", start)):
        if given.latent_dim != model.latent_dim:
            raise ValueError(f"{name}: expected latent_dim {model.latent_dim}, got {given.latent_dim}")
    shapes = [[(k, v.shape) for k, v in g.encoder.state_dict().items()] for g in (guide, start)]
    if shapes[0] != shapes[1]:
        raise ValueError("guide: expected an encoder as that of `start`, got another one")
    if len(x) < model.components:
        raise ValueError(f"x: expected at least {model.components} data, one for each cluster, got {len(x)}")
