# SPDX-License-Identifier: Apache-2.0
"""Lives are computed by one thread: sums that several share end in other bits, and an evolution amplifies them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


__all__ = ["one_torch_thread"]


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch uses one thread of the CPU here, whatever it used before and will use again; also a decorator."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
