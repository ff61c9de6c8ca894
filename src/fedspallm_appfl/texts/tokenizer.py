"""A model's tokenizer: text as token ids, without control tokens that the text merely quotes, and how a text begins."""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedspallm_appfl.errors import ModelError, first_line
from fedspallm_appfl.settings import custom_code
from fedspallm_appfl.texts.files import are_tokens


def tokenizer_for(folder: Path, *texts: str | Sequence[str]) -> Any:
    """The tokenizer of a model folder; None if all texts are tokenized already.

    Raises:
        ModelError: there is no readable tokenizer.
        DataError: a text cannot be found.
    """
    return None if all(map(are_tokens, texts)) else load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; kept while its files stay as they are.

    Raises:
        ModelError: there is no readable tokenizer.
    """
    files = sorted(folder.glob("*token*")) if folder.is_dir() else []
    stamps = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return _loaded(folder, stamps, custom_code.allowed(folder))


@lru_cache(maxsize=4)
def _loaded(folder: Path, files: tuple[tuple[str, int, int], ...], trusted: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as error:  # the Rust library behind it raises bare exceptions
        why = custom_code.refusal(folder) or f"{folder} has no readable tokenizer: {first_line(error)}"
        raise ModelError(why) from error
    if len(tokenizer) < 2:  # made of nothing where there are no files of one
        raise ModelError(f"{folder} has no tokenizer; save the model's tokenizer there")
    tokenizer.model_max_length = int(1e30)  # texts are cut into windows, so a warning about a length would be wrong
    return tokenizer


def forget_tokenizers() -> None:
    """Drop those that are kept."""
    _loaded.cache_clear()


def ids_of(tokenizer: Any, text: str, control_words: bool = False) -> list[int]:
    """The token ids of a text, without those that a tokenizer puts around it.

    Args:
        tokenizer: the model's.
        text: the text.
        control_words: words such as `</s>` become control tokens; otherwise they are words like others.
    """
    if control_words:
        return _ids(tokenizer, text)
    ids = _ids(tokenizer, text, split_special_tokens=True)
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    if control.isdisjoint(ids):
        return ids
    # Some vocabularies have such words beside the others (Unigram): their letters are tokenized apart.
    words = "|".join(re.escape(word) for word in sorted(tokenizer.all_special_tokens, key=len, reverse=True))
    return [one for part in re.split(f"(?={words})(.)", text, flags=re.DOTALL) if part for one in _ids(tokenizer, part)]


def _ids(tokenizer: Any, text: str, **how: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, return_attention_mask=False, **how)["input_ids"]
    return ids


def first_ids(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before a text: begin-of-sequence, or none."""
    whole, bare = tokenizer("x")["input_ids"], _ids(tokenizer, "x")
    begins = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return list(whole[:begins])


def beginning_words(tokenizer: Any, bos: str) -> str:
    """How windows of a text begin, in words."""
    words = " ".join(tokenizer.convert_ids_to_tokens(first_ids(tokenizer)))
    if bos == "never":
        return "windows begin without a begin-of-sequence token"
    if not words:
        return "no begin-of-sequence token is added"
    return f"the first window begins with {words}" if bos == "first" else f"every window begins with {words}"
