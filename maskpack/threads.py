"""Work in threads, with results in order, and progress."""

import _thread
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import wraps
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

Progress = Callable[[int, int], None]  # weights done, weights in all
WORKERS = min(os.cpu_count() or 1, 8)
AHEAD = 1 << 27  # weights in work or waiting at one time; codecs need a small multiple of that in bytes


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    weights: Callable[[Item], int],
    worth: int,
    workers: int | None = None,
) -> Iterator[Result]:
    """Do work on items in threads and yield the results in the items' order.

    At most `AHEAD` weights, or one item, are ahead of the consumer. Items are made in the consumer's thread. An error
    is raised where its result would come. A consumer that stops early, or Ctrl-C, ends the threads.

    Args:
        weights: size of an item. worth: size from which an item gets a thread, which costs some 50 microseconds.
        workers: number of threads; None stands for `WORKERS`.
    """
    workers = workers or WORKERS
    if workers == 1:
        yield from map(work, items)
        return
    tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
    ended: SimpleQueue[None] = SimpleQueue()

    def serve() -> None:
        while (task := tasks.get()) is not None:
            task()
            del task
        ended.put(None)

    ahead = threads = 0
    waiting: deque[tuple[Callable[[], Result], int]] = deque()
    try:
        for item in items:
            size = weights(item)
            if size < worth and not waiting:
                yield work(item)
                continue
            while waiting and (ahead + size > AHEAD or len(waiting) >= 2 * workers):
                first, its_size = waiting.popleft()
                yield first()
                ahead -= its_size
            task, result = _task(work, item)
            tasks.put(task)
            waiting.append((result, size))
            if threads < workers:
                _thread.start_new_thread(serve, ())
                threads += 1
            ahead += size
            del item, task
        while waiting:
            yield waiting.popleft()[0]()
    finally:
        with suppress(Empty):
            while True:
                tasks.get_nowait()
        for _ in range(workers):  # a thread may have been started and, interrupted, not counted
            tasks.put(None)
        for _ in range(threads):
            ended.get()


def in_thread(work: Callable[[], Result]) -> Callable[[], Result]:
    """Start work in a thread; return a function that waits for its result, or raises its error."""
    task, result = _task(lambda _: work(), None)
    _thread.start_new_thread(task, ())
    return result


def _task(work: Callable[[Item], Result], item: Item) -> tuple[Callable[[], None], Callable[[], Result]]:
    """Return a function that does work on an item, and one that waits for the result.

    Queues and threads here are implemented in C: Ctrl-C at the wrong moment locks those in Python for ever.
    """
    answer: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def do() -> None:
        try:
            answer.put((work(item), None))
        except BaseException as error:
            answer.put((None, error))

    def result() -> Result:
        found, error = answer.get()
        if error is not None:
            raise error
        return found  # type: ignore[no-any-return]

    return do, result


def once(make: Callable[[], Result]) -> Callable[[], Result]:
    """Decorator: make a constant at the first call; threads that call at the same time all get the same object.

    `functools.cache` makes one for each of them and keeps the last, so that an address in another one dangles.
    """
    kept = dict[str, Result]()

    @wraps(make)
    def found() -> Result:
        return kept["made"] if kept else kept.setdefault("made", make())

    return found


def counted(progress: Progress | None, totals: Iterable[int]) -> Callable[[int], None]:
    """Return a function that adds up the weights done and reports them to `progress`, with the sum of `totals`."""
    if progress is None:
        return lambda weights: None
    done, total = 0, sum(totals)

    def step(weights: int) -> None:
        nonlocal done
        done += weights
        progress(done, total)

    return step
