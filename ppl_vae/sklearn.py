"""The variational autoencoder as a scikit-learn transformer."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor, nn

from ppl_vae._checks import check_choice, check_positive_int, check_sizes
from ppl_vae._random import seeded
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer.running import evaluating
from ppl_vae.likelihoods import Bernoulli, Normal
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.training import fit

__all__ = ["VAETransformer"]

_ROWS = 4096  # of a pass, a draw for a datum each


class VAETransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""A variational autoencoder of rows of numbers, as a scikit-learn transformer.

    ``fit`` trains a ``VAE`` and a ``MeanFieldGuide`` with multilayer perceptrons; ``transform`` returns
    posterior means. It works where scikit-learn's own transformers do: in pipelines, searches, clones and
    pickles. It computes in the type of X: float32 is quicker, float64 the default of NumPy.

    For images, other networks, priors, guides or estimators take the library's ``fit`` itself.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114

    Args:
        latent_dim: the number of latent dimensions.
        hidden: widths of the encoder's hidden layers, and in reverse of the decoder's; ``()`` for linear
            maps, which make the model probabilistic PCA.
        likelihood: ``"normal"``, with one noise :math:`\sigma` that is learned, or ``"bernoulli"``, for data
            of 0 and 1.
        standardize: subtract each feature's mean and divide by its standard deviation first, of normal data
            only. ``inverse_transform`` and ``score_samples`` are of the data as they came.
        epochs: passes over the data.
        batch_size: data per step.
        learning_rate: Adam's.
        num_particles: draws per datum in ``score_samples``; 1 for an estimate of the ELBO.
        device: where to train and to compute, ``"cpu"`` or ``"cuda"``.
        random_state: an int for the same result in each call of ``fit``, a ``numpy.random.RandomState``, or
            None for NumPy's global one.
        verbose: show a progress bar in ``fit``.

    Attributes:
        model_: the trained model, a ``VAE`` of the standardised data.
        guide_: the trained guide.
        history_: one record per epoch; ELBO, reconstruction and KL, nats per datum, of standardised data.
        mean_: each feature's mean, ``[features]``; zeros if data are not standardised.
        scale_: each feature's standard deviation, ``[features]``, 1 of a constant one; ones likewise.
        n_features_in_: the number of features.
        feature_names_in_: their names, if X has any.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X = load_iris().data
        >>> vae = VAETransformer(latent_dim=2, epochs=2, random_state=0).fit(X)
        >>> z = vae.transform(X)
        >>> z.shape, vae.inverse_transform(z).shape, vae.score_samples(X).shape
        ((150, 2), (150, 4), (150,))
    """

    def __init__(
        self,
        latent_dim: int = 2,
        *,
        hidden: int | Sequence[int] = (64, 64),
        likelihood: Literal["normal", "bernoulli"] = "normal",
        standardize: bool = True,
        epochs: int = 100,
        batch_size: int = 100,
        learning_rate: float = 1e-3,
        num_particles: int = 100,
        device: str = "cpu",
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.latent_dim = latent_dim
        self.hidden = hidden
        self.likelihood = likelihood
        self.standardize = standardize
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.num_particles = num_particles
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> "VAETransformer":
        """Train on X, ``[n, features]``; y is not used.

        Raises:
            TypeError, ValueError: naming the argument, what came and what was expected.
            FloatingPointError: if the loss becomes NaN or infinite.
        """
        latent_dim = check_positive_int("latent_dim", self.latent_dim)
        hidden = check_sizes("hidden", self.hidden)
        check_positive_int("num_particles", self.num_particles)
        check_choice("likelihood", self.likelihood, ("normal", "bernoulli"))
        values = validate_data(self, X, dtype=(np.float64, np.float32))
        if self.likelihood == "bernoulli" and not np.isin(values, (0, 1)).all():
            raise ValueError(
                "X: expected values 0 and 1 for likelihood='bernoulli', "
                f"got values from {values.min():.6g} to {values.max():.6g}"
            )
        features = values.shape[1]
        mean, scale = np.zeros_like(values[0]), np.ones_like(values[0])
        if self.standardize and self.likelihood == "normal":
            mean = values.mean(0, dtype=np.float64).astype(values.dtype)
            spread = values.std(0, dtype=np.float64).astype(values.dtype)
            least = 10 * np.finfo(values.dtype).eps * np.abs(mean)  # rounding of a constant feature
            scale = np.where(spread > least, spread, scale)
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        with seeded(seed):
            encoder = MLP(features, hidden=hidden) if hidden else nn.Identity()
            decoder = MLP(latent_dim, features, hidden=hidden[::-1])
            likelihood = Bernoulli(decoder) if self.likelihood == "bernoulli" else Normal(decoder, "learned")
            guide = MeanFieldGuide(encoder, latent_dim, features=hidden[-1] if hidden else features)
            model = VAE(StandardNormal(latent_dim), likelihood)
        x = torch.tensor((values - mean) / scale)
        if isinstance(likelihood, Bernoulli):
            likelihood.init_bias(x)
        run = fit(
            model.to(x.dtype),
            guide.to(x.dtype),
            x,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            device=self.device,
            seed=seed,
            progress=bool(self.verbose),
        )
        self.mean_, self.scale_, self.history_ = mean, scale, run.history
        self.model_, self.guide_ = model.eval(), guide.eval()
        self._noise_seed = seed
        return self

    def transform(self, X: Any) -> Any:
        """Return the posterior means ``[n, latent_dim]`` of X, ``[n, features]``."""
        x = self._data(X)
        with evaluating(self.guide_):
            means = [self.guide_.posterior(part).mean for part in x.split(_ROWS)]
        return torch.cat(means).cpu().numpy()

    def inverse_transform(self, X: Any) -> Any:
        """Return the likelihood's means ``[n, features]`` of latents X, ``[n, latent_dim]``."""
        check_is_fitted(self, "guide_")
        z = check_array(X, dtype=self.mean_.dtype)
        if z.shape[1] != self._n_features_out:
            raise ValueError(f"X: expected latents [n, {self._n_features_out}], got shape {list(z.shape)}")
        latents = self._tensor(z)
        with evaluating(self.model_):
            means = [self.model_.likelihood(part).mean for part in latents.split(_ROWS)]
        return torch.cat(means).cpu().numpy() * self.scale_ + self.mean_

    def score_samples(self, X: Any) -> Any:
        """Return an estimate of log p(x) of each row of X, nats, ``[n]``.

        It is the log of the mean importance weight of ``num_particles`` draws from the guide: in expectation
        a lower bound on log p(x) that rises to it with their number, with one draw the ELBO's. All rows and
        all calls share the draws' noise, so that a row's value does not depend on the others.
        """
        x = self._data(X)
        k = check_positive_int("num_particles", self.num_particles)
        with seeded(self._noise_seed, 1):  # on the CPU: the same on each device
            noise = torch.randn(k, 1, self._n_features_out, dtype=x.dtype).to(x.device)
        found = []
        with evaluating(self.model_, self.guide_):
            for part in x.split(max(1, _ROWS // k)):
                q = self.guide_.posterior(part)
                total = x.new_full((len(part),), -math.inf, dtype=torch.float64)
                for some in noise.split(_ROWS):
                    z = q.mean + q.stddev * some
                    log_weights = self.model_.prior().log_prob(z) - q.log_prob(z)
                    log_weights = log_weights + self.model_.likelihood(z).log_prob(part)
                    total = torch.logaddexp(total, log_weights.double().logsumexp(0))
                found.append((total - math.log(k)).to(x.dtype))
        return torch.cat(found).cpu().numpy() - np.log(self.scale_).sum()

    def score(self, X: Any, y: Any = None) -> float:
        """Return the mean of ``score_samples`` over the rows of X, nats per datum; y is not used."""
        return float(np.mean(self.score_samples(X)))

    @property
    def _n_features_out(self) -> int:
        """The number of outputs, for the names that ``get_feature_names_out`` makes."""
        latent_dim: int = self.guide_.latent_dim
        return latent_dim

    def _data(self, X: Any) -> Tensor:
        """Return X, checked and standardised, where the model is."""
        check_is_fitted(self, "guide_")
        values = validate_data(self, X, dtype=(np.float64, np.float32), reset=False)
        return self._tensor((values.astype(self.mean_.dtype, copy=False) - self.mean_) / self.scale_)

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, device=next(self.guide_.parameters()).device)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
