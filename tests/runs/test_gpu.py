"""On a CUDA device: the same masks as on the CPU but for rounding, and a placement that finds it."""

import pytest
import torch

from fedspallm_appfl.aggregation.l0_mean import L0Sums, l0_mean
from fedspallm_appfl.devices import choose_device
from fedspallm_appfl.models.lazy_model import LazyModel
from fedspallm_appfl.pruning.statistics import InputGram
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.sparsity import smallest
from fedspallm_appfl.tensors.target import parse_target
from helpers.families import save_family, windows
from helpers.rounds import prune_blocks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_a_gpu_prunes_as_the_cpu_does(tmp_path, pruner, sparsity):
    folder = str(save_family("llama", tmp_path))
    settings = Pruning(pruner, parse_target(sparsity))
    on = {d: dict(prune_blocks(LazyModel(folder, device=d), windows(), {0}, settings)) for d in ("cpu", "cuda")}
    for name, expected in on["cpu"][0].items():
        got = on["cuda"][0][name]
        assert (got.mask.cpu() == expected.mask).float().mean() > 0.999
        same = got.mask.cpu() == expected.mask
        torch.testing.assert_close(got.weight.cpu()[same], expected.weight[same], atol=1e-3, rtol=1e-2)


def test_sums_on_a_gpu_are_the_same_bits():
    weights = torch.randn(4, 64, 96, generator=torch.Generator().manual_seed(0)).half()
    results = []
    for device in ("cpu", "cuda"):
        sums = L0Sums.empty((64, 96), weighted=False, device=device)
        for weight in weights.to(device):
            sums.add(weight * (weight > 0), weight > 0)
        results.append(l0_mean(sums).cpu())
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gram_matrix_of_halves_is_as_good_as_one_in_float32(dtype):
    rows = torch.randn(4096, 640, generator=torch.Generator().manual_seed(0)).to(dtype).cuda()
    grams = []
    for inputs in (rows, rows.float()):
        gram = InputGram(640, "cuda")
        gram.add(inputs[:1000])
        gram.add(inputs[1000:])
        grams.append(gram.matrix().cpu().double())
    exact = rows.double().T.cpu() @ rows.double().cpu()
    off = [float((gram - exact).norm() / exact.norm()) for gram in grams]
    assert off[0] < 2 * off[1] + 1e-6


def test_a_gpu_chooses_the_entries_that_the_cpu_chooses():
    scores = torch.randint(0, 50, (200_000,), generator=torch.Generator().manual_seed(0)).float()  # many ties
    for count in (1, 70_001, 199_999):
        assert torch.equal(smallest(scores.cuda(), count).cpu(), smallest(scores, count))


def test_auto_finds_the_gpu():
    assert choose_device("auto", 0) == "cuda:0"
