# SPDX-License-Identifier: Apache-2.0
"""Names that an adapter cannot have, because PEFT finds an adapter's name in the names of its tensors."""

from torch import nn


_TENSORS = {"weight", "bias", "templates", "u", "v"}


def check_adapter_name(name: str, model: nn.Module, prefix: str) -> None:
    """Refuse a name that occurs in the names of tensors anyway: saving would drop or rename some of them.

    Args:
        model: that is to get the adapter; it may have others.
        prefix: with which the attributes of the method's layers start.

    Raises:
        ValueError: the name is empty, has a dot in it, or is the name of a module or of a tensor of the adapter.
    """
    adapters = {key for module in model.modules() if isinstance(module, nn.ModuleDict) for key in module}
    words = {word for path, _ in model.named_modules() for word in path.split(".")} - adapters
    if not name or "." in name or name in words | _TENSORS or name.startswith(prefix):
        raise ValueError(
            f"adapter_name={name!r} cannot be told from the names of modules and tensors in a file: it must be none "
            "of these, nor be empty or have a dot. Choose another."
        )
