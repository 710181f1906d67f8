# SPDX-License-Identifier: Apache-2.0
"""Two processes: outputs and gradients are those of one (`distributed.py` holds the checks)."""

import pytest

from forks import together
from tuners.distributed import check_all


@pytest.fixture(scope="module")
def outcomes():
    """What either process found, by check."""
    return together(check_all)


@pytest.mark.parametrize("method", ["wave", "fine", "kind"])
@pytest.mark.parametrize("mode", ["add", "generate"])
@pytest.mark.parametrize("check", ["ddp-mlp", "ddp-dit", "checkpointed-dit", "fsdp2-mlp", "fsdp2-dit"])
def test_two_processes(check, method, mode, outcomes):
    for outcome in outcomes:
        assert outcome[f"{check}-{method}-{mode}"] == "ok"
