# SPDX-License-Identifier: Apache-2.0
"""What others do to start a model of another size; what a learngene is compared with.

Here lives one function each, of one signature, `initializer(ancestry, overrides, ...) -> nn.Module`: a plain model of
the ancestry's class whose config is the ancestry's with `overrides`. Not here: training what they made (`training/`).
"""

from ..anatomy.scratch import scratch
from .selection import selection


__all__ = ["scratch", "selection"]
