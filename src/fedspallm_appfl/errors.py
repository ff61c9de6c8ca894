"""Error classes: every error that a user can cause states the rule, the values received and the fix."""

import reprlib
from collections.abc import Sequence

QUOTED = 200  # characters that a message quotes at most of what came from outside


class FedSpaLLMError(Exception):
    """Base of all errors that this package raises on purpose; the command line prints them without a traceback."""


class ConfigError(FedSpaLLMError):
    """A configuration that cannot be run; the message lists every problem found."""


class ModelError(FedSpaLLMError):
    """A model folder that cannot be read, or whose decoder blocks cannot be found."""


class DataError(FedSpaLLMError):
    """Private or evaluation text that is missing or too short.

    Attributes:
        private: words of the message that were taken from the text; they do not leave a site.
    """

    def __init__(self, message: str, private: str = "") -> None:
        super().__init__(message)
        self.private = private


class PruningError(FedSpaLLMError):
    """A matrix that cannot be pruned: a statistic that is not finite, or a factorization that keeps failing."""


class UpdateError(FedSpaLLMError):
    """An upload that is not what the server assigned."""


class SecureSumError(UpdateError):
    """A message that breaks the protocol of secure sums, or too few clients to hide one among."""


class Terminated(BaseException):
    """The process was told to end from outside; its message is the signal's name."""

    code = 143  # exit code


class DataStoreError(FedSpaLLMError):
    """A data store that cannot be reached, or an object that is not in it."""


class FederationError(FedSpaLLMError):
    """Too few clients answered in a round, or an endpoint cannot be reached."""


def extra(name: str) -> str:
    """How to install what an extra of this package needs."""
    return f"install it in a checkout with: pip install --constraint constraints.txt '.[{name}]'"


def first_line(error: BaseException) -> str:
    """First line of another library's error, without the advice that often follows."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def refuse(what: object, problems: Sequence[str]) -> None:
    """Say everything that is wrong.

    Raises:
        ConfigError: lists the problems, if there are any.
    """
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{what}: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n{lines}")


class _Quotes(reprlib.Repr):
    """`repr` of plain values, cut; other objects are named by their type, as their own `repr` is not trusted."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring, self.maxlist, self.maxdict = QUOTED, 20, 20

    def repr_int(self, number: int, level: int) -> str:
        """Decimal digits up to a limit; Python refuses to write very long numbers."""
        return repr(number) if number.bit_length() < 3 * QUOTED else f"a number of {number.bit_length()} bits"

    def repr_instance(self, value: object, level: int) -> str:
        """Constants, and the type of all else."""
        plain = value is None or type(value) in (bool, float, bytes)
        return repr(value)[:QUOTED] if plain else f"<{type(value).__name__}>"


_QUOTES = _Quotes()


def shortened(words: object, most: int = QUOTED) -> str:
    """Text with at most so many characters."""
    text = str(words)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def quoted(value: object) -> str:
    """A value from outside as a message quotes it: printable, of at most `QUOTED` characters."""
    return shortened(_QUOTES.repr(value))
