# SPDX-License-Identifier: Apache-2.0
from collections import Counter

import pytest
import torch

from diffusers_learngene.runs.sampler import StepBatchSampler, seeded_generator


def batches(**changes):
    arguments = {"num_samples": 10, "batch_size": 4, "seed": 3, "num_steps": 10, **changes}
    return list(StepBatchSampler(**arguments))


def test_epochs_are_permutations_and_nothing_is_left_over():
    stream = [index for batch in batches() for index in batch]
    epochs = [stream[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_resuming_is_starting_later():
    sampler = StepBatchSampler(10, 4, seed=3, start_step=7, num_steps=10)
    assert list(sampler) == batches()[7:] and len(sampler) == 3
    assert list(StepBatchSampler(10, 4, seed=3, start_step=12, num_steps=10)) == []
    assert batches(seed=4) != batches()


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 4), (2, 2), (4, 1), (2, 1)])
def test_the_union_over_processes_does_not_depend_on_their_number(processes, accumulation):
    shards = [
        batches(process_index=index, num_processes=processes, accumulation=accumulation) for index in range(processes)
    ]
    size = 4 // (processes * accumulation)
    for step, whole in enumerate(batches()):
        micro_steps = range(step * accumulation, (step + 1) * accumulation)
        parts = [shards[process][micro] for micro in micro_steps for process in range(processes)]
        assert [index for part in parts for index in part] == whole
        assert {len(part) for part in parts} == {size}


def test_a_batch_may_be_larger_than_the_data_set():
    (batch,) = batches(num_samples=3, batch_size=7, num_steps=1)
    assert Counter(batch).most_common()[0][1] <= 3 and len(batch) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_processes": 3}, "batch_size=4 .* 3 processes"),
        ({"process_index": 1}, "process_index=1"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        batches(**changes)


def test_generators_are_functions_of_all_their_numbers():
    def draw(*numbers):
        return torch.rand(4, generator=seeded_generator(*numbers)).tolist()

    streams = {tuple(draw(*numbers)) for numbers in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0)]}
    assert len(streams) == 5 and draw(1, 2, 3) == draw(1, 2, 3)
