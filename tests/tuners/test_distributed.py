# SPDX-License-Identifier: Apache-2.0
"""Two processes: outputs and gradients are those of one (`distributed.py` holds the checks)."""

import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What the first process printed, by check; both have to end well."""
    init_file = tmp_path_factory.mktemp("group") / "init"
    command = [sys.executable, str(Path(__file__).with_name("distributed.py"))]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(init_file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return outputs


@pytest.mark.parametrize("method", ["wave", "fine", "kind"])
@pytest.mark.parametrize("mode", ["add", "generate"])
@pytest.mark.parametrize("check", ["ddp-mlp", "ddp-dit", "checkpointed-dit", "fsdp2-mlp", "fsdp2-dit"])
def test_two_processes(check, method, mode, outcomes):
    for output in outcomes:
        assert f"{check}-{method}-{mode} ok\n" in output, output
