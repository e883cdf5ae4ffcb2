"""Work in a thread that keeps no process alive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T], name: str) -> Future[T]:
    """Do ``work`` in a thread of its own; what it returns or raises is the future's.

    An executor's threads are joined when the interpreter ends, so that Ctrl-C would hang for as long as the work does; nobody waits for
    this one.

    Args:
        work: Calls no collective: they would cross those of the main thread.
        name: Of the thread.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # handed to whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name=name).start()
    return future
