# SPDX-License-Identifier: Apache-2.0
"""The numbers of section 3 of the method, for the ant's network."""

import math
from dataclasses import replace

import pytest

from diffusers_learngene.evolution.grl.genes import gene_size, gene_types, layer_sizes, overlap
from diffusers_learngene.evolution.grl.network import actor_shapes
from diffusers_learngene.evolution.grl.pool import (
    LEAST_FITNESS,
    Entry,
    Parentage,
    age,
    best_entry,
    draw_birth,
    draw_filing,
    first_pool,
    merge,
    pay,
    relative_scores,
    type_probabilities,
)
from diffusers_learngene.runs.sampler import seeded_generator


SIZES = layer_sizes(actor_shapes(27, 8))
E = math.e


@pytest.fixture
def pool():
    return first_pool(dict.fromkeys(range(17), 2.0), 7, SIZES, seeded_generator(0))


def test_the_first_pool(pool):
    assert len(pool) == 15 * 7 and len({entry.id for entry in pool}) == 105 and len({e.agent for e in pool}) == 17
    assert all(entry.score == 2 / gene_size(entry.gene_type, SIZES) for entry in pool)


def test_probabilities_of_equal_scores_are_the_papers(pool):
    found = type_probabilities(pool)
    assert sum(found.values()) == pytest.approx(1)
    expected = {(0, 5): 0.088, (2, 5): 0.074, (0, 3): 0.067, (1, 4): 0.058}
    for gene_type, value in expected.items():
        assert found[gene_type] == pytest.approx(value, abs=5e-4)


def test_relative_scores():
    found = relative_scores([10, 5, 4, 1], [0, 0, 1, 1], [2, 2, 2, 4])
    assert found == pytest.approx([1 * 5 / 2, 0.5 * 5 / 2, 1 * 5 / 2, 0.25 * 5 / 4])


@pytest.mark.parametrize("fitness", [[0.0, 0.0], [-5.0, -3.0], [-5.0, 3.0]])
def test_worthless_lives_leave_positive_finite_scores(fitness):
    """The authors' code divides by zero, or weighs with negative numbers."""
    scores = relative_scores(fitness, [0, 0], [64.0, 64.0])
    assert all(0 < score < math.inf for score in scores) and scores[0] <= scores[1]
    assert LEAST_FITNESS > 0


def test_births_follow_the_scores():
    """Of types and, within a type, of fathers; tasks are uniform."""
    pool = [Entry(0, 10, (0, 1), 1.0), Entry(1, 11, (0, 1), 3.0), Entry(2, 12, (4, 5), 12.0)]
    births = [draw_birth(pool, 4, seeded_generator(0, index)) for index in range(4000)]
    shares = [sum(birth.father.id == id for birth in births) / 4000 for id in range(3)]
    assert shares == pytest.approx([1 / 16, 3 / 16, 12 / 16], abs=0.025)
    assert [sum(birth.task == task for birth in births) / 4000 for task in range(4)] == pytest.approx(
        [0.25] * 4, abs=0.03
    )


def test_credit_up_a_tree_of_three_levels():
    """Agent 3 inherited (0, 1) of 2, which inherited (1, 2) of 1, which inherited (1, 2) of 0, of the first."""
    parents = {
        0: Parentage(),
        1: Parentage((1, 2), entry=0, father=0),
        2: Parentage((1, 2), entry=1, father=1),
        3: Parentage((0, 1), entry=2, father=2),
    }
    pool = [Entry(id, id, (1, 2), 1.0) for id in range(3)] + [Entry(7, 5, (1, 2), 1.0)]
    paid = pay(pool, {3: 2.0}, parents, SIZES)
    near, far = overlap((0, 1), (1, 2), SIZES), overlap((1, 2), (1, 2), SIZES)
    assert far == 1
    gains = [entry.score - 1 for entry in paid]
    assert gains == pytest.approx([2 * far / E**4, 2 * near / E**2, 2 / E, 0])
    # The weight is replaced at each step, not multiplied; and credits of several survivors add up.
    twice = pay(pool, {3: 2.0, 2: 1.0}, parents, SIZES)
    assert twice[1].score - paid[1].score == pytest.approx(1 / E)
    assert twice[0].score - paid[0].score == pytest.approx(1 / E**2)


def test_entries_of_one_agent_have_their_own_scores():
    parents = {0: Parentage(), 1: Parentage((0, 1), entry=4, father=0)}
    paid = pay([Entry(4, 0, (0, 1), 1.0), Entry(5, 0, (2, 3), 1.0)], {1: 1.0}, parents, SIZES)
    assert [entry.score for entry in paid] == pytest.approx([1 + 1 / E, 1.0])


def test_ageing(pool):
    assert [entry.score for entry in age(pool)] == [0.6 * entry.score for entry in pool]


def test_a_type_is_kept_with_probability_one_plus_p_over_two(pool):
    probabilities = type_probabilities(pool)
    filed = [draw_filing((0, 5), probabilities, seeded_generator(1, index)) for index in range(4000)]
    assert filed.count((0, 5)) / 4000 == pytest.approx((1 + probabilities[0, 5]) / 2, abs=0.025)
    assert filed.count((1, 2)) / 4000 == pytest.approx(probabilities[1, 2] / 2, abs=0.01)


def test_merge_keeps_the_size_and_only_two_places_are_open():
    pool = [Entry(id, id, (0, 1), float(10 - id)) for id in range(7)]  # scores 10 ... 4
    pool += [Entry(10 + id, id, (2, 3), 1.0) for id in range(7)]
    new = [Entry(20 + id, 20 + id, (0, 1), score) for id, score in enumerate((4.5, 20.0, 30.0, 0.1))]
    merged = merge(pool, new)
    assert [entry.id for entry in merged if entry.gene_type == (0, 1)] == [0, 1, 2, 3, 4, 22, 21]
    assert [entry for entry in merged if entry.gene_type == (2, 3)] == pool[7:]
    weak = merge(pool, [Entry(30, 30, (0, 1), 4.5)])
    assert sorted(entry.id for entry in weak if entry.gene_type == (0, 1)) == [0, 1, 2, 3, 4, 5, 30]
    assert merge(pool, [Entry(30, 30, (0, 1), 0.1)]) == pool
    assert len(merge(pool, [Entry(40 + index, 0, t, 5.0) for index, t in enumerate(gene_types())])) == len(pool)


def test_the_answer_is_of_the_most_probable_type():
    pool = [Entry(0, 0, (0, 1), 5.0), Entry(1, 1, (2, 3), 3.0), Entry(2, 2, (2, 3), 4.0)]
    assert best_entry(pool).id == 2
    assert best_entry([*pool, replace(pool[0], id=3)]).id == 0
