# SPDX-License-Identifier: Apache-2.0
"""The methods of which a learngene can be: what `functional/` computes, in the words of the artefact.

Every method makes the matrix of a layer from a *bank* and a *scaler*:

    WAVE   bank: templates (N, w1, w2)       scaler (N, a, b) of every matrix   size of a bank: [N, w1, w2]
    FINE   bank: u (m1, r), v (m2, r)        sigma (r,) of every layer          size of a bank: [r]
    KIND   bank: u (L, m1, r), v (L, m2, r)  sigma (r,) of every layer          size of a bank: [learngenes, tailors]

WAVE's and FINE's banks are shared by all layers of a group, the scaler being a few numbers of the layer's own. Such a
bank is the learngene proper: no depth changes it, and widths change it by cutting or repeating channels at most. In
KIND, nothing is shared over layers, of which each has its own slice of the bank (`per_layer`). What is shared there is
the first components, by all classes; so it is classes that can be left out and added, not layers and channels.

Here lives one file a method, after `protocol.Method`, and the table of all. What a method is to PEFT is in `tuners/`,
its arithmetic in `functional/`; neither belongs here.
"""

from ...tuners.base_config import LearngeneConfig
from .fine import FINE
from .kind import KIND
from .protocol import Bank, Method, Resize, Shape, Sizes, Start
from .wave import WAVE


__all__ = ["METHODS", "Bank", "Method", "Resize", "Shape", "Sizes", "Start", "method_of"]

METHODS: dict[str, Method] = {method.name: method for method in (WAVE(), FINE(), KIND())}


def method_of(config: LearngeneConfig) -> Method:
    """The method that a config is of.

    Raises:
        ValueError: of none that makes learngenes.
    """
    for method in METHODS.values():
        if isinstance(config, method.config_cls):
            return method
    kinds = ", ".join(method.config_cls.__name__ for method in METHODS.values())
    raise ValueError(f"config={config!r} must be one of {kinds}.")
