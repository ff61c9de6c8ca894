"""A packed folder holds what its page says, gives every bit back, and is refused where it is damaged."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fedspallm_appfl as fs
from fedspallm_appfl.errors import ModelError
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.models.storage import packing
from fedspallm_appfl.models.storage.checkpoint import model_hash
from fedspallm_appfl.models.storage.export import write_model
from fedspallm_appfl.models.storage.packed_file import PackedFile
from fedspallm_appfl.wire.store import PackedStore
from helpers.families import save_family

DOWN = "model.layers.1.mlp.down_proj.weight"
INTEGERS = {2: torch.int16, 4: torch.int32}


def bits(tensor):
    return tensor.view(INTEGERS[tensor.element_size()])


def tensors_of(folder):
    return {key: one for file in sorted(folder.glob("*.safetensors")) for key, one in load_file(file).items()}


def assert_same_bits(made, expected):
    assert made.keys() == expected.keys()
    for key, tensor in expected.items():
        assert made[key].dtype == tensor.dtype and torch.equal(bits(made[key]), bits(tensor)), key


def save_pruned(family, folder, dtype=torch.bfloat16, shard="1GB"):
    """A model with two thirds of its matrices zero; -0.0 and NaN are among what is left, and one matrix is dense."""
    draw = torch.Generator().manual_seed(0)
    save_family(family, folder, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder)
    matrices = [one for one in model.parameters() if one.dim() > 1]
    with torch.no_grad():
        for one in matrices[:-1]:
            one.masked_fill_(torch.rand(one.shape, generator=draw) < 2 / 3, 0)
            one.view(-1)[:3] = torch.tensor([-0.0, math.nan, 0])
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "README.md").write_text("a card")
    (folder / "templates").mkdir()
    (folder / "templates" / "chat.jinja").write_text("x")
    return folder


def by_the_page(folder):
    """The tensors of a packed folder as docs/wire.md says they lie there, without the package."""
    found = {}
    for name in set(json.loads((folder / "packed.safetensors.index.json").read_text())["weight_map"].values()):
        stored, header = load_file(folder / name), safe_open(folder / name, "pt").metadata()
        assert header["format_version"] == "1"
        for key, shape in json.loads(header["packed"]).items():
            mask, values = stored.pop(f"{key}.mask"), stored.pop(f"{key}.values")
            kept = np.unpackbits(mask.numpy(), bitorder="little")
            assert not kept[math.prod(shape) :].any()
            dense = np.zeros(math.prod(shape), bits(values).numpy().dtype)
            dense[kept[: dense.size] == 1] = bits(values).numpy()
            found[key] = torch.from_numpy(dense).view(values.dtype).view(shape)
        found |= stored
    return found


@pytest.mark.parametrize(
    ("family", "dtype", "shard"),
    [
        ("llama-tied", torch.bfloat16, "20KB"),
        ("gpt2", torch.float32, "1GB"),
        ("gpt-oss", torch.bfloat16, "50KB"),  # experts of a block in one tensor of three dimensions
        ("mixtral", torch.float16, "1GB"),
    ],
)
def test_what_is_packed_comes_back_bit_by_bit(family, dtype, shard, tmp_path, monkeypatch):
    dense, packed, again = save_pruned(family, tmp_path / "dense", dtype, shard), tmp_path / "packed", tmp_path / "x/y"
    monkeypatch.setattr(packing, "PART", 72)  # matrices are cut
    size = fs.pack(dense, packed)
    expected = tensors_of(dense)
    assert_same_bits(by_the_page(packed), expected)
    fs.unpack(packed, again)
    assert_same_bits(tensors_of(again), expected)
    assert {str(one.relative_to(again)) for one in again.rglob("*")} == {
        str(one.relative_to(dense)) for one in dense.rglob("*")
    }
    assert (packed / "README.md").read_text() == f"{packing.NOTE}a card" and (
        packed / "templates/chat.jinja"
    ).read_text() == "x"
    data = [sum(one.nbytes for one in tensors_of(folder).values()) for folder in (dense, packed)]
    assert data[1] < 0.6 * data[0] and size.packed - data[1] < 300 * len(expected)
    assert (again / "README.md").read_text() == "a card"
    assert model_hash(packed) == model_hash(dense) and not [*tmp_path.rglob("*.partial")]
    assert all(safe_open(file, "pt").metadata() == {"format": "pt"} for file in again.glob("*.safetensors"))


@pytest.mark.parametrize("front", ["", "---\ntags: [sparse]\n---\n\n"])
def test_the_note_of_a_packed_card_stands_below_what_a_hub_reads(front):
    card = f"{front}# a model\n\n---\n"
    assert (
        packing.FRONT.sub(lambda found: found[0] + packing.NOTE, card, count=1)
        == f"{front}{packing.NOTE}# a model\n\n---\n"
    )


@pytest.mark.parametrize("family", ["llama-tied", "gpt-oss", "mixtral"])
def test_it_loads_as_the_dense_one(family, tmp_path, monkeypatch):
    dense, packed = save_pruned(family, tmp_path / "dense", shard="50KB"), tmp_path / "packed"
    fs.pack(dense, packed)
    expected, made = AutoModelForCausalLM.from_pretrained(dense), fs.load_packed(packed)
    assert type(made) is type(expected) and made.dtype == torch.bfloat16 and not made.training
    assert_same_bits(made.state_dict(), expected.state_dict())
    tied = [model.get_output_embeddings().weight is model.get_input_embeddings().weight for model in (expected, made)]
    assert tied[0] == tied[1]
    assert made.generation_config.to_dict() == expected.generation_config.to_dict()
    assert made.config.to_dict() | {"_name_or_path": ""} == expected.config.to_dict() | {"_name_or_path": ""}
    assert fs.load_packed(packed, dtype=torch.float32).dtype == torch.float32
    unpacked, unpack = [], PackedFile._unpacked
    monkeypatch.setattr(PackedFile, "_unpacked", lambda file, key: unpacked.append(key) or unpack(file, key))
    assert fs.check(packed).to_dict()["matrices"] == fs.check(dense).to_dict()["matrices"]
    assert unpacked and len(unpacked) == len(set(unpacked))  # a tensor of experts once, not once for each


def test_a_matrix_for_which_it_does_not_pay_and_one_whose_names_are_taken_stay_dense(tmp_path):
    dense = save_family("llama", tmp_path / "dense", torch.float16)
    state = load_file(dense / "model.safetensors")
    for key, share in (("a", 2), ("b", 1), ("c", 16)):  # of 32 entries a mask takes as much as two zeros
        state[key] = torch.ones(4, 8, dtype=torch.float16)
        state[key].view(-1)[:share] = 0
    state["c.mask"], state["whole"] = torch.zeros(2), torch.zeros(2, 4, dtype=torch.int64)
    state["d"] = torch.tensor([[0.0] * 3 + [1]], dtype=torch.float16)
    save_file(state, dense / "model.safetensors", {"format": "pt"})
    fs.pack(dense, tmp_path / "packed")
    header = safe_open(tmp_path / "packed" / "packed.safetensors", "pt").metadata()
    assert json.loads(header["packed"]) == {"d": [1, 4]}


def test_a_pickled_checkpoint_is_packed_and_a_packed_model_is_pruned(tmp_path):
    dense, packed = save_pruned("llama", tmp_path / "dense"), tmp_path / "packed"
    torch.save(tensors_of(dense), dense / "pytorch_model.bin")
    expected = tensors_of(dense)
    (dense / "model.safetensors").unlink()
    fs.pack(dense, packed)
    assert_same_bits(by_the_page(packed), expected)
    write_model(Skeleton(str(packed)), PackedStore(tmp_path / "none"), tmp_path / "out")
    assert_same_bits(tensors_of(tmp_path / "out"), expected)
    assert not [*(tmp_path / "out").glob("packed*")]


def rewritten(file, change):
    """A packed file with other tensors or another header."""
    tensors, header = load_file(file), safe_open(file, "pt").metadata()
    change(tensors, header)
    save_file(tensors, file, header)


def one_bit_more(tensors, header):
    tensors[f"{DOWN}.mask"][:] = 255


def a_bit_beyond(tensors, header):
    tensors[f"{DOWN}.mask"][:] = 255
    tensors[f"{DOWN}.values"] = torch.ones(32 * 48)
    shaped([1, 32 * 48 - 1])(tensors, header)


def shaped(shape):
    def change(tensors, header):
        header["packed"] = json.dumps(json.loads(header["packed"]) | {DOWN: shape})

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (one_bit_more, "a mask of 192 bytes and a float for each bit"),
        (a_bit_beyond, r"\[1, 1535\] takes a mask of 192 bytes"),
        (shaped([2**40, 48]), "takes a mask of"),
        (shaped([-1, 48]), "JSON of names and shapes"),
        (lambda tensors, header: header.update(packed="[" * 10**5), "cannot be opened"),
        (lambda tensors, header: header.update(format_version="2"), "'2', and 1 is what can be read.*update fedspallm"),
        (lambda tensors, header: tensors.pop(f"{DOWN}.values"), "lacks .*down_proj.weight.values"),
        (lambda tensors, header: tensors.pop("model.norm.weight"), "other tensors than"),
        (
            lambda tensors, header: tensors.update({f"{DOWN}.values": tensors[f"{DOWN}.values"].to(torch.int32)}),
            "int32",
        ),
    ],
)
def test_a_damaged_folder_is_refused(change, words, tmp_path):
    packed = tmp_path / "packed"
    fs.pack(save_pruned("llama", tmp_path / "dense"), packed)
    rewritten(packed / "packed.safetensors", change)
    for act in (lambda: fs.unpack(packed, tmp_path / "out"), lambda: fs.load_packed(packed)):
        with pytest.raises(ModelError, match=words):
            act()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["dense", "packed"]


def test_where_it_cannot_be_written_nothing_is_left(tmp_path, monkeypatch):
    dense, packed = save_pruned("llama", tmp_path / "dense", shard="20KB"), tmp_path / "packed"
    with pytest.raises(ModelError, match="inside .*name a folder beside it"):
        fs.pack(dense, dense / "packed")
    fs.pack(dense, packed)
    before = {one: one.read_bytes() for one in packed.iterdir() if one.is_file()}
    for act, words in (
        (lambda: fs.pack(dense, packed), "is there already"),
        (lambda: fs.pack(packed, tmp_path / "twice"), "is packed already"),
        (lambda: fs.unpack(dense, tmp_path / "twice"), "is not packed"),
        (lambda: fs.load_packed(dense), "is not packed"),
    ):
        with pytest.raises(ModelError, match=words):
            act()
    assert {one: one.read_bytes() for one in packed.iterdir() if one.is_file()} == before
    (tmp_path / "late.partial").mkdir()  # the user's own

    def full(file, *others):
        file.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "write_tensors", full)
    with pytest.raises(ModelError, match="cannot be written.*No space left.*make room"):
        fs.pack(dense, tmp_path / "late")
    (packed / "packed-00002-of-00004.safetensors").unlink()
    with pytest.raises(ModelError, match="names.*packed-00002"):
        fs.load_packed(packed)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["dense", "late.partial", "packed"]
