# SPDX-License-Identifier: Apache-2.0
"""Elastic condensing: distil one learngene so that it makes a working model of *every* size at once.

The closed form (`Learngene.condense`) is only a start. From there the papers distil one auxiliary model of the
ancestry's size. We draw the student's depth and width anew at every step: all sizes share the templates, all depths of
a width share scalers, biases and embedders. What comes out needs no training after `descend`, because every size was
trained already (compare slimmable and once-for-all networks, which keep the full dense weights for that).
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.func import functional_call

from ..layout import resize_tensors, unstack
from ..learngene import Learngene
from ..models import empty_model, override_config


class ElasticModel(nn.Module):
    """A learngene as a trainable module: `forward(size, ...)` runs its descendant of that size.

    The parameters are the tensors of the learngene; the weights of a size are made from them by the very functions
    that `Learngene.descend` uses, so a descendant computes what was trained here.

    Args:
        learngene: where the tensors start; it is not changed (see `learngene()`).
        sizes: config overrides of every size that can be asked for, by index.

    Raises:
        ValueError: a size whose width the learngene holds no tensors for (give it to `Learngene.condense(widths=)`).
    """

    def __init__(self, learngene: Learngene, sizes: Sequence[dict]) -> None:
        super().__init__()
        self.origin, self.sizes = learngene, list(sizes)
        self.tensors = nn.ParameterDict(
            {_encode(key): nn.Parameter(t.clone()) for key, t in learngene.tensors.items()}
        )
        self._plans = []
        for overrides in self.sizes:
            architecture = learngene.config.architecture
            config = override_config(architecture, learngene.config.base_config, overrides)
            target = learngene.layout(config)
            width = learngene.width_of(target)
            if width is None:
                raise ValueError(
                    f"sizes: the learngene holds no tensors for the width of {overrides}: give it in widths=."
                )
            skeleton = empty_model(architecture, config)
            self._plans.append((width, learngene.layouts[width], target, [skeleton]))  # listed: not a submodule

    def forward(self, size: int, *args: object, **kwargs: object) -> object:
        width, source, target, (skeleton,) = self._plans[size]
        device = next(iter(self.tensors.values())).device
        for buffer in skeleton.buffers():
            if buffer.device != device:
                buffer.data = buffer.data.to(device)
        state = (
            unstack(resize_tensors(self._named(f"sizes.{width}."), source, target, templates), target, templates)
            if (templates := self._named("templates."))
            else {}
        )
        skeleton.train(self.training)
        return functional_call(skeleton, state, args, kwargs)

    def _named(self, prefix: str) -> dict[str, Tensor]:
        start = _encode(prefix)
        return {_decode(key.removeprefix(start)): t for key, t in self.tensors.items() if key.startswith(start)}

    def param_groups(self, learning_rate: float, scaler_learning_rate: float) -> list[dict]:
        """AdamW groups: templates and everything dense at one rate, scalers at a higher one, no weight decay.

        A scaler's gradient sums over a whole tile, and there are few of them: they can and must move faster.
        """
        scalers = [t for key, t in self.tensors.items() if "/scalers/" in key]
        others = [t for key, t in self.tensors.items() if "/scalers/" not in key]
        return [
            {"params": others, "lr": learning_rate, "weight_decay": 0.0},
            {"params": scalers, "lr": scaler_learning_rate, "weight_decay": 0.0},
        ]

    def learngene(self) -> Learngene:
        """The learngene with its tensors as they are now, and the sizes that it was condensed for."""
        config = self.origin.config
        tensors = {_decode(key): t.detach().float().cpu().clone() for key, t in self.tensors.items()}
        return Learngene(type(config)(**{**vars(config), "condensed_for": self.sizes}), tensors)


def _encode(key: str) -> str:
    return key.replace(".", "/")


def _decode(key: str) -> str:
    return key.replace("/", ".")
