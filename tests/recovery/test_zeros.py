"""Zeros that stay zero while a model is trained elsewhere: full fine-tuning, LoRA and its merge, transformers' Trainer."""

import gc
import weakref
from itertools import chain

import pytest
import torch
from torch import nn
from torch.optim import optimizer as of_torch
from transformers import Trainer, TrainingArguments

import fedspallm_appfl as fs
from helpers.families import FAMILIES, MIXTURES

TOKENS = torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(0))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pruned(family="llama", dtype=torch.float32):
    """A random model, half of each matrix of its blocks zero."""
    torch.manual_seed(0)
    model = (FAMILIES | MIXTURES)[family]()
    with torch.no_grad():
        for _, weight in matrices(model):
            weight[torch.rand(weight.shape) < 0.5] = 0
    return model.to(dtype)


def matrices(model):
    """The weights of linears in blocks, and of experts."""
    dense = ("bias", "router.weight", "gate.weight")
    inside = [(n, p) for n, p in model.named_parameters() if "layers." in n or ".h." in n]
    return [(n, p) for n, p in inside if p.dim() > 1 and not n.endswith(dense)]


def zeros_of(model):
    return {name: weight == 0 for name, weight in matrices(model)}


def filled(model, before):
    """Entries of the model that were zero and are not."""
    return sum(int((weight[before[name]] != 0).sum()) for name, weight in matrices(model))


def train(model, optimizer, steps=4):
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [adamw, sgd])
def test_full_fine_tuning_fills_zeros_unless_they_are_kept(make, dtype):
    model = pruned(dtype=dtype)
    before, first = zeros_of(model), {name: weight.clone() for name, weight in matrices(model)}
    with fs.keep_sparsity(model) as zeros:
        train(model, make(model.parameters()))
        remembered = sum(int(zero.sum()) for zero in before.values())
        assert filled(model, before) == 0
        assert all(not torch.equal(weight, first[name]) for name, weight in matrices(model))
        found = zeros.count()
        assert (found.remembered, found.lost) == (remembered, 0)
        assert found.zeros == sum(int((weight == 0).sum()) for _, weight in matrices(model))
        assert found.sparsity == found.zeros / sum(weight.numel() for _, weight in matrices(model))
    train(model, make(model.parameters()), 1)  # released
    assert zeros.count().lost == filled(model, before) > remembered // 3
    zeros.apply()
    assert zeros.count().lost == filled(model, before) == 0


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt-oss"])
def test_transposed_weights_and_fused_experts_keep_theirs(family):
    model = pruned(family)
    before = zeros_of(model)
    zeros = fs.keep_sparsity(model)
    train(model, adamw(model.parameters()), 2)
    found = zeros.count()
    assert filled(model, before) == found.lost == 0
    assert found.entries == sum(weight.numel() for _, weight in matrices(model))


def test_a_gradient_counts_only_where_weights_are_kept():
    model = pruned()
    fs.keep_sparsity(model)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for name, weight in matrices(model):
        assert int(weight.grad[weight == 0].count_nonzero()) == 0, name
        assert int(weight.grad[weight != 0].count_nonzero()) > 0, name


def test_two_models_are_kept_apart_and_a_model_takes_its_hooks_along():
    gc.collect()
    hooks = len(of_torch._global_optimizer_post_hooks)
    first, second = pruned(), pruned("gpt2")
    for model in (first, second):
        fs.keep_sparsity(model)
    before = zeros_of(first), zeros_of(second)
    together = adamw(chain(first.parameters(), second.parameters()))
    train(first, together, 1)
    train(second, together, 1)
    assert filled(first, before[0]) == filled(second, before[1]) == 0
    gone = weakref.ref(first)
    del first, together, model
    gc.collect()
    assert gone() is None and len(of_torch._global_optimizer_post_hooks) == hooks + 1
    train(second, adamw(second.parameters()), 1)
    assert filled(second, before[1]) == 0


class LoRA(nn.Module):
    """W + B A, with W frozen."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

    @torch.no_grad()
    def merged(self):
        return self.base.weight + self.up.weight @ self.down.weight


@pytest.mark.parametrize("replaced", [False, True])
def test_lora_is_merged_under_the_mask(replaced):
    model = pruned()
    before = zeros_of(model)
    zeros = fs.keep_sparsity(model)
    linears = {name: one for name, one in model.model.layers.named_modules() if isinstance(one, nn.Linear)}
    adapters = {}
    for name, linear in linears.items():
        path, _, last = name.rpartition(".")
        adapters[name] = LoRA(linear)
        setattr(model.model.layers.get_submodule(path), last, adapters[name])
    train(model, adamw([p for p in model.parameters() if p.requires_grad]))
    assert zeros.count().lost == 0
    wanted = {}
    for name, adapter in adapters.items():
        path, _, last = name.rpartition(".")
        wanted[f"model.layers.{name}.weight"] = adapter.merged()
        if replaced:
            adapter.base.weight = nn.Parameter(adapter.merged())
        else:
            adapter.base.weight.data += adapter.up.weight @ adapter.down.weight
        setattr(model.model.layers.get_submodule(path), last, adapter.base)
    assert filled(model, before) > 0.9 * zeros.count().remembered  # what merging does
    zeros.apply()
    for name, weight in matrices(model):
        assert torch.equal(weight, wanted[name].masked_fill(before[name], 0)), name
    assert zeros.count().lost == 0


def test_lora_of_peft_is_merged_under_the_mask():
    peft = pytest.importorskip("peft")
    model = pruned()
    before = zeros_of(model)
    zeros = fs.keep_sparsity(model)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    with pytest.raises(fs.ModelError, match="has adapters already"):
        fs.keep_sparsity(model)
    train(tuned, adamw([p for p in tuned.parameters() if p.requires_grad]))
    merged = tuned.merge_and_unload()
    assert zeros.count().lost > 0
    zeros.apply()
    assert merged is model and filled(merged, before) == 0


def trainer(model, folder, **more):
    arguments = TrainingArguments(
        folder, max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True
    )
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    return Trainer(model, arguments, train_dataset=rows, optimizers=(sgd(model.parameters()), None), **more)


@pytest.mark.parametrize("callback", [False, True])
def test_trainer_keeps_zeros_by_the_hook_or_by_the_callback_alone(callback, tmp_path):
    pytest.importorskip("accelerate")
    model = pruned()
    before = zeros_of(model)
    zeros = fs.keep_sparsity(model)
    if callback:
        zeros.release()  # as if the optimizer were none of torch
    trainer(model, tmp_path, callbacks=[zeros.callback()] if callback else []).train()
    assert filled(model, before) == 0
    other = pruned()
    trainer(other, tmp_path).train()
    assert filled(other, before) > 0
    with pytest.raises(fs.ModelError, match="is not in this model"):
        trainer(pruned(), tmp_path, callbacks=[zeros.callback()]).train()


def test_what_cannot_be_kept_is_refused():
    model = FAMILIES["llama"]()
    with pytest.raises(fs.ModelError, match="none of its 21 prunable weights holds a zero"):
        fs.keep_sparsity(model)
    with pytest.raises(fs.ModelError, match="on meta"):
        fs.keep_sparsity(FAMILIES["llama"]().to("meta"))
    model = pruned()
    model.model.layers[1].mlp.up_proj.weight.data.zero_()
    with pytest.raises(fs.ModelError, match=r"model.layers.1.mlp.up_proj.weight is zero as a whole"):
        fs.keep_sparsity(model)
    model = pruned()
    zeros = fs.keep_sparsity(model)
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 48)
    with pytest.raises(fs.ModelError, match=r"the module of model.layers.0.mlp.up_proj.weight is not in this model"):
        zeros.count()


def test_parameters_in_the_place_of_others_end_the_training():
    """As FSDP does it: a flat parameter of another shape, or a tensor that is none."""
    model = pruned()
    fs.keep_sparsity(model)
    optimizer, linear = adamw(model.parameters()), model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.data.flatten()[:700])
    with pytest.raises(fs.ModelError, match=r"up_proj.weight \[48, 32\] is no parameter of that shape, but \[700\]"):
        optimizer.step()
    linear.weight = None
    with pytest.raises(fs.ModelError, match=r"up_proj.weight \[48, 32\] is no parameter any more"):
        optimizer.step()
