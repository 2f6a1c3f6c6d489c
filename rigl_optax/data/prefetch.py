"""Makes batches in threads before the training loop asks for them."""

import collections
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def prefetch(
    make: Callable[[int], T], first: int, end: int, depth: int = 2
) -> Iterator[Iterator[T]]:
    """Calls `make(first)`, ..., `make(end - 1)` ahead of time and yields the results in order.

    A batch is a function of its step, so any thread can make any batch, and there is no state to
    save or restore. An exception in `make(step)` is raised in the loop when it reaches that step.

    Args:
      make: `make(step) -> batch`; called from `depth` threads at the same time.
      first: First step.
      end: One after the last step.
      depth: How many batches are in flight: being made, or made and not yet taken.

    Yields:
      An iterator over the batches. When the context ends, calls that have not started are
      cancelled and those that have are waited for.
    """
    pool = ThreadPoolExecutor(depth, thread_name_prefix="prefetch")
    steps = iter(range(first, end))
    pending: collections.deque[Future[T]] = collections.deque()

    def submit_next() -> None:
        for step in steps:
            pending.append(pool.submit(make, step))
            return

    def results() -> Iterator[T]:
        for _ in range(depth):
            submit_next()
        while pending:
            result = pending.popleft().result()
            submit_next()
            yield result

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)
