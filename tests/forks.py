# SPDX-License-Identifier: Apache-2.0
"""Child processes that have imported all that this one has: a new one would take seconds for that."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any


def forked(function: Callable, *arguments: object) -> tuple[BaseProcess, Connection]:
    """A child that runs `function(connection, *arguments)`, and our end of the connection."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=function, args=(there, *arguments), daemon=True)
    child.start()
    there.close()
    return child, here


def together(function: Callable, *arguments: object, number: int = 2) -> list[Any]:
    """What `function(*arguments)` returns in each of so many processes of one group, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [forked(_ranked, rank, number, port, function, arguments) for rank in range(number)]
    outcomes = [connection.recv() for _, connection in children]
    for child, _ in children:
        child.join()
    assert not any(error for _, error in outcomes), "\n".join(error or "" for _, error in outcomes)
    return [value for value, _ in outcomes]


def _ranked(
    connection: Connection, rank: int, number: int, port: int, function: Callable, arguments: tuple[object, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        connection.send((function(*arguments), None))
    except BaseException:
        connection.send((None, traceback.format_exc()))
