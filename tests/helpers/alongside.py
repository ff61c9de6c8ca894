"""Work beside a test, in a thread: what goes wrong there ends the test at once, whatever its main thread waits for."""

import signal
import threading
from contextlib import contextmanager

JOIN = 200  # seconds that the work may take once the body has ended; longer than what it waits for itself


class BesideError(BaseException):
    """Thrown into the main thread; no `except Exception` on the way may swallow it."""


@contextmanager
def alongside(work, join=JOIN):
    """Run `work()` in a thread while the body of the `with` runs in the main thread.

    Args:
        work: called without arguments.
        join: seconds to wait for it after the body.

    Raises:
        BaseException: what `work` raised; the body is interrupted in whatever it does.
        TimeoutError: `work` goes on although the body has ended.
    """
    failures, main, in_body = [], threading.main_thread().ident, threading.Event()

    def interrupt(*_):
        if in_body.is_set():
            in_body.clear()
            raise BesideError

    def guarded():
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - SystemExit, too, would end the thread without a word
            failures.append(error)
            signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    thread = threading.Thread(target=guarded, daemon=True, name="alongside")
    try:
        in_body.set()
        thread.start()
        try:
            yield
        except BesideError:
            raise failures[0] from None
        finally:
            in_body.clear()
        thread.join(join)
        if failures:
            raise failures[0]
        if thread.is_alive():
            raise TimeoutError(f"the work beside the test has not ended within {join} s of it")
    finally:
        signal.signal(signal.SIGUSR1, before)
