"""The Triton kernel against a plain loop: in the interpreter, compiled without a GPU, and on a GPU if there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fedspallm_appfl.pruning import triton_block
from fedspallm_appfl.tensors.target import NM, parse_target

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def case(width, outputs, target, **changes):
    """Arguments of `solve`: random weights, a random mask, and the factor of a random, well-conditioned matrix."""
    generator = torch.Generator().manual_seed(width * outputs)
    inputs = torch.randn(3 * width, width, generator=generator, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(inputs.T @ inputs / width), upper=True).float()
    kept = torch.rand(width, outputs, generator=generator) < 0.5
    weights = torch.randn(width, outputs, generator=generator)
    arguments = {"columns": weights, "kept": kept, "upper": upper, "importance": upper.diagonal() ** -2.0}
    return {**arguments, "target": parse_target(target), **changes}


def dead(arguments, columns):
    """Some inputs that are always zero: they cost nothing and reach no other column."""
    upper, importance = arguments["upper"].clone(), arguments["importance"].clone()
    importance[columns] = 0
    upper[columns], upper[:, columns] = 0, 0
    upper.diagonal()[columns] = 1
    return {**arguments, "upper": upper, "importance": importance}


def inside_a_larger_matrix(upper):
    larger = torch.full((2 * len(upper) + 1, 2 * len(upper) + 1), torch.nan)
    view = larger[3 : 3 + len(upper), 5 : 5 + len(upper)]
    view.copy_(upper)
    return view


def tied(target):
    """Magnitudes with many ties; nothing to round, as the factor is the identity."""
    weights = torch.randint(-2, 3, (16, 30), generator=torch.Generator().manual_seed(0)).float()
    return case(16, 30, target, columns=weights, upper=torch.eye(16), importance=torch.ones(16))


def with_upper(arguments, change):
    return {**arguments, "upper": change(arguments["upper"])}


CASES = {
    "ratio": case(32, 16, "0.5"),
    "2:4": case(32, 16, "2:4"),
    "4:8": case(32, 16, "4:8"),
    "1:16": case(32, 9, "1:16"),
    "groups of three": case(21, 10, "2:3"),
    "whole block": case(128, 3, "0.5"),
    "whole block 2:4": case(128, 3, "2:4"),
    "wide": case(136, 3, "4:8"),
    "ragged": case(37, 13, "0.5"),
    "one column": case(1, 5, "0.5"),
    "one output": case(20, 1, "2:4"),
    "ties 2:4": tied("2:4"),
    "ties 3:8": tied("3:8"),
    "no compensation": case(24, 10, "0.5", upper=torch.eye(24)),
    "dead inputs": dead(case(32, 12, "2:4"), [0, 1, 2, 9, 31]),
    "all dead": dead(case(16, 12, "2:4"), list(range(16))),
    "dead inputs, ratio": dead(case(32, 12, "0.5"), [4, 30]),
    "view": with_upper(case(28, 10, "2:4"), inside_a_larger_matrix),
    "column-major": with_upper(case(28, 10, "0.5"), lambda upper: upper.T.contiguous().T),
}


def oracle(columns, kept, upper, importance, target):
    """Algorithm 1 of the SparseGPT paper for one block, column by column in float64. Returns weights and mask."""
    w, u, kept = columns.double().clone(), upper.double(), kept.clone()
    for j in range(len(w)):
        if isinstance(target, NM) and j % target.group == 0:
            group = range(j, j + target.group)
            for row in range(w.shape[1]):
                order = sorted(group, key=lambda c: (bool(kept[c, row]), float(w[c, row] ** 2 * importance[c]), c))  # noqa: B023
                for place, c in enumerate(order):
                    kept[c, row] &= place >= target.group - target.kept
        error = w[j] * ~kept[j] / u[j, j]
        w[j] *= kept[j]
        for k in range(j + 1, len(w)):
            w[k] -= u[j, k] * error
    return w, kept


def solved(arguments, device="cpu"):
    """What `solve` makes of a case: weights and mask. For n:m the mask it is given says what goes first."""
    target = arguments["target"]
    columns, kept, importance = (arguments[name].to(device, copy=True) for name in ("columns", "kept", "importance"))
    upper = arguments["upper"] if device == "cpu" else arguments["upper"].to(device)
    triton_block.solve(columns, kept, upper, importance, target)
    return columns.cpu(), kept.cpu()


def check(arguments, weights, mask):
    expected, expected_mask = oracle(**arguments)
    assert torch.equal(mask, expected_mask)
    assert not weights[~mask].any()
    torch.testing.assert_close(weights, expected.float(), atol=2e-5, rtol=2e-5)


def run_this_file(what, folder, **environment):
    """Run a part of this file in a process of its own: Triton reads its environment when it is first imported."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), **environment}
    subprocess.run([sys.executable, __file__, what, str(folder / "results")], env=environment, check=True, timeout=240)
    return folder / "results"


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interpreted")
    return torch.load(run_this_file("interpret", folder, TRITON_INTERPRET="1"))


@pytest.mark.parametrize("name", CASES)
def test_a_block_is_solved_as_in_a_plain_loop(interpreted, name):
    check(CASES[name], *interpreted[name])


def test_it_compiles_for_gpus_without_one(tmp_path):
    """Types, shapes and layouts are right for the compiler proper, down to machine code."""
    pytest.importorskip("triton", minversion="3.3")  # the compiler's interface before was another
    sizes = run_this_file("compile", tmp_path, TRITON_INTERPRET="0").read_text().split()
    assert len(sizes) == 3
    assert all(int(size) > 0 for size in sizes)


@pytest.mark.parametrize("target", ["0.5", "2:4", "32:128"])
def test_ratios_and_groups_up_to_a_block_are_supported(target):
    assert triton_block.supports(parse_target(target))


def test_a_group_larger_than_a_block_is_not_supported():
    assert not triton_block.supports(NM(2, 2 * triton_block.LARGEST_BLOCK))


@pytest.mark.parametrize(("width", "target"), [(257, "0.5"), (30, "2:4")])
def test_a_block_that_does_not_fit_is_refused(width, target):
    with pytest.raises(ValueError, match=f"at most 256 columns in groups of .*, got {width}"):
        triton_block.solve(**case(width, 2, target))


def test_what_is_not_contiguous_is_refused():
    arguments = case(8, 8, "0.5")
    with pytest.raises(ValueError, match="contiguous"):
        triton_block.solve(**{**arguments, "columns": arguments["columns"].T})


def test_it_is_available_only_with_the_interpreter_or_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not triton_block.available()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_block.available()
    monkeypatch.setattr(triton_block, "find_spec", lambda name: None)
    assert not triton_block.available()


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_gpu) for name in CASES])
def test_a_block_is_solved_on_a_gpu(name):
    check(CASES[name], *solved(CASES[name], "cuda"))


@pytest.mark.parametrize("outputs", [pytest.param(outputs, marks=needs_gpu) for outputs in (4096, 11008)])
def test_a_block_of_a_large_matrix_is_solved_on_a_gpu(outputs):
    arguments = case(128, outputs, "0.5")
    check(arguments, *solved(arguments, "cuda"))


def machine_code_sizes():
    """Compile for a ratio and for patterns, the usual and the largest block, two generations of GPUs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = triton_block._kernel()
    types = ["*fp32", "*i1", "*fp32", "*fp32", *["i32"] * 4, *["constexpr"] * 4]
    signature = dict(zip(kernel.arg_names, types, strict=True))
    for capability, n, m, lanes in ((80, 0, 1, 128), (90, 2, 4, 128), (90, 4, 8, 256)):
        constants = {"n": n, "m": m, "lanes": lanes, "tile": triton_block.TILE}
        target = GPUTarget("cuda", capability, 32)
        options = {"num_warps": triton_block.WARPS, "enable_fp_fusion": True}
        yield len(triton.compile(ASTSource(kernel, signature, constants), target=target, options=options).asm["cubin"])


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        torch.save({name: solved(arguments) for name, arguments in CASES.items()}, sys.argv[2])
    else:
        Path(sys.argv[2]).write_text(" ".join(map(str, machine_code_sizes())))
