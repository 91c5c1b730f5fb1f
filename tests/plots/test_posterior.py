"""Tests of the plot of one datum's posterior and guides."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.contour import ContourSet, QuadContourSet
from matplotlib.figure import Figure

from ppl_vae.evaluation.guides import PosteriorDensity, posterior_density
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.models import LinearGaussian
from ppl_vae.networks import MLP
from ppl_vae.plots.posterior import plot_posterior


def normal(loc: float, scale: float, grid: torch.Tensor) -> torch.Tensor:
    one = torch.distributions.Normal(loc, scale).log_prob(grid)
    return (one[None, :] + torch.distributions.Normal(0.0, scale).log_prob(grid)[:, None]).exp()


def density(**changes: Any) -> PosteriorDensity:
    grid = torch.linspace(-6, 6, 241, dtype=torch.float64)
    draws = torch.randn(7000, 2, dtype=torch.float64)
    guides = {"narrow": normal(0, 0.5, grid), "shifted": normal(1, 1, grid)}
    scored = {"narrow": True, "shifted": False}
    result = PosteriorDensity(grid, grid, guides, normal(0, 1, grid), draws, scored, (0, 3), "z", 4)
    return replace(result, **changes)


def contours(ax: Any) -> list[QuadContourSet]:
    return [c for c in ax.get_children() if isinstance(c, ContourSet)]


def test_contours_hold_half_and_nine_tenths_of_each_guide() -> None:
    ax = plot_posterior(density(), ax=Figure().subplots())
    filled, narrow, shifted = contours(ax)
    assert filled.filled and not narrow.filled
    # of a normal in the plane: a share s is within the radius scale * sqrt(-2 log(1 - s))
    for contour, x, scale in ((narrow, 0.0, 0.5), (shifted, 1.0, 1.0)):
        for path, share in zip(contour.get_paths(), (0.9, 0.5), strict=True):
            radius = np.hypot(path.vertices[:, 0] - x, path.vertices[:, 1])
            assert np.allclose(radius, scale * math.sqrt(-2 * math.log(1 - share)), rtol=0.03)


def test_labels_legend_dots_and_dashes_say_what_is_shown() -> None:
    ax = plot_posterior(density(), ax=Figure().subplots())
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("z[0]", "z[3]", "datum 4")
    legend = ax.get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["posterior", "reference", "narrow", "shifted"]
    styles = {h.get_label(): h.get_linestyle() for h in legend.legend_handles[2:] if h is not None}  # type: ignore[attr-defined]
    assert styles == {"narrow": "-", "shifted": "--"}
    dots = [c for c in ax.collections if len(c.get_offsets()) > 100]
    assert len(dots) == 1 and 2000 < len(dots[0].get_offsets()) <= 3000
    bare = plot_posterior(density(draws=None, posterior=None), ax=Figure().subplots())
    assert len(contours(bare)) == 2 and not bare.get_legend().get_texts()[0].get_text() == "posterior"


def test_a_figure_is_made_without_axes_and_what_posterior_density_returns_is_drawn() -> None:
    import matplotlib.pyplot as plt

    model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
    result = posterior_density(model, {"g": guide}, torch.randn(3, 5), grid=20, num_particles=50)
    ax = plot_posterior(result)
    assert len(contours(ax)) == 2 and ax.get_xlim() == (float(result.x[0]), float(result.x[-1]))
    plt.close(ax.figure)  # type: ignore[arg-type]


def test_a_density_of_one_peak_between_the_points_is_drawn() -> None:
    spike = torch.zeros(241, 241, dtype=torch.float64)
    spike[120, 120] = 1.0
    ax = plot_posterior(density(guides={"narrow": spike}, scored={"narrow": True}), ax=Figure().subplots())
    assert len(contours(ax)) == 2


def test_wrong_results_are_named() -> None:
    with pytest.raises(TypeError, match="result: expected PosteriorDensity, got dict"):
        plot_posterior({})  # type: ignore[arg-type]
    for bad in (torch.zeros(241, 241), torch.full((241, 241), math.nan)):
        with pytest.raises(ValueError, match=r"result.guides\['narrow'\]: expected a finite density"):
            plot_posterior(density(guides={"narrow": bad}), ax=Figure().subplots())
