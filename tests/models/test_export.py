"""The pruned folder is the dense one byte for byte but for the pruned matrices, and one of them is in memory at a time."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from fedspallm_appfl.errors import ModelError
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.models.storage import export
from fedspallm_appfl.models.storage.export import check_model, write_model
from fedspallm_appfl.wire.packed import pack
from fedspallm_appfl.wire.store import PackedStore
from helpers.families import save_family
from helpers.packed import unpack


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def tensors_of(folder):
    return {key: tensor for file in shards(folder) for key, tensor in load_file(file).items()}


def header_of(file):
    """Where the data of a safetensors file begins, and its header."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        return stream.tell(), header


def assert_equal(made, expected):
    assert made.keys() == expected.keys()
    for key, tensor in expected.items():
        assert made[key].dtype == tensor.dtype, key
        assert torch.equal(made[key], tensor), key


def random_store(skeleton, folder, blocks=(0, 2)):
    """Some blocks with random values in the place of the dense ones, about half of them pruned."""
    generator, store = torch.Generator().manual_seed(0), PackedStore(folder)
    for block in blocks:
        drawn = {name: torch.rand(shape, generator=generator) for name, shape in skeleton.layout.shapes(block).items()}
        store.save(block, {name: pack(w + 1, w > 0.5, skeleton.stored_dtype) for name, w in drawn.items()})
    return store


def pruned_tensors(skeleton, store):
    """Key -> pruned matrix as it has to stand in the checkpoint."""
    return {
        skeleton.place(block, linear).key: weight.T if linear.transposed else weight
        for block in store.blocks()
        for linear in skeleton.layout.blocks[block]
        for weight in [unpack(store.get(block)[linear.name])[0]]
    }


def in_shards(folder):
    """Save a model again in several files; blocks lie across them."""
    model = load(folder)
    for file in shards(folder):
        file.unlink()
    model.save_pretrained(folder, max_shard_size="25KB")
    assert len(shards(folder)) > 2


def pickle(folder):
    """Turn the safetensors files of a folder into pickled ones."""
    for file in shards(folder):
        torch.save(load_file(file), folder / file.name.replace("model", "pytorch_model").replace("safetensors", "bin"))
        file.unlink()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        words = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(words)
        index.unlink()


@pytest.fixture(params=["llama", "llama-tied", "opt", "gpt2", "gpt-neox"])
def dense(request, tmp_path):
    return save_family(request.param, tmp_path / "dense", torch.bfloat16)


@pytest.mark.parametrize("split", [False, True])
def test_only_the_bytes_of_pruned_matrices_differ(dense, split, tmp_path):
    if split:
        in_shards(dense)
    skeleton, out = Skeleton(str(dense)), tmp_path / "out"
    store = random_store(skeleton, tmp_path / "packed")
    write_model(skeleton, store, out)
    pruned = pruned_tensors(skeleton, store)
    assert {file.name for file in out.iterdir()} == {file.name for file in dense.iterdir()}
    for file in dense.iterdir():
        before, after = file.read_bytes(), (out / file.name).read_bytes()
        assert len(before) == len(after)
        if file.suffix == ".safetensors":
            data, header = header_of(file)
            for key in header.keys() & pruned.keys():
                begin, end = (data + offset for offset in header[key]["data_offsets"])
                assert before[begin:end] != after[begin:end]
                before = before[:begin] + after[begin:end] + before[end:]
        assert before == after


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("pickled", [False, True])
def test_the_written_folder_loads_as_the_dense_one_with_pruned_matrices(dense, split, pickled, tmp_path):
    if split:
        in_shards(dense)
    expected = tensors_of(dense)
    if pickled:
        pickle(dense)
    skeleton, out = Skeleton(str(dense)), tmp_path / "out"
    store = random_store(skeleton, tmp_path / "packed")
    write_model(skeleton, store, out)
    expected |= pruned_tensors(skeleton, store)
    load(out).save_pretrained(tmp_path / "again")
    assert_equal(tensors_of(out), expected)
    assert_equal(tensors_of(tmp_path / "again"), expected)
    assert all(safe_open(file, "pt").metadata() == {"format": "pt"} for file in shards(out))


def test_a_pickled_checkpoint_may_hold_tied_strided_and_odd_tensors(tmp_path):
    dense = save_family("llama-tied", tmp_path / "dense")
    state = load(dense).state_dict()
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    key = "model.layers.1.self_attn.k_proj.weight"
    state[key] = state[key].T.contiguous().T
    state |= {"bytes": torch.arange(3, dtype=torch.uint8), "flag": torch.tensor(True), "nothing": torch.zeros(0, 4)}
    state |= {"count": torch.tensor(7), "double": torch.rand(3, dtype=torch.float64), "ä": torch.rand(1).half()}
    torch.save(state, dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    skeleton, out = Skeleton(str(dense)), tmp_path / "out"
    store = random_store(skeleton, tmp_path / "packed")
    write_model(skeleton, store, out)
    made = tensors_of(out)
    assert_equal(made, state | pruned_tensors(skeleton, store))
    data, header = header_of(out / "model.safetensors")
    starts = [(data + entry["data_offsets"][0], made[key]) for key, entry in header.items() if key in made]
    assert all(start % tensor.element_size() == 0 for start, tensor in starts)


def test_a_pickled_tensor_that_safetensors_does_not_know_is_an_error_that_names_it(tmp_path):
    dense = save_family("llama", tmp_path / "dense")
    torch.save(load(dense).state_dict() | {"wide": torch.zeros(2, dtype=torch.complex128)}, dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"wide is torch.complex128, which safetensors does not support; convert it"):
        write_model(Skeleton(str(dense)), PackedStore(tmp_path / "none"), tmp_path / "out")
    assert not list((tmp_path / "out").glob("model.safetensors*"))


def test_links_become_files_and_what_is_read_only_stays_so(tmp_path, monkeypatch):
    """As in the cache of the hub, where a snapshot links to blobs."""
    dense = save_family("llama", tmp_path / "dense")
    (tmp_path / "blobs").mkdir()
    for file in list(dense.iterdir()):
        blob = file.rename(tmp_path / "blobs" / file.name)
        blob.chmod(0o440)
        file.symlink_to(blob)
    before = {blob.name: blob.read_bytes() for blob in (tmp_path / "blobs").iterdir()}
    modes, put_in = [], export._put_in
    monkeypatch.setattr(export, "_put_in", lambda s, p, file: (modes.append(file.stat().st_mode), put_in(s, p, file)))
    skeleton = Skeleton(str(dense))
    store, out = random_store(skeleton, tmp_path / "packed"), tmp_path / "out"
    for _ in range(2):  # once more over read-only files
        write_model(skeleton, store, out)
    assert all(mode & 0o200 for mode in modes)
    assert len(modes) == 2
    assert not any(file.is_symlink() for file in out.iterdir())
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o440}
    assert {blob.name: blob.read_bytes() for blob in (tmp_path / "blobs").iterdir()} == before
    assert_equal(tensors_of(out), tensors_of(dense) | pruned_tensors(skeleton, store))


def test_subfolders_are_copied_without_weights_and_without_what_lies_elsewhere(tmp_path):
    dense = save_family("llama", tmp_path / "dense")
    templates = dense / "additional_chat_templates"
    templates.mkdir()
    (templates / "tools.jinja").write_text("tools")
    (templates / "link.jinja").symlink_to("tools.jinja")
    (templates / "weights.bin").write_bytes(b"w")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.txt").write_text("s")
    (templates / "secret.txt").symlink_to(tmp_path / "elsewhere" / "secret.txt")
    (dense / "folder").symlink_to(tmp_path / "elsewhere")
    (dense / ".hidden").mkdir()
    (dense / ".hidden" / "x.txt").write_text("x")
    (dense / "README.md").write_text("the base")
    write_model(Skeleton(str(dense)), PackedStore(tmp_path / "none"), out := tmp_path / "out")
    copied = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    weights_and_config = {"model.safetensors", "config.json", "generation_config.json"}
    templates = {f"additional_chat_templates/{name}.jinja" for name in ("tools", "link")}
    assert copied == {*weights_and_config, *templates, "README.base.md"}
    assert not any(file.is_symlink() for file in out.rglob("*"))


def test_templates_of_a_model_in_the_hubs_cache_are_copied(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    dense = save_family("llama", snapshot)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (dense / "templates").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "t").write_text("template")
    (dense / "templates" / "t.jinja").symlink_to("../../../blobs/t")
    write_model(Skeleton(str(dense)), PackedStore(tmp_path / "none"), tmp_path / "out")
    assert (tmp_path / "out" / "templates" / "t.jinja").read_text() == "template"


@pytest.mark.parametrize("pickled", [False, True])
def test_a_run_that_is_killed_while_it_writes_leaves_no_file_that_looks_whole(pickled, tmp_path, monkeypatch):
    def killed(*args):
        assert [file.suffix for file in out.iterdir() if file.name.startswith("model")] == [".partial"]
        raise KeyboardInterrupt

    dense, out = save_family("llama", tmp_path / "dense"), tmp_path / "out"
    if pickled:
        pickle(dense)
    skeleton = Skeleton(str(dense))
    monkeypatch.setattr(export, "_overwrite", killed)
    with pytest.raises(KeyboardInterrupt):
        write_model(skeleton, random_store(skeleton, tmp_path / "packed"), out)
    assert {file.name for file in out.iterdir()} == {"config.json", "generation_config.json"}


@pytest.mark.parametrize(
    ("dtype", "names", "message"),
    [
        (torch.float16, {}, r"q_proj.weight: the dense matrix is .'dtype': 'F32', .* the pruned one .'dtype': 'F16'"),
        (
            torch.float32,
            {"q_proj": "k_proj"},
            r"q_proj.weight: .* 'shape': \[32, 32\].*, .*\[16, 32\].*different models",
        ),
    ],
)
def test_a_matrix_of_another_model_is_refused(dtype, names, message, tmp_path):
    skeleton = Skeleton(str(save_family("llama", tmp_path / "dense")))
    shapes = skeleton.layout.shapes(1)
    store = PackedStore(tmp_path / "packed")
    weights = {n: torch.ones(shapes[n.replace("q_proj", names.get("q_proj", "q_proj"))]) for n in shapes}
    store.save(1, {name: pack(weight, weight > 0, dtype) for name, weight in weights.items()})
    with pytest.raises(ModelError, match=message):
        write_model(skeleton, store, tmp_path / "out")
    assert not list((tmp_path / "out").glob("model.safetensors*"))


def test_a_block_is_read_once_for_each_file_that_holds_some_of_it(tmp_path, monkeypatch):
    dense = save_family("llama", tmp_path / "dense")
    in_shards(dense)
    skeleton = Skeleton(str(dense))
    store = random_store(skeleton, tmp_path / "packed", (0, 1, 2))
    read, get = [], store.get
    monkeypatch.setattr(store, "get", lambda block, *only: (read.append(block), get(block, *only))[1])
    write_model(skeleton, store, tmp_path / "out")
    parts = [{key.split(".")[2] for key in header_of(file)[1] if "_proj" in key} for file in shards(dense)]
    assert len(read) == sum(map(len, parts))
    read.clear()
    check_model(skeleton, store, tmp_path / "out")
    assert read == [0, 1, 2]


def test_the_check_counts_what_is_on_disk_and_finds_what_was_not_pruned(dense, tmp_path):
    skeleton, out = Skeleton(str(dense)), tmp_path / "out"
    store = random_store(skeleton, tmp_path / "packed")
    write_model(skeleton, store, out)
    matrices = {matrix.name: matrix for matrix in check_model(skeleton, store, out)}
    [file] = shards(out)
    tensors = load_file(file)
    assert len(matrices) == sum(map(len, skeleton.layout.blocks))
    for name, matrix in matrices.items():
        assert matrix.zeros_on_disk == int((tensors[name] == 0).sum())
        assert matrix.zeros == (matrix.zeros_on_disk if matrix.block != 1 else 0)
        assert matrix.entries == tensors[name].numel()
        assert matrix.sparsity == matrix.zeros / matrix.entries
    name = skeleton.place(2, skeleton.layout.blocks[2][0]).key
    tensors[name].view(-1)[int((tensors[name] != 0).view(-1).nonzero()[0])] = 0  # a kept weight may be zero
    save_file(tensors, file)
    found = next(matrix for matrix in check_model(skeleton, store, out) if matrix.name == name)
    assert found.zeros_on_disk == found.zeros + 1 == matrices[name].zeros + 1
    tensors[name] = torch.ones_like(tensors[name])
    save_file(tensors, file)
    with pytest.raises(ModelError, match=rf"{name} is not zero where it was pruned; the file is damaged, write it ag"):
        check_model(skeleton, store, out)


# Memory that no file backs, at its highest. Every larger allocation is given back when it is freed, so that what stands
# is what is in use and not what the allocator keeps.
PEAK = """
import re, sys, threading, time
from pathlib import Path
from fedspallm_appfl.models.storage.export import check_model, write_model
from fedspallm_appfl.models.lazy_model import Skeleton
from fedspallm_appfl.wire.store import PackedStore

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def watch():
    while not done.is_set():
        seen.append(anonymous())
        time.sleep(0.0005)

for folder in map(Path, sys.argv[1:]):
    skeleton, store = Skeleton(str(folder / "dense")), PackedStore(folder / "packed")
    done, seen = threading.Event(), [anonymous()]
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    write_model(skeleton, store, folder / "out")
    check_model(skeleton, store, folder / "out")
    done.set()
    thread.join()
    print(max(seen) - seen[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_holds_one_matrix_and_not_a_shard(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 512}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=8))
    model.config.save_pretrained(tmp_path / "dense")
    tensors = {name: torch.ones(p.shape, dtype=torch.float32) for name, p in model.state_dict().items()}
    save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    random_store(Skeleton(str(tmp_path / "dense")), tmp_path / "packed", range(4))
    shutil.copytree(tmp_path, tmp_path / "pickled")
    pickle(tmp_path / "pickled" / "dense")
    largest, whole = 4 * 1024 * 2048, sum(tensor.nbytes for tensor in tensors.values())
    peaks = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), str(tmp_path / "pickled")],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    ).stdout.split()
    assert len(peaks) == 2
    for peak in map(int, peaks):
        assert peak < 2 * largest + 2**22 < whole / 8
