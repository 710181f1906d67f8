# SPDX-License-Identifier: Apache-2.0
"""Who comes into the pool, who leaves it, and what the ancestors get."""

from dataclasses import replace

import pytest
import torch

from diffusers_learngene.evolution.gtl.options import EvolutionOptions
from diffusers_learngene.evolution.gtl.pool import Entry, diversity, draw_parent, next_pool, score_of
from diffusers_learngene.evolution.lineage import Individual, Lineage


OPTIONS = EvolutionOptions(alpha=0.5, beta=0.25, pool_size=9, tournament_size=2)


def family():
    """Of four newborns one, #8, has a parent, #1, and a grandparent, #0; their mutations left different shares."""
    lineage = Lineage()
    lineage.add(Individual(0, 0, None, 0.5, {"overlap": 1.0}))
    lineage.add(Individual(1, 1, 0, 0.5, {"overlap": 0.5}))
    for id, parent in ((8, 1), (9, None), (10, None), (11, None)):
        lineage.add(Individual(id, 2, parent, 0.0, {"overlap": 0.75}))
    return lineage, [Entry(id, 1.0 if id == 8 else 0.0, {}) for id in (8, 9, 10, 11)]


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_fittest_win_and_their_ancestors_get_credit():
    """A tournament of two in an order that is drawn; a grandparent in the pool, and no parent there."""
    lineage, newborns = family()
    scores = {entry.id: entry.score for entry in next_pool([Entry(0, 1.0, {})], newborns, lineage, OPTIONS, draws())}
    assert scores[8] == 1.0 and len(scores) == 3
    # 0.5 x its score, and beta^2 x score x what #1, whose mutation is between what #1 and #8 inherited, left
    assert scores[0] == pytest.approx(0.5 * 1.0 + 0.25**2 * 1.0 * 0.5)


def test_credit_up_a_tree_of_four_levels():
    """As in GRL's rule: the winner's own mutation counts for nobody, and of the first ancestor there is none."""
    lineage = Lineage()
    for id, left in enumerate((1.0, 0.9, 0.8, 0.7)):
        lineage.add(Individual(id, id, id - 1 if id else None, 0.5, {"overlap": left}))
    options = replace(OPTIONS, alpha=1.0, beta=0.5, tournament_size=1)
    pool = next_pool([Entry(id, 1.0, {}) for id in range(3)], [Entry(3, 2.0, {})], lineage, options, draws())
    gains = {entry.id: entry.score - 1 for entry in pool}
    assert gains == pytest.approx({3: 1, 2: 0.5 * 2, 1: 0.25 * 2 * 0.8, 0: 0.0625 * 2 * 0.9})


def test_of_two_that_are_worse_than_chance_the_better_wins():
    """And comes in with the score 0: it gets no children while others do better, and pays no ancestor."""
    lineage = family()[0]
    for seed in range(5):
        newborns = [Entry(8, score_of(0.19, 5), {}), Entry(9, score_of(0.05, 5), {})]
        pool = next_pool([Entry(0, 1.0, {})], newborns[:: (-1) ** seed], lineage, OPTIONS, draws(seed))
        assert [(entry.id, entry.score) for entry in pool] == [(0, 0.5), (8, 0.0)]


def test_the_best_stay():
    lineage, newborns = family()
    pool = [Entry(0, 0.1, {}), Entry(1, 0.9, {})]
    left = next_pool(pool, newborns, lineage, replace(OPTIONS, pool_size=2), draws())
    assert [entry.id for entry in left] == [8, 1]
    assert left[1].score == pytest.approx(0.5 * 0.9 + 0.25 * 1.0)


def test_random_selection_knows_no_scores():
    lineage, newborns = family()
    options = replace(OPTIONS, selection="random")
    pools = [next_pool([Entry(0, 0.0, {})], newborns, lineage, options, draws(seed)) for seed in range(20)]
    assert all(entry.score == 1.0 for pool in pools for entry in pool)
    assert {8 in {entry.id for entry in pool} for pool in pools} == {True, False}


def test_scores_and_parents():
    assert [score_of(value, 5) for value in (0.1, 0.2, 0.6, 1.0)] == pytest.approx([-0.125, 0, 0.5, 1])
    pool = [Entry(0, 0.0, {}), Entry(1, 0.25, {}), Entry(2, 0.75, {})]
    generator = draws()
    drawn = [draw_parent(pool, generator).id for _ in range(2000)]
    assert drawn.count(2) / 2000 == pytest.approx(0.75, abs=0.03) and 0 not in drawn
    assert draw_parent([], generator) is None


def test_diversity():
    one, other = {"w": torch.tensor([1.0, 0]).view(1, 2, 1, 1)}, {"w": torch.tensor([0, 1.0]).view(1, 2, 1, 1)}
    assert diversity([one, one, one]) == pytest.approx(0) and diversity([one, other]) == pytest.approx(1)
