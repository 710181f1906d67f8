# SPDX-License-Identifier: Apache-2.0
"""Child processes that have imported all that this one has: a new one would take seconds for that."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess


def forked(function: Callable, *arguments: object) -> tuple[BaseProcess, Connection]:
    """A child that runs `function(connection, *arguments)`, and our end of the connection."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=function, args=(there, *arguments), daemon=True)
    child.start()
    there.close()
    return child, here
