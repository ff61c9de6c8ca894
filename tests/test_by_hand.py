"""The pruners as functions of one matrix, against the classes that runs use."""

import pytest
import torch

import fedspallm_appfl as fs
from fedspallm_appfl.pruning import registry

WEIGHT, INPUTS = torch.randn(8, 16, generator=torch.manual_seed(0)), torch.randn(50, 16)
GRAM = INPUTS.T @ INPUTS


@pytest.mark.parametrize("target", [0.5, "2:4", fs.parse_target("0.75")])
def test_they_prune_as_a_run_does(target):
    settings = {name: fs.Pruning(name, fs.parse_target(str(target))) for name in registry.BUILT_IN}
    norms = fs.InputNorms.of(GRAM.diagonal().clone(), 50)
    before = GRAM.clone()
    for name, statistic, made in (
        ("sparsegpt", fs.InputGram.of(GRAM.clone(), 50), fs.sparsegpt(WEIGHT, GRAM, target)),
        ("admm", fs.InputGram.of(GRAM.clone(), 50), fs.admm(WEIGHT, GRAM, target)),
        ("wanda", norms, fs.wanda(WEIGHT, GRAM.diagonal(), target)),
        ("magnitude", None, fs.magnitude(WEIGHT, target)),
    ):
        for mine, expected in zip(made, registry.prune(WEIGHT, settings[name], statistic), strict=True):
            assert torch.equal(mine, expected)
        assert int((made[1] == 0).sum()) == fs.parse_target(str(target)).zeros(128)
    assert torch.equal(GRAM, before)


def test_wrong_shapes_and_targets_are_refused():
    for wrong, words in (
        (lambda: fs.sparsegpt(WEIGHT, GRAM[:4], 0.5), "I = 16, got"),
        (lambda: fs.wanda(WEIGHT, GRAM, 0.5), "I = 16, got"),
        (lambda: fs.magnitude(WEIGHT[0], 0.5), "weight is a tensor"),
        (lambda: fs.magnitude(WEIGHT, "3:5"), "5"),
        (lambda: fs.magnitude(WEIGHT, 1.0), r"\[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
