"""What the events of a run say of it, up to the last one."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from fedspallm_appfl.events import Event
from fedspallm_appfl.reports.watching.pace import Pace

MOST = 700.0  # nats a token; the exponential of more is no float
OPENING, MEASURING = "clients open model and text", "measuring perplexity"


@dataclass
class Client:
    """A client, as its uploads show it.

    Attributes:
        state: in a few words.
        exchange: (round, exchange) of its last upload.
        blocks: that it has sent in this exchange.
        nbytes: that it has sent in all.
        heard: seconds of work at its last sign of life; None before it.
    """

    state: str = "opens model and text"
    exchange: tuple[int, int] = (-1, -1)
    blocks: set[str] = field(default_factory=set)
    nbytes: int = 0
    heard: float | None = None


class Watched:
    """A run, event by event.

    Attributes:
        clients: id -> client.
        stage: what the run does.
        round: the round that is on, from 0.
        rounds: rounds of all.
        closed: blocks that the server has finished in the round.
        blocks: blocks of a round; 0 until the first one is finished.
        pace: of the uploads.
        perplexity: method -> geometric mean over texts, and over the clients' own models.
        own: client -> (tokens, loss of the dense model, of the pruned one) on its own text, summed.
        seconds: of work at the last event.
        ended: whether the run has ended well.
        failed: why it has ended before its time; None where it has not.
    """

    def __init__(self, recovery: int = 0) -> None:
        """Begin with nothing; `recovery` is the number of rounds of recovery."""
        self._recovery = recovery
        self.clients: dict[str, Client] = {}
        self.stage = "waiting for a run to begin"
        self.round, self.rounds = 0, 1
        self.closed: set[int] = set()
        self.blocks = 0
        self.pace = Pace(1, 1)
        self._bursts = False
        self._perplexity: dict[str, list[float]] = {}
        self.own: dict[str, tuple[int, float, float]] = {}
        self.seconds = 0.0
        self.ended = False
        self.failed: str | None = None

    def take(self, event: Event) -> None:
        """Take one event; kinds that say nothing of how far the run is are passed over."""
        self.seconds = float(event["time"])
        if handle := getattr(self, f"_on_{event['event']}", None):
            handle(event)

    @property
    def over(self) -> bool:
        """Whether the run has ended, well or not."""
        return self.ended or self.failed is not None

    @property
    def perplexity(self) -> dict[str, float]:
        """Method -> geometric mean over texts, and over the clients' own models (name/client)."""
        return {method: statistics.geometric_mean(found) for method, found in self._perplexity.items()}

    @property
    def own_perplexity(self) -> tuple[float, float] | None:
        """Of the dense and the pruned model on the clients' own text, over all tokens."""
        tokens = sum(one[0] for one in self.own.values())
        if not tokens:
            return None
        dense, pruned = (math.fsum(one[part] for one in self.own.values()) / tokens for part in (1, 2))
        return math.exp(min(dense, MOST)), math.exp(min(pruned, MOST))

    @property
    def seconds_left(self) -> float | None:
        """Of pruning or recovery, from now; None outside them, and where uploads come in bursts."""
        left = self.pace.seconds_left
        return None if self._bursts or self.over or left is None or self.pace.done >= self.pace.total else left

    def _on_start(self, event: Event) -> None:
        self.clients = {name: Client() for name in event["clients"]}
        self.rounds, self.stage = event["rounds"], OPENING
        self.pace = Pace(self.rounds, len(self.clients), self._recovery)

    def _on_resumed(self, event: Event) -> None:
        self.ended, self.failed, self.stage = False, None, OPENING
        self.pace.begin()
        for client in self.clients.values():
            client.state = Client.state

    def _on_allocating(self, event: Event) -> None:
        self.stage = "choosing the targets of matrices"

    def _on_allocation(self, event: Event) -> None:
        self.stage = OPENING

    def _on_ready(self, event: Event) -> None:
        self._set("at work", self.clients)

    def _on_sent(self, event: Event) -> None:
        self._bursts, self.stage = True, "waiting for answers"
        self._set("has a task", event["clients"])

    def _on_waiting(self, event: Event) -> None:
        self._set("no answer yet", event["clients"])

    def _on_answer(self, event: Event) -> None:
        self._set("has answered", [event["client"]]).heard = self.seconds

    def _on_upload(self, event: Event) -> None:
        last = event["message"] + 1 == event["messages"] and event["exchange"] + 1 == event["exchanges"]
        client = self._set("has sent all" if last else "at work", [event["client"]])
        if client.exchange != (event["round"], event["exchange"]):
            client.exchange, client.blocks = (event["round"], event["exchange"]), set()
        client.blocks |= event["block_bytes"].keys()
        client.nbytes += event["bytes"]
        client.heard = self.seconds
        self._enter(event["round"])
        self.stage = "exchanging keys of secure sums"
        if event["counted"] is not None:
            self.pace.take(event)
            self.stage = "recovery" if self.pace.recovers else "pruning"

    def _on_training(self, event: Event) -> None:
        self.stage = "recovery"
        self._set("training", event["clients"])

    def _on_step(self, event: Event) -> None:
        self._set(f"step {event['step']} of {event['of']}", [event["client"]]).heard = self.seconds

    def _on_absent(self, event: Event) -> None:
        self._set("left out", [event["client"]])

    def _on_block(self, event: Event) -> None:
        self._enter(event["round"])
        self.closed.add(event["block"])
        self.blocks = event.get("of", 0)

    def _on_round(self, event: Event) -> None:
        if event["round"] + 1 == self.rounds:
            self.stage = "writing the model"
            self._rest()

    def _on_measured(self, event: Event) -> None:
        self.stage = "clients measure on their own text"
        self.own[event["client"]] = (event["tokens"], event["dense"], event["pruned"])

    def _on_written(self, event: Event) -> None:
        self.stage = MEASURING
        self._rest()

    def _on_evaluation(self, event: Event) -> None:
        method = event["method"].partition("/")[0]
        mean = statistics.geometric_mean(event["perplexity"].values())
        self._perplexity.setdefault(method, []).append(mean)
        self.stage = f"{MEASURING}, {event['of'][0]} of {event['of'][1]} models"

    def _on_failed(self, event: Event) -> None:
        self.failed, self.stage = event["why"], "failed"
        self._rest()

    def _on_end(self, event: Event) -> None:
        self.ended, self.failed, self.stage = True, None, "finished"
        self._rest()

    def _enter(self, index: int) -> None:
        """A round is on; blocks are counted in each."""
        if index != self.round:
            self.round, self.closed = index, set()

    def _set(self, state: str, names: Iterable[str]) -> Client:
        """Say what clients do; returns the last of them."""
        found = [self.clients.setdefault(name, Client()) for name in names] or [Client()]
        for client in found:
            client.state = state
        return found[-1]

    def _rest(self) -> None:
        """Nothing more is expected of any client; who was left out stays so."""
        self._set("done" if not self.failed else "-", [n for n, one in self.clients.items() if one.state != "left out"])
