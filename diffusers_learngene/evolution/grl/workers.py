# SPDX-License-Identifier: Apache-2.0
"""Lives side by side: on all cores of a machine, and on all processes that accelerate has started.

A life is a pure function of its `Job`, so it does not matter who lives it: any number of workers, processes and
machines (of one kind: the last bits of a product differ between kinds of processors) give the same evolution. Each
worker is a process of its own, and a life has one thread: products of 48 columns are not worth a second one.
"""

import multiprocessing
import multiprocessing.context
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .life import Life, LifeConfig, Statistics, live
from .network import Actor


__all__ = ["Job", "Workers"]


@dataclass(frozen=True)
class Job:
    """The arguments of `life.live`."""

    config: LifeConfig
    task: str
    seed: int
    inherited: Actor | None = None
    statistics: Statistics | None = None

    def run(self) -> Life:
        return live(self.config, self.task, self.seed, self.inherited, self.statistics)


def _end_with_the_parent() -> None:
    """Let this worker end as soon as the process that started it has, however that ended: killed, it says no goodbye,
    and workers would live on to the end of their lives and then wait for others for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _context() -> multiprocessing.context.BaseContext:
    """How workers are started: not by fork, as torch has threads by now, but by a server that has imported what a life
    needs and has none, where there is such a thing. That takes seconds once, and not for every worker."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([Life.__module__])
    return context


class Workers:
    """Runs jobs; a context manager, because it holds processes.

    Args:
        number: of worker processes for each process of `accelerator`; 1: no further one, lives run in this process.

    Raises:
        ValueError: number < 1.
    """

    def __init__(self, accelerator: Accelerator, number: int) -> None:
        if number < 1:
            raise ValueError(f"num_workers={number} must be at least 1.")
        self.accelerator, self.number = accelerator, number
        self.steps_per_second = 0.0  # of the latest `run`, over all processes
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        if self.number > 1:
            self._pool = ProcessPoolExecutor(self.number, _context(), initializer=_end_with_the_parent)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, jobs: Sequence[Job], name: str) -> list[Life]:
        """The lives of these jobs, in their order, on every process.

        Args:
            name: for the progress bar.

        Raises:
            RuntimeError: a worker process was killed.
        """
        begin = time.perf_counter()
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = range(rank, len(jobs), processes)
        hidden = not self.accelerator.is_main_process
        with tqdm(total=len(mine), desc=name, unit="life", disable=hidden, leave=False) as bar:
            lives = self._run([jobs[index] for index in mine], bar)
        everyone = (
            dict(gather_object(list(zip(mine, lives, strict=True)))) if processes > 1 else dict(enumerate(lives))
        )
        ordered = [everyone[index] for index in range(len(jobs))]
        self.steps_per_second = sum(life.steps for life in ordered) / (time.perf_counter() - begin)
        return ordered

    def _run(self, jobs: Sequence[Job], bar: tqdm) -> list[Life]:
        if self._pool is None:
            lives = []
            for job in jobs:
                lives.append(job.run())
                bar.update()
            return lives
        try:
            futures: list[Future[Life]] = [self._pool.submit(job.run) for job in jobs]
            for future in futures:
                future.add_done_callback(lambda _: bar.update())
            wait(futures, return_when=FIRST_EXCEPTION)
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"One of the {self.number} worker processes died, perhaps killed for lack of memory. All before this "
                "generation is saved: --resume_from_checkpoint latest goes on, perhaps with fewer --num_workers."
            ) from error
