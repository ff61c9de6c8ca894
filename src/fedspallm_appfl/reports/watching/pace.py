"""How far the uploads of a run are, and how long the others will take."""

from fedspallm_appfl.events import Event


class Pace:
    """Counts the uploads of pruning, and then those of recovery, which come at another pace.

    An exchange is `clients * messages` uploads; those of keys of secure sums are short, and not counted. Recovery comes in
    the last round alone.

    Attributes:
        done: uploads of the phase that is on.
        total: all that it will have.
        recovers: whether the phase is recovery.
    """

    def __init__(self, rounds: int, clients: int, recovery: int = 0) -> None:
        self._rounds, self._clients, self._recovery = rounds, clients, recovery
        self.done = self.total = 0
        self.recovers = False
        self.begin()

    def begin(self) -> None:
        """Forget the pace: a run goes on after an interruption, and sends the messages of its exchange again."""
        self._exchange = (-1, -1)
        self._begun = self.done  # uploads of earlier exchanges and starts
        self._first = self._last = 0.0

    def take(self, event: Event) -> None:
        """Take an upload that counts."""
        exchange, exchanges = event["counted"]
        own, each = exchanges - self._recovery, self._clients * event["messages"]
        recovers, now = exchange >= own, (event["round"], exchange)
        if now != self._exchange:
            before = exchange - own if recovers else event["round"] * own + exchange
            if self._exchange == (-1, -1) or recovers != self.recovers:  # another phase, of another pace
                self._begun = before * each
            self._exchange, self.recovers, self.done = now, recovers, before * each
        self.done += 1
        self.total = (self._recovery if recovers else self._rounds * own) * each
        self._last = float(event["time"])
        if self._since_all_began <= 0:
            self._first = self._last

    @property
    def _since_all_began(self) -> int:
        """Uploads since every client could have sent one; earlier times include start-up."""
        return self.done - self._begun - self._clients

    @property
    def seconds_left(self) -> float | None:
        """Of the phase that is on, at the last upload; None until there is a pace."""
        if self._since_all_began <= 0:
            return None
        return (self._last - self._first) / self._since_all_began * (self.total - self.done)
