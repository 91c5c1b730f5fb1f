"""The plot of a disentanglement result: squares, numbers, labels and scores."""

import math

import matplotlib
import pytest
import torch

from ppl_vae.evaluation.disentanglement_metrics import Disentanglement, Score
from ppl_vae.plots.disentanglement import plot_disentanglement

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure


def result(latent: int, factors: int) -> Disentanglement:
    entropy = torch.arange(1.0, factors + 1).log1p()
    shares = torch.rand(latent, factors, generator=torch.Generator().manual_seed(0))
    names = tuple(f"f{i}" for i in range(factors))
    scores = {"MIG": Score(0.123, 0.01), "modularity": Score(0.9, math.nan)}
    return Disentanglement(scores, shares * entropy, entropy, shares, names, 77)


def test_squares_are_mutual_information_over_the_entropy_of_their_column() -> None:
    drawn = result(4, 3)
    ax = plot_disentanglement(drawn, ax=Figure().subplots())
    (image,) = ax.images
    expected = drawn.mutual_information / drawn.entropy
    torch.testing.assert_close(torch.tensor(image.get_array().data).float(), expected)
    assert image.get_clim() == (0.0, 1.0)
    numbers = {text.get_position(): text.get_text() for text in ax.texts}
    assert numbers[2, 1] == f"{float(expected[1, 2]):.2f}" and len(numbers) == 12
    assert [label.get_text() for label in ax.get_xticklabels()] == ["f0", "f1", "f2"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["z[0]", "z[1]", "z[2]", "z[3]"]
    assert ax.get_title() == "MIG 0.12"


def test_many_codes_have_fewer_labels_and_no_numbers() -> None:
    ax = plot_disentanglement(result(100, 2), ax=Figure().subplots())
    assert not ax.texts and len(ax.get_yticklabels()) == 20
    assert ax.get_yticklabels()[1].get_text() == "z[5]"


def test_a_result_without_scores_says_how_many_data_and_without_axes_makes_a_figure() -> None:
    drawn = result(2, 2)
    ax = plot_disentanglement(
        Disentanglement({}, *(drawn.mutual_information, drawn.entropy), *(drawn.importance, drawn.names, 77))
    )
    assert ax.get_title() == "77 data"
    ax.figure.canvas.draw()
    plt.close(ax.figure)


def test_another_result_is_refused() -> None:
    with pytest.raises(TypeError, match="result: expected Disentanglement, got dict"):
        plot_disentanglement({})
