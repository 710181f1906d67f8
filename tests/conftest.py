# SPDX-License-Identifier: Apache-2.0
"""All tests, and all processes that they start, talk to the stand-in of `hub_stub.py` instead of the Hub."""

import os
import shutil
import sys
import tempfile

import pytest

from hub_stub import Hub


assert "huggingface_hub" not in sys.modules, "huggingface_hub reads its endpoint at import: set it before"
_HUB = Hub()
_HOME = tempfile.TemporaryDirectory(prefix="learngene_hf_home_")
os.environ.update(
    HF_ENDPOINT=_HUB.url,
    HF_HOME=_HOME.name,
    HF_TOKEN="hf_test",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_UPDATE_CHECK="1",
    HF_UPDATE_DOWNLOAD_COUNTS="0",
    DISABLE_TELEMETRY="1",
    NO_PROXY="127.0.0.1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",  # models this small are not worth a second thread, and there is a test process for every core
    OMP_WAIT_POLICY="passive",
)
for variable in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_TOKEN_PATH"):
    os.environ.pop(variable, None)


@pytest.fixture
def hub():
    """An empty Hub, and an empty cache of it. `with hub.down():` takes it off the network."""
    _HUB.reset()
    shutil.rmtree(os.path.join(_HOME.name, "hub"), ignore_errors=True)
    return _HUB
