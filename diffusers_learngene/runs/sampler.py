# SPDX-License-Identifier: Apache-2.0
"""Which samples and which random numbers an optimiser step uses: pure functions of (seed, step).

Nothing here has a state, so nothing needs saving: to resume at step k is to start at step k. A step's batch is cut
into shards, one per process and accumulation micro-step; both the samples and the random numbers belong to the shard,
whichever process computes it. Hence 2 processes compute what 1 process computes with twice the accumulation.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


__all__ = ["StepBatchSampler", "derived_seed", "seeded_generator"]


def derived_seed(*numbers: int) -> int:
    """A seed made of whole numbers >= 0, such as (seed, step, shard): each tuple gives another, on any machine."""
    # The length goes in, because SeedSequence takes (1, 0) for (1).
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0])


def seeded_generator(*numbers: int) -> torch.Generator:
    """A CPU generator with `derived_seed(*numbers)`."""
    return torch.Generator().manual_seed(derived_seed(*numbers))


class StepBatchSampler(Sampler[list[int]]):
    """Yields, for each step from `start_step` up to `num_steps`, this process's `accumulation` shards of its batch.

    The samples of all steps form one endless stream of seeded permutations of the data set, one permutation per epoch;
    step s takes the positions [s * batch_size, (s + 1) * batch_size). So every sample is used once per epoch, none is
    left over at its end, and a batch may be larger than the data set.

    Args:
        num_samples: The length of the data set.
        batch_size: Samples per optimiser step, over all processes and micro-steps.
        seed: Of the permutations.
        start_step: The first step; 0, or the steps done before resuming.
        num_steps: The step to stop before: the length of the whole training.
        process_index, num_processes: This process among those that share each step.
        accumulation: Micro-steps per optimiser step.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        num_steps: int,
        start_step: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        accumulation: int = 1,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples}: there is nothing to train on.")
        if batch_size < 1 or batch_size % (num_processes * accumulation):
            raise ValueError(
                f"batch_size={batch_size} must be a positive multiple of {num_processes} processes x {accumulation} "
                "micro-steps."
            )
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index={process_index} must lie in [0, {num_processes}).")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.start_step, self.num_steps = start_step, num_steps
        self.process_index, self.num_processes, self.accumulation = process_index, num_processes, accumulation
        self._epoch, self._order = -1, list[int]()

    def __len__(self) -> int:
        return max(0, self.num_steps - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_size // (self.num_processes * self.accumulation)
        for step in range(self.start_step, self.num_steps):
            batch = self.batch(step)
            for micro_step in range(self.accumulation):
                shard = micro_step * self.num_processes + self.process_index
                yield batch[shard * size : (shard + 1) * size]

    def batch(self, step: int) -> list[int]:
        """The `batch_size` indices of one step, over all processes."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._permutation(p // self.num_samples)[p % self.num_samples] for p in positions]

    def _permutation(self, epoch: int) -> list[int]:
        if epoch != self._epoch:  # the last one is kept
            self._order = torch.randperm(self.num_samples, generator=seeded_generator(self.seed, epoch)).tolist()
            self._epoch = epoch
        return self._order
