"""Tests of the scores of clusterings, against search over all matchings and sums."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppl_vae.evaluation.clustering import (
    clustering_accuracy,
    contingency_table,
    normalized_mutual_information,
)

pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=30)


@settings(deadline=None, max_examples=50)
@given(pairs)
def test_accuracy_is_that_of_the_best_matching_of_all(data: list[tuple[int, int]]) -> None:
    clusters, y = torch.tensor(data).unbind(1)
    best = max(sum(labels[c] == label for c, label in data) for labels in itertools.permutations(range(5), 4))
    assert clustering_accuracy(clusters, y) == pytest.approx(best / len(data))
    free = max(
        sum(labels[c] == label for c, label in data) for labels in itertools.product(range(5), repeat=4)
    )
    assert clustering_accuracy(clusters, y, matching="many-to-one") == pytest.approx(free / len(data))


@settings(deadline=None, max_examples=50)
@given(pairs)
def test_normalized_mutual_information_is_the_sum_over_the_table(data: list[tuple[int, int]]) -> None:
    clusters, y = torch.tensor(data).unbind(1)
    joint = contingency_table(clusters, y).double() / len(data)
    assert joint.sum() == pytest.approx(1)
    rows, columns = joint.sum(1), joint.sum(0)
    mutual = joint.xlogy(joint).sum() - rows.xlogy(rows).sum() - columns.xlogy(columns).sum()
    entropies = -(rows.xlogy(rows).sum() + columns.xlogy(columns).sum()) / 2
    expected = float(mutual / entropies) if entropies > 1e-12 else 1.0
    assert normalized_mutual_information(clusters, y) == pytest.approx(expected, abs=1e-9)


def test_names_of_clusters_do_not_matter() -> None:
    torch.manual_seed(0)
    y = torch.randint(10, (500,))
    clusters = torch.randperm(10)[y]
    assert clustering_accuracy(clusters, y) == 1.0
    assert normalized_mutual_information(clusters, y) == pytest.approx(1.0)


def test_more_clusters_than_labels() -> None:
    y, clusters = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 3, 3, 5, 5])
    assert clustering_accuracy(clusters, y) == pytest.approx(4 / 6)
    assert clustering_accuracy(clusters, y, matching="many-to-one") == 1.0


@pytest.mark.parametrize("score", [clustering_accuracy, normalized_mutual_information])
def test_bad_arguments_are_named(score: object) -> None:
    good = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="clusters: expected whole numbers from 0"):
        score(torch.rand(2, 3), good)
    with pytest.raises(ValueError, match=r"y: expected whole numbers from 0.*values below 0"):
        score(good, good - 1)
    with pytest.raises(ValueError, match="y: expected as many labels as clusters, 2, got 3"):
        score(good, torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="matching: unknown 'hungarian'"):
        clustering_accuracy(good, good, matching="hungarian")


def test_small_types_of_labels_do_not_overflow() -> None:
    clusters, y = torch.arange(300) % 30, torch.arange(300) % 10
    few = contingency_table(clusters.to(torch.uint8), y.to(torch.uint8))
    assert torch.equal(few, contingency_table(clusters, y))
    assert few.sum() == 300
