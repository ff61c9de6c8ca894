"""Ends a process at one of the moments between which it writes a file or an event.

python -m helpers.knife MOMENT WORDS...       `fedspallm WORDS`, killed at that moment; under MPI its server is
"""

import os
import signal
import sys

from fedspallm_appfl import events
from fedspallm_appfl.rounds import journal
from fedspallm_appfl.wire import store


class Cut(BaseException):
    """The process ended."""


class Knife:
    """Counts the moments, and ends the process at one of them."""

    def __init__(self, set_attribute=setattr, end=None):
        self.count, self.at, self._end = 0, None, end
        places = (store, "publish"), (journal, "rename"), (journal, "write_text"), (events.EventLog, "__call__")
        for owner, name in places:
            set_attribute(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, work):
        def counted(*args):
            self._tick()
            work(*args)
            self._tick()

        return counted

    def _tick(self):
        self.count += 1
        if self.count == self.at:
            if self._end:
                self._end()
            raise Cut

    def cut(self, at, work):
        """Do something, but for what comes after a moment; whether it ended before."""
        self.count, self.at = 0, at
        try:
            work()
        except Cut:
            return True
        finally:
            self.at = None
        return False


if __name__ == "__main__":
    from fedspallm_appfl.cli import main

    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
    moment, _, name = sys.argv[1].partition(":")
    knife = Knife(end=lambda: os.kill(os.getpid(), signal.Signals[name or "SIGKILL"]))
    knife.at = int(moment) if rank == 0 else None
    code = main(sys.argv[2:])
    sys.stderr.write(f"moments {knife.count}\n" if rank == 0 else "")
    sys.exit(code)
