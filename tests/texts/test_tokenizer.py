"""Control words in text, and how a text begins, with tokenizers of the three usual kinds."""

import pytest
import tokenizers as tk
from transformers import PreTrainedTokenizerFast

from fedspallm_appfl.texts import content, windows
from fedspallm_appfl.texts.tokenizer import beginning_words, first_ids, ids_of, load_tokenizer
from fedspallm_appfl.texts.windows import Cut, forget_windows, windows_of
from helpers.paths import DEMO

CONTROL = ["<s>", "</s>", "<|endoftext|>", "<unk>"]
QUOTED = "A page about </s> and <|endoftext|> and their use.\nAnother  line."
LINES = (DEMO / "text" / "austen" / "calib.txt").read_text("utf-8")[:3000]


def made(kind):
    """A small tokenizer, trained on a few lines; `</s>` has a place in its vocabulary."""
    if kind == "byte-level BPE":
        inner = tk.Tokenizer(tk.models.BPE())
        inner.pre_tokenizer, inner.decoder = (
            tk.pre_tokenizers.ByteLevel(add_prefix_space=False),
            tk.decoders.ByteLevel(),
        )
        alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
        trainer = tk.trainers.BpeTrainer(
            vocab_size=400, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
        )
    else:
        inner = tk.Tokenizer(tk.models.Unigram())
        inner.pre_tokenizer, inner.decoder = tk.pre_tokenizers.Metaspace(), tk.decoders.Metaspace()
        trainer = tk.trainers.UnigramTrainer(
            vocab_size=300,
            special_tokens=CONTROL,
            unk_token="<unk>",
            initial_alphabet=[*"<>/|_.", *LINES],
            show_progress=False,
        )
    inner.train_from_iterator([LINES, QUOTED.replace("</s>", "").replace("<|endoftext|>", "")], trainer)
    inner.post_processor = tk.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<|endoftext|>"
    )


KINDS = ["byte-level BPE", "unigram with metaspace", "of the demo"]


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request):
    return load_tokenizer(DEMO / "model") if request.param == "of the demo" else made(request.param)


def test_control_words_in_text_are_text_unless_asked_for(tokenizer):
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    ids = ids_of(tokenizer, QUOTED)
    assert control.isdisjoint(ids)
    assert "".join(tokenizer.decode(ids).split()) == "".join(QUOTED.split())
    assert tokenizer.eos_token_id in ids_of(tokenizer, QUOTED, control_words=True)
    plain = "A page without any."
    assert ids_of(tokenizer, plain) == ids_of(tokenizer, plain, control_words=True)


def test_a_text_begins_as_the_tokenizer_begins_one(tokenizer):
    begins = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    assert first_ids(tokenizer) == ([tokenizer.bos_token_id] if begins else [])
    words = [beginning_words(tokenizer, bos) for bos in ("auto", "first", "never")]
    if begins:
        assert words[:2] == ["every window begins with <s>", "the first window begins with <s>"]
    else:
        assert words[:2] == ["no begin-of-sequence token is added"] * 2
    assert words[2] == "windows begin without a begin-of-sequence token"


@pytest.mark.parametrize("tokenizer", [KINDS[0], KINDS[2]], indirect=True)  # the other one joins words over a line end
def test_pieces_of_a_text_have_the_tokens_of_the_whole(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(LINES, "utf-8")
    forget_windows()
    whole = windows_of(str(tmp_path), Cut(8), tokenizer)
    monkeypatch.setattr(windows, "WHOLE", 100)
    monkeypatch.setattr(content, "PIECE", 700)
    forget_windows()
    assert windows_of(str(tmp_path), Cut(8), tokenizer).tolist() == whole.tolist()
