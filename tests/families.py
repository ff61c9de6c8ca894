"""Which model families are pruned right: a tiny random instance of each that transformers knows, against an oracle.

    python tests/families.py                 all families, a line each; a quarter of an hour
    python tests/families.py mixtral olmoe   some
    python tests/families.py --page docs/families.md

The oracle shares no code with the package: the model runs whole in memory, hooks catch what goes into each linear, block
after block is pruned by a plain SparseGPT in float64, and the next block sees what the pruned ones give. What goes into the
last matrix of an expert is read off the model's own code: with a unit matrix in its place the expert gives back its input.

A family is `right` if masks are equal, weights close, the perplexity block by block that of the whole model, and the
folder that is written loads with these weights; `refused` if it is refused by name before anything runs. Anything else is
a fault, and the exit status is 1. Families of which transformers builds or runs no tiny instance are listed apart.

Float32 decides ties: where masks differ only in entries that differ too when the Gram matrix of the oracle is
rounded as float32 might, the instance says nothing, and another one is tried.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers as t
from torch import nn
from torch.nn import functional
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from fedspallm_appfl.errors import ModelError
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.models.perplexity import perplexities
from fedspallm_appfl.models.storage.export import save_model
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.target import parse_target
from fedspallm_appfl.wire.packed import pack
from fedspallm_appfl.wire.store import PackedStore
from helpers.oracles import column_blocks, sparsegpt
from helpers.rounds import prune_blocks

HALF = Pruning("sparsegpt", parse_target(0.5), min_tokens=1)
WORDS = 96
MEMORY, SECONDS = 8 * 2**30, 120  # of one family
MOST = 3_000_000  # weights of a tiny instance
IDS = torch.randint(3, WORDS, (6, 24), generator=torch.Generator().manual_seed(1))
SMALL = {  # under all names that configurations give to these sizes
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "dim", "embedding_size"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"], 3),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"], 4),
    **dict.fromkeys(["intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "d_ff"], 48),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"], 24),
    **dict.fromkeys(
        ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "intermediate_size_mlp"], 4
    ),
    **dict.fromkeys(["num_experts_per_tok", "top_k", "moe_k", "moe_topk", "num_key_value_heads"], 2),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "n_group", "topk_group", "first_k_dense_replace"], 1),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "mamba_d_state", "mamba_dt_rank", "state_size"], 16),
    **dict.fromkeys(["head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"], 8),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"], 64),
    **dict.fromkeys(["linear_num_value_heads", "linear_num_key_heads"], 2),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "global_head_dim"], 8),
    "moe_shared_expert_intermediate_size": 24,
    "vocab_size": WORDS,
    "expert_ffn_hidden_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
OWN = {  # what a family needs beside these
    "llama4_text": {"intermediate_size_mlp": 48},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention", "mamba"]},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "gemma4_unified_text": {"per_layer_config": {}},  # heads of 512 entries else
    "qwen4_exp_text": {"hc_lowrank": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
}


class TieError(Exception):
    """An instance says nothing: float32 decides which of two entries is pruned."""


def tiny(family: str, seed: int) -> nn.Module:
    """A random instance in float32, whose biases and norms are not trivial."""
    default = t.AutoConfig.for_model(family)
    keys = set(default.to_dict()) | set(default.attribute_map)
    sizes = dict(SMALL)
    if "kv_lora_rank" in keys:  # heads of two sizes, and no groups of them
        del sizes["head_dim"]
        sizes["num_key_value_heads"] = 4
    asked = {key: size for key, size in (sizes | OWN.get(family, {})).items() if key in keys}
    config = type(default)(**asked)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in t.AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST:
        raise ValueError(f"{size / 1e6:.0f} M weights with these sizes")
    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.nan_to_num() + 0.05 * torch.randn_like(parameter))
    return model.eval()


def loss(model: nn.Module) -> float:
    """Mean loss of the whole model."""
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits[:, :-1]
    return float(functional.cross_entropy(logits.flatten(0, 1).float(), IDS[:, 1:].flatten()))


def mixture(block: nn.Module) -> tuple[str, nn.Module] | None:
    """The module of a block that holds experts in tensors of three dimensions, and its name."""
    stacked = [
        name for name, parameter in block.named_parameters() if name.endswith("down_proj") and parameter.ndim == 3
    ]
    return (stacked[0].rpartition(".")[0], block.get_submodule(stacked[0].rpartition(".")[0])) if stacked else None


def inputs_of(model: nn.Module, block: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """What goes into linears in a forward pass of the whole model, (tokens, I) float64."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    chosen: list[tuple[torch.Tensor, torch.Tensor]] = []
    modules = {name: block.get_submodule(name) for name in names if not is_stacked(block, name)}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, seen=seen[name]: seen.append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name, module in modules.items()
    ]
    found = mixture(block)
    if found:
        took = lambda _, args, kwargs: chosen.append((args + tuple(kwargs.values()))[:2])  # noqa: E731
        hooks.append(found[1].register_forward_pre_hook(took, with_kwargs=True))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    for name in names:
        if is_stacked(block, name):
            assert found
            expert, matrix = int(name.split(".")[-2]), name.split(".")[-1]
            rows = [hidden.reshape(-1, hidden.shape[-1]) for hidden, _ in chosen]
            mine = [(index.reshape(-1, index.shape[-1]) == expert).any(-1) for _, index in chosen]
            x = torch.cat([hidden[which] for hidden, which in zip(rows, mine, strict=True)])
            seen[name] = [through_first(found[1], expert, x) if matrix == "down_proj" else x]
    return {name: torch.cat(parts).double() if parts else torch.zeros(0) for name, parts in seen.items()}


def is_stacked(block: nn.Module, name: str) -> bool:
    """Whether a linear is a part of a tensor of all experts."""
    found = mixture(block)
    return bool(found) and name.startswith(f"{found[0]}.")


def through_first(experts: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    """What an expert's first matrices and its activation make of inputs, read off the module's own forward function."""
    down, saved = experts.down_proj, experts.down_proj.data.clone()
    bias = getattr(experts, "down_proj_bias", None)
    saved_bias = None if bias is None else bias.data.clone()
    transposed = down.shape[-1] == x.shape[-1] and getattr(experts, "is_transposed", False)
    inside = down.shape[1] if transposed else down.shape[2]
    parts = []
    with torch.no_grad():
        if bias is not None:
            bias.zero_()
        for start in range(0, inside, x.shape[-1]):  # the output has as many entries as the input
            width = min(x.shape[-1], inside - start)
            down.zero_()
            unit = torch.eye(width)
            if transposed:
                down[expert, start : start + width, :width] = unit
            else:
                down[expert, :width, start : start + width] = unit
            index = torch.full((len(x), 1), expert)
            parts.append(experts(x, index, torch.ones(len(x), 1))[:, :width])
        down.copy_(saved)
        if bias is not None:
            bias.copy_(saved_bias)
    return torch.cat(parts, 1)


def weight_of(block: nn.Module, name: str) -> torch.Tensor:
    """A linear's weight, (O, I), as a view."""
    if not is_stacked(block, name):
        module = block.get_submodule(name)
        return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
    _, experts = mixture(block)
    *_, expert, matrix = name.split(".")
    if matrix == "down_proj" or matrix == "gate_up_proj" or not hasattr(experts, "gate_up_proj"):
        one = getattr(experts, matrix).data[int(expert)]
        return one.T if experts.is_transposed else one
    one = experts.gate_up_proj.data[int(expert)]
    one = one.T if experts.is_transposed else one
    return one[: len(one) // 2] if matrix == "gate_proj" else one[len(one) // 2 :]


def expected(
    model: nn.Module, path: str, names: list[list[str]], got: dict[int, dict[str, Any]]
) -> dict[tuple[int, str], torch.Tensor | None]:
    """Prune the whole model block after block; (block, linear) -> mask, None for an expert that no token reaches.

    Raises:
        TieError: what the package has `got` differs from it in ties alone.
    """
    masks: dict[tuple[int, str], torch.Tensor | None] = {}
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    for index, block in enumerate(model.get_submodule(path)):
        inputs = inputs_of(model, block, names[index])
        for name in names[index]:
            x, weight = inputs[name], weight_of(block, name)
            masks[index, name] = None
            if len(x):
                pruned, mask = sparsegpt(weight, x.T @ x, column_blocks(*weight.shape, 0.5), 0.01)
                mine = getattr(got[index][name], "mask", mask)
                if not torch.equal(mine, mask) and not (mine ^ mask)[~ties(weight, x.T @ x, mask)].any():
                    raise TieError(f"block {index}, {name}")
                weight.copy_(pruned.float())
                masks[index, name] = mask
    return masks


def ties(weight: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(O, I) bool: entries of which float32, in which Gram matrices are factored, decides in one way or another."""
    decided_otherwise = torch.zeros_like(mask)
    for _ in range(16):
        noise = 2**-22 * torch.randn_like(gram)  # a few units in the last place
        rounded = gram * (1 + noise.tril() + noise.tril(-1).T)
        decided_otherwise |= sparsegpt(weight, rounded, column_blocks(*weight.shape, 0.5), 0.01)[1] ^ mask
    return decided_otherwise


def fault(family: str, folder: Path) -> str:
    """What is wrong with a family; empty if nothing is.

    Raises:
        ModelError: it is refused.
        TieError: the instance says nothing.
    """
    lazy = LazyModel(str(folder / "dense"), further=("cpu",))  # two batches, each through a copy of the block
    whole = t.AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()
    if not abs(torch.tensor(perplexities(lazy, {"": IDS}, batch=3)[""]).log() - loss(whole)) < 1e-4:
        return "the perplexity block by block is another than that of the whole model"
    names = [[linear.name for linear in linears] for linears in lazy.layout.blocks]
    got = dict(prune_blocks(lazy, IDS, set(range(len(names))), HALF, batch=3))
    masks = expected(whole, lazy.layout.path, names, got)
    store = PackedStore(folder / "state")
    for (index, name), mask in masks.items():
        one = got[index][name]
        if mask is None:
            if hasattr(one, "mask"):
                return f"block {index}, {name} was pruned although no token reaches it"
            weight = lazy.skeleton.dense_weight(index, lazy.layout.linear(index, name)).float()
            store.add(index, {name: pack(weight, torch.ones_like(weight, dtype=torch.bool), torch.float32)})
            continue
        if not hasattr(one, "mask") or int((~one.mask).sum()) != one.mask.numel() // 2:
            return f"block {index}, {name} has not exactly half of its entries pruned"
        if not torch.equal(one.mask, mask):
            return (
                f"block {index}, {name}: {int((one.mask != mask).sum())} entries of the mask differ from the oracle's"
            )
        store.add(index, {name: pack(one.weight, one.mask, torch.float32)})
    save_model(lazy.skeleton, store, folder / "pruned")
    written = t.AutoModelForCausalLM.from_pretrained(folder / "pruned", dtype=torch.float32).eval()
    for name, parameter in written.named_parameters():
        if not torch.allclose(parameter, whole.get_parameter(name), atol=1e-3, rtol=1e-2):
            return f"{name} in the folder that was written is not the oracle's"
    return ""


def outcome(family: str) -> tuple[str, str]:
    """(`right`, `refused`, `wrong`, `traceback` or `not built`, what there is to say)."""
    for seed in range(5):
        with suppress(TieError):
            return outcome_of(family, seed)
    return "wrong", "masks differ from the oracle's in ties, in five instances of five"


def outcome_of(family: str, seed: int) -> tuple[str, str]:
    """The outcome of one instance.

    Raises:
        TieError: it says nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = tiny(family, seed)
            model.save_pretrained(Path(folder) / "dense")
            if not torch.isfinite(torch.tensor(loss(model))):
                return "not built", "a tiny instance gives NaN"
        except Exception as error:  # noqa: BLE001 - whatever a model's code raises
            return "not built", f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"
        try:
            problem = fault(family, Path(folder))
        except TieError:
            raise
        except ModelError as error:
            return "refused", str(error).replace(f"{folder}/", "")
        except Exception as error:  # noqa: BLE001 - a fault of ours
            return "traceback", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ("wrong", problem) if problem else ("right", experts_in(model))


def limited(family: str) -> tuple[str, str]:
    """The outcome in a process of its own: some configurations have sizes that nothing makes small."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        there.send(outcome(family))

    child = context.Process(target=work)
    child.start()
    there.close()
    try:
        return here.recv() if here.poll(SECONDS) else ("not built", f"takes more than {SECONDS} seconds")
    except EOFError:
        return "not built", f"takes more than {MEMORY / 2**30:.0f} GB"
    finally:
        child.kill()
        child.join()


def experts_in(model: nn.Module) -> str:
    """What a table says of a family with experts."""
    return "mixture" if any("experts" in name for name, _ in model.named_parameters()) else ""


def page(found: dict[str, tuple[str, str]]) -> str:
    """The table of all families, as a page."""
    kinds = ("right", "refused", "wrong", "traceback", "not built")
    of = {kind: [family for family in found if found[family][0] == kind] for kind in kinds}
    mixtures = [family for family in of["right"] if found[family][1]]
    rows = [
        f"| {family} | {found[family][0]} | {found[family][1]} |"
        for family in (*of["refused"], *of["wrong"], *of["traceback"])
    ]
    return "\n\n".join(
        [
            "# Model families",
            f"A tiny random instance of each causal language model that transformers {t.__version__} knows, checked by "
            "`python tests/families.py` against an oracle that shares no code with the package (the file says how).",
            f"**Right, {len(of['right'])}**, of which {len(mixtures)} mixtures of experts (in italics): "
            + ", ".join(f"*{family}*" if family in mixtures else family for family in of["right"])
            + ".",
            f"**Refused, {len(of['refused'])}; wrong, {len(of['wrong'])}; traceback, {len(of['traceback'])}**",
            "\n".join(["| family | | why |", "|---|---|---|", *rows]),
            f"**Not checked, {len(of['not built'])}**: of these transformers builds or runs no tiny instance with these "
            f"sizes: {', '.join(of['not built'])}.",
        ]
    )


def main() -> int:
    """Check families."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--page", type=Path, help="write the table to this page")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    t.logging.set_verbosity_error()
    t.logging.disable_progress_bar()
    found = {}
    for family in asked.families:
        found[family] = limited(family)
        print(f"{family:28} {found[family][0]:10} {found[family][1]}", flush=True)
    if asked.page:
        asked.page.write_text(page(found) + "\n", "utf-8")
    return int(any(kind in ("wrong", "traceback") for kind, _ in found.values()))


if __name__ == "__main__":
    sys.exit(main())
