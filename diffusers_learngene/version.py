# SPDX-License-Identifier: Apache-2.0
"""The version, apart from the package's `__init__`, so that the lowest floor can name it."""

__version__ = "0.1.0"
