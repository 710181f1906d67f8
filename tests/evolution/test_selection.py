# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from diffusers_learngene.evolution.selection import ancestor_credit, draw, tournament
from diffusers_learngene.runs.sampler import seeded_generator


def test_the_fittest_of_every_group_wins():
    assert tournament([1, 3, 2, 9, 8, 7, 5], 3) == [1, 3, 6]
    assert tournament([1, 3, 2, 9, 8, 7, 5], 3, order=[6, 0, 1, 2, 3, 4, 5]) == [6, 3, 5]
    assert tournament([2, 2, 1], 3) == [0]
    assert tournament([2, 1], 1) == [0, 1]
    assert len(tournament([0.0] * 50, 3)) == 17  # the paper's 50 newborns


@pytest.mark.parametrize(
    ("fitness", "size", "order", "message"),
    [
        ([1.0], 0, None, "size=0"),
        ([1.0, math.nan], 2, None, "NaN"),
        ([1.0, 2.0], 2, [0, 0], "permutation"),
    ],
)
def test_a_tournament_that_nobody_can_win_is_refused(fitness, size, order, message):
    with pytest.raises(ValueError, match=message):
        tournament(fitness, size, order)


def test_credit_falls_up_the_tree():
    e = math.e
    assert ancestor_credit(2.0, [0.5, 0.25]) == pytest.approx([2 / e, 0.5 * 2 / e**2, 0.25 * 2 / e**4])
    assert ancestor_credit(2.0, []) == pytest.approx([2 / e])
    assert ancestor_credit(1.0, [1, 1, 1], beta=0.5) == [0.5, 0.25, 0.0625, 0.5**8]


def test_draws_are_in_proportion_and_repeatable():
    draws = [draw([1, 0, 3], seeded_generator(0, index)) for index in range(2000)]
    assert draws == [draw([1, 0, 3], seeded_generator(0, index)) for index in range(2000)]
    assert draws.count(1) == 0 and draws.count(2) / 2000 == pytest.approx(0.75, abs=0.03)
    assert {draw([0, 0], seeded_generator(1, index)) for index in range(50)} == {0, 1}
    for weights in ([], [-1, 2], [math.nan], [math.inf]):
        with pytest.raises(ValueError, match="finite numbers from 0"):
            draw(weights, seeded_generator(0))
