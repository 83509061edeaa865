"""DIMEE's offline helpers against the table of its costs, brute force and the cascades that it contains."""

import numpy as np
import pytest

from fastee.calibration import dimee


@pytest.fixture
def rows():
    rng = np.random.default_rng(3)
    hard = rng.random(500)
    confidence = np.clip(1.2 - hard[:, None] * [[1.0, 0.7, 0.3]] + 0.1 * rng.standard_normal((500, 3)), 0.05, 1.0)
    embedding = np.stack([hard, rng.random(500)], axis=1)
    return embedding, confidence, confidence + 0.2 * rng.standard_normal((500, 3)) > 0.55


def test_costs_are_those_of_the_specification():
    pool, tier = [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]
    np.testing.assert_allclose(dimee.path_cost(pool, tier), [0.3, 0.9, 2.0, 0.9, 2.0, 1.7])
    # layers are paid where they run: 3 mobile, 3 edge and 6 cloud ones; then 6 on the edge and 6 in the cloud; then all in the cloud
    np.testing.assert_allclose(dimee.path_cost(pool, tier, layer_cost=(1.0, 0.1, 0.01), hops=(0, 0, 0)), [3, 3.3, 3.36, 0.6, 0.66, 0.12])


def test_pools_are_means_of_their_samples_and_an_empty_one_is_removed(rows):
    x, c, _ = rows
    made = dimee.pools(x, c, 0.7)
    easy = c[:, 0] >= 0.7
    np.testing.assert_allclose(made.centroids[0], x[easy].mean(axis=0))
    np.testing.assert_allclose(made.centroids[1], x[~easy & (c[:, 1] >= 0.7)].mean(axis=0))
    assert made.names.tolist() == [0, 1, 2]
    assert dimee.pools(x, np.ones_like(c), 0.7).names.tolist() == [0]
    assert dimee.pools(x, np.full_like(c, np.nan), 0.7).names.tolist() == [2]


def test_route_takes_the_nearest_and_the_easier_of_equals(rows):
    x, c, _ = rows
    made = dimee.pools(x, c, 0.7)
    nearest = [min((np.linalg.norm(row - centre), name) for centre, name in zip(made.centroids, made.names, strict=True))[1] for row in x]
    assert made.route(x).tolist() == nearest
    assert dimee.Pools(np.array([[0.0], [2.0]]), np.array([1, 2])).route([[1.0]]).tolist() == [1]
    assert made.route(np.empty((0, 2))).shape == (0,)


def test_all_easy_is_the_cascade_and_all_hard_the_cloud(rows):
    _, c, _ = rows
    cascade = [0 if row[0] >= 0.7 else 1 if row[1] >= 0.7 else 2 for row in c]
    assert dimee.last_tier(np.zeros(len(c), int), c, 0.7).tolist() == cascade
    assert set(dimee.last_tier(np.full(len(c), 2), c, 0.7)) == {2}
    assert set(dimee.last_tier(np.zeros(len(c), int), c, 1.01)) == {2}
    pool = np.arange(len(c)) % 3
    assert (dimee.last_tier(pool, c, 0.7) >= pool).all()


def test_search_finds_the_alpha_of_the_highest_reward(rows):
    x, c, _ = rows
    found, at = dimee.search_alpha(x, c, 10), np.arange(len(c))
    rewards = []
    for alpha in found.table[:, 0]:
        pool = dimee.pools(x, c, alpha).route(x)
        tier = dimee.last_tier(pool, c, alpha)
        rewards.append((c[at, tier] - dimee.path_cost(pool, tier)).mean())
    assert found.alpha == found.table[int(np.argmax(rewards)), 0]
    assert found.reward == pytest.approx(max(rewards))
    assert len(set(np.round(rewards, 6))) > 10  # the search had something to choose


def test_search_under_a_drop_takes_the_cheapest_that_keeps_it(rows):
    x, c, right = rows
    free, strict = (dimee.search_alpha(x, c, 10, correct=right, max_drop=d) for d in (1.0, 0.01))
    assert free.cost == free.table[:, 2].min()
    kept = strict.table[strict.table[:, 3] <= 0.01]
    assert strict.drop <= 0.01 and strict.cost == kept[:, 2].min() > free.cost


def test_alpha_is_searched_above_one_over_the_classes(rows):
    x, c, _ = rows
    assert dimee.search_alpha(x, c, 2).table[:, 0].min() > 0.5
    with pytest.raises(ValueError, match=r"candidates must lie in \(1/classes, 1\) = \(0.5, 1\)"):
        dimee.search_alpha(x, c, 2, candidates=[0.5])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x, c: dimee.pools(x, c[:5], 0.5), "same number of rows"),
        (lambda x, c: dimee.pools(x[:0], c[:0], 0.5), "at least one"),
        (lambda x, c: dimee.pools(x, c, 0.0), "alpha must be > 0, got 0.0"),
        (lambda x, c: dimee.pools(x * np.nan, c, 0.5), "embedding must be .* finite"),
        (lambda x, c: dimee.pools(x, c[:, :1], 0.5), r"confidence must be \[N, 2\]"),
        (lambda x, c: dimee.pools(x, c, 0.5).route(x[:, :1]), r"embedding must be \[B, 2\]"),
        (lambda x, c: dimee.last_tier(np.full(len(c), 3), c, 0.5), "pool must be"),
        (lambda x, c: dimee.path_cost([1], [0]), "tier must be"),
        (lambda x, c: dimee.path_cost([0], [0], layers=(6, 3, 12)), "l1 < l2 < L"),
        (lambda x, c: dimee.path_cost([0], [0], layer_cost=-1.0), ">= 0 and finite"),
        (lambda x, c: dimee.search_alpha(x, c, 1), "classes must be an int >= 2, got 1"),
        (lambda x, c: dimee.search_alpha(x, c, 10, max_drop=0.1), "belong together"),
        (lambda x, c: dimee.search_alpha(x, c, 10, correct=np.tile([0, 0, 1], (len(c), 1)), max_drop=0.0, candidates=[0.2]), "no candidate stays within"),
    ],
)
def test_bad_input_is_named(rows, call, words):
    with pytest.raises(ValueError, match=words):
        call(*rows[:2])
