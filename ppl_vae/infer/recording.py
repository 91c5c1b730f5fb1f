"""Reading the parts of the ELBO from the runs that a training step makes anyway."""

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_vae.infer.log_weights import Terms, terms_of_sites
from ppl_vae.infer.running import Site


class SiteRecorder(Messenger):
    """Records the sites of every run of a guide and a model inside its context.

    A run of the guide is followed by a run of the model on the same draws, whatever the estimator,
    so that both are told apart by the draws themselves. Costs one more evaluation of each log-probability.

    Example:
        >>> import pyro
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> x = model(None, size=3).detach()
        >>> with SiteRecorder() as record:
        ...     loss = pyro.infer.Trace_ELBO().loss(model, guide, x)
        >>> sorted(record.sums())
        ['elbo', 'kl_z', 'reconstruction']
    """

    def __init__(self) -> None:
        super().__init__()
        self._guide: dict[str, Site] = {}
        self._model: dict[str, Site] = {}
        self._runs: list[tuple[dict[str, Site], dict[str, Site]]] = []
        self._enumerated = False

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        name = msg["name"]
        self._enumerated |= msg["infer"].get("_enumerate_dim") is not None
        drawn_before = self._guide.get(name)
        if msg["is_observed"] or (drawn_before is not None and drawn_before["value"] is msg["value"]):
            self._model[name] = msg.copy()
            return
        if self._model:  # the model's run is over: this is a new run of the guide
            self._end_run()
        self._guide[name] = msg.copy()

    def _end_run(self) -> None:
        if self._model:
            self._runs.append((self._guide, self._model))
        self._guide, self._model = {}, {}

    def sums(self) -> dict[str, Tensor] | None:
        """Return ELBO, reconstruction and KL of each latent site, summed over the batch, nats.

        Returns:
            Scalars by name (``elbo``, ``reconstruction``, ``kl_<site>``), averaged over draws; None if
            the runs were no plain draws from the guide (an enumerated site, say).
        """
        self._end_run()
        if self._enumerated or not self._runs:
            return None
        try:
            with torch.no_grad():
                runs = [term_sums(terms_of_sites(model, guide)) for guide, model in self._runs]
        except ValueError:
            return None
        return {name: torch.stack([run[name] for run in runs]).mean(0) for name in runs[0]}


def term_sums(terms: Terms) -> dict[str, Tensor]:
    """Return ELBO, reconstruction and KL of each site, averaged over draws, summed over data."""
    sums = {"elbo": terms.log_weights(), "reconstruction": terms.reconstruction}
    sums |= {f"kl_{site}": kl for site, kl in terms.kl.items()}
    return {name: value.mean(0).sum() for name, value in sums.items()}
