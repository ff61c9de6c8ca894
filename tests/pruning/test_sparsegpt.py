"""SparseGPT against the published algorithm in float64, its exact counts, dead inputs and failing factorizations."""

import numpy as np
import pytest
import torch

from fedspallm_appfl.errors import PruningError
from fedspallm_appfl.pruning import sparsegpt
from fedspallm_appfl.pruning import statistics as gram
from fedspallm_appfl.pruning.registry import new_statistic, prepare
from fedspallm_appfl.pruning.sparsegpt import Factor
from fedspallm_appfl.pruning.statistics import InputGram, InputNorms
from fedspallm_appfl.settings.schema import Pruning
from fedspallm_appfl.tensors.target import NM, parse_target

DAMPING = 0.01


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(features, tokens=None, seed=0):
    """(tokens, features), features that share a few directions."""
    tokens = tokens or 2 * features
    return normal(tokens, features, seed=seed) + normal(tokens, 5, seed=seed + 1) @ normal(5, features, seed=seed + 2)


def gram_of(inputs):
    statistic = InputGram(inputs.shape[-1])
    statistic.add(inputs)
    return statistic


def gram_from(matrix):
    statistic = InputGram(len(matrix))
    statistic.upper = matrix.triu() + matrix.triu(1).T
    return statistic


def follow(weight, gram, target, block, mask):
    """Oracle: algorithm 1 of the SparseGPT paper in float64, a column at a time over all columns to its right.

    `U` is the upper Cholesky factor of the explicit inverse of `G + 0.01 mean(diag G) I`. It compensates for the given
    mask, so that a float tie does not send it another way, and checks each choice of that mask when it is due: the count is
    exact, and no pruned entry has a larger `w^2 / U_jj^2` than a kept one. Inputs that are always zero cost nothing, get
    a diagonal of 1 and leave other columns alone. Returns the weights.
    """
    w, h, mask = weight.double().numpy().copy(), gram.double().numpy().copy(), mask.numpy()
    damping, dead = DAMPING * h.diagonal().mean(), h.diagonal() == 0
    h[dead, dead] = 1
    u = np.linalg.cholesky(np.linalg.inv(h + damping * np.eye(len(h)))).T
    cost = np.where(dead, 0, u.diagonal() ** -2.0)

    def check(rows, columns, count):
        scores, kept = w[rows, columns] ** 2 * cost[columns], mask[rows, columns]
        assert (~kept).sum() == count
        assert scores[~kept].max(initial=0) <= scores[kept].min(initial=np.inf) * (1 + 1e-4)

    for j in range(len(h)):
        if isinstance(target, NM) and j % target.group == 0:
            for row in range(len(w)):
                check(row, slice(j, j + target.group), target.group - target.kept)
        elif not isinstance(target, NM) and j % block == 0:
            end = min(j + block, len(h))
            check(slice(None), slice(j, end), target.zeros(end * len(w)) - target.zeros(j * len(w)))
        error = np.where(mask[:, j] | dead[j], 0, w[:, j] / u[j, j])
        w[:, j] *= mask[:, j]
        w[:, j + 1 :] -= np.outer(error, u[j, j + 1 :])
    return torch.from_numpy(w).float()


def assert_as_published(weight, statistic, text, block=128):
    target, given = parse_target(text), weight.clone()
    width = sparsegpt.block_width(target, block)
    pruned, mask = sparsegpt.prune(weight, target, Factor(statistic, DAMPING, 0, width))
    expected = follow(weight, statistic.matrix(), target, width, mask)
    torch.testing.assert_close(pruned, expected, rtol=1e-4, atol=1e-4)
    assert int((~mask).sum()) == target.zeros(weight.numel())
    assert not pruned[~mask].any()
    assert torch.equal(weight, given)


@pytest.mark.parametrize("text", ["0.3", "0.5", "0.7", "2:4", "4:8"])
@pytest.mark.parametrize("shape", [(40, 24), (16, 72), (24, 200), (8, 320)])
def test_weights_and_masks_are_those_of_the_published_algorithm(shape, text):
    assert_as_published(normal(*shape), gram_of(correlated_inputs(shape[1])), text)


@pytest.mark.parametrize("block", [8, 30, 32, 1000])
@pytest.mark.parametrize("text", ["0.5", "1:4", "2:3", "4:8"])
def test_every_size_of_column_block_follows_the_algorithm(text, block):
    assert_as_published(normal(12, 72), gram_of(correlated_inputs(72)), text, block)


@pytest.mark.parametrize("text", ["0.1", "0.6", "2:4"])
def test_dead_inputs_follow_the_algorithm_and_cost_nothing(text):
    inputs = correlated_inputs(48, tokens=400)
    inputs[:, ::6] = 0
    assert_as_published(normal(20, 48), gram_of(inputs), text, 16)


def test_weights_of_dead_inputs_go_first_and_those_that_stay_are_as_they_were():
    inputs, weight = correlated_inputs(16), normal(10, 16)
    inputs[:, [3, 11]] = 0
    factor = Factor(gram_of(inputs), DAMPING, 0)
    assert factor.dead.nonzero().flatten().tolist() == [3, 11]
    pruned, mask = sparsegpt.prune(weight, parse_target("0.1"), factor)
    assert int((~mask[:, [3, 11]]).sum()) == 16
    for column in (3, 11):
        assert torch.equal(pruned[:, column], weight[:, column] * mask[:, column])
    rest = [j for j in range(16) if j not in (3, 11)]
    assert torch.equal(pruned[:, rest], weight[:, rest])


def test_inputs_that_are_all_zero_leave_every_kept_weight_alone():
    weight = normal(4, 8)
    pruned, mask = sparsegpt.prune(weight, parse_target("0.5"), Factor(gram_of(torch.zeros(5, 8)), DAMPING, 0))
    assert mask.flatten().tolist() == [False] * 16 + [True] * 16
    assert torch.equal(pruned, weight * mask)


@pytest.mark.parametrize(
    ("shape", "text"), [((7, 13), "0.37"), ((1, 1), "0.99"), ((5, 130), "0.5"), ((3, 300), "0.123")]
)
def test_exactly_floor_of_s_times_the_entries_are_zero(shape, text):
    target, weight = parse_target(text), normal(*shape)
    pruned, mask = sparsegpt.prune(weight, target, Factor(gram_of(correlated_inputs(shape[1])), DAMPING, 0))
    assert int((~mask).sum()) == int((pruned == 0).sum()) == target.zeros(weight.numel())


def test_equal_scores_go_by_row_then_by_column():
    factor = Factor(gram_from(torch.eye(4)), DAMPING, 0)
    _, mask = sparsegpt.prune(torch.ones(2, 4), parse_target("0.75"), factor)
    assert mask.tolist() == [[False] * 4, [False, False, True, True]]
    _, mask = sparsegpt.prune(torch.ones(2, 4), parse_target("2:4"), factor)
    assert mask.tolist() == [[False, False, True, True]] * 2


def test_a_ratio_of_zero_changes_nothing():
    weight = normal(6, 40)
    pruned, mask = sparsegpt.prune(weight, parse_target(0), Factor(gram_of(correlated_inputs(40)), DAMPING, 0))
    assert torch.equal(pruned, weight)
    assert mask.all()


def test_compensation_lowers_the_error_of_the_output():
    inputs, weight = correlated_inputs(64), normal(32, 64)
    pruned, mask = sparsegpt.prune(weight, parse_target("0.5"), Factor(gram_of(inputs), DAMPING, 0))
    assert ((weight - pruned) @ inputs.T).norm() < 0.8 * ((weight - weight * mask) @ inputs.T).norm()


@pytest.mark.parametrize("dead", [[], [2, 9]])
def test_the_scale_of_the_gram_matrix_changes_nothing(dead):
    matrix = gram_of(correlated_inputs(24)).matrix()
    matrix[dead] = matrix[:, dead] = 0
    for exponent in (-16, 16):
        runs = [
            sparsegpt.prune(normal(8, 24), parse_target("0.5"), Factor(gram_from(scale * matrix), DAMPING, 0))
            for scale in (1.0, 2.0**exponent)
        ]
        assert torch.equal(runs[0][1], runs[1][1])
        torch.testing.assert_close(runs[0][0], runs[1][0])


def test_one_block_as_wide_as_the_matrix_holds_the_factor_of_the_damped_inverse():
    statistic = gram_of(correlated_inputs(20))
    factor, matrix = Factor(statistic, DAMPING, 0), statistic.matrix().double()
    damped = matrix + DAMPING * matrix.diagonal().mean() * torch.eye(20)
    upper = factor.corner(slice(0, 20)).double()
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(20).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(factor.importance.double(), upper.diagonal() ** -2, rtol=1e-4, atol=0)
    assert (factor.attempts, factor.damping) == (1, DAMPING)


def test_narrower_blocks_hold_what_carries_the_loss_of_finished_columns_over():
    whole, narrow = (Factor(gram_of(correlated_inputs(20)), DAMPING, 0, width) for width in (20, 7))
    upper = whole.corner(slice(0, 20)).double()
    for block in narrow.blocks:
        torch.testing.assert_close(narrow.corner(block).double(), upper[block, block], rtol=1e-3, atol=1e-5)
        # D R_b U_bb is what U_ab would have taken for the errors E = D U_aa^-1 of the finished columns a
        a = slice(0, block.start)
        errors_to_loss = torch.linalg.inv(upper[a, a])
        expected = -errors_to_loss @ upper[a, block]
        torch.testing.assert_close(narrow.carry(block).T.double(), expected, rtol=1e-3, atol=1e-5)


def test_a_singular_matrix_is_tried_again_with_ten_times_the_damping():
    statistic = gram_from(torch.ones(8, 8))
    factor = Factor(statistic, 1e-9, 6)
    assert factor.attempts > 2
    assert factor.damping == pytest.approx(1e-9 * 10 ** (factor.attempts - 1))
    direct = Factor(statistic, factor.damping, 0)
    whole = slice(0, 8)
    torch.testing.assert_close(factor.corner(whole), direct.corner(whole), rtol=1e-2, atol=1e-2)
    settings = Pruning("sparsegpt", parse_target("0.5"), damping=1e-9, damping_retries=6)
    assert prepare(settings, statistic).notes == {"damping": factor.damping}


def test_a_raised_damping_replaces_the_lower_ones():
    matrix = 2.0 * torch.eye(3)
    matrix[0, 1] = 2.5
    factor = Factor(gram_from(matrix), 0.01, 2)
    assert (factor.attempts, factor.damping) == (3, 1.0)
    torch.testing.assert_close(factor.corner(slice(0, 3))[2, 2].item(), 0.5)


def test_a_matrix_that_can_never_be_factored_is_an_error_that_says_what_to_do():
    statistic = gram_from(torch.eye(4) + torch.full((4, 4), 1e3).triu(1))
    message = "failed 4 times, at last with damping 10; give more or more varied calibration text, a larger `damping`"
    with pytest.raises(PruningError, match=message):
        prepare(Pruning("sparsegpt", parse_target("0.5")), statistic)


def test_prepare_prunes_with_the_settings_and_notes_nothing_when_all_is_well(monkeypatch):
    monkeypatch.setattr(sparsegpt, "block_width", lambda target: 8)
    settings, statistic, weight = Pruning("sparsegpt", parse_target("0.5")), InputGram(24), normal(6, 24)
    assert isinstance(new_statistic(settings, 24, torch.device("cpu")), InputGram)
    statistic.add(correlated_inputs(24))
    prepared = prepare(settings, statistic)
    expected = sparsegpt.prune(weight, settings.sparsity, Factor(statistic, DAMPING, 3, 8))
    assert prepared.notes == {}
    assert all(torch.equal(one, other) for one, other in zip(prepared.prune(weight), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gram_matrix_is_the_sum_over_all_tokens(monkeypatch, dtype):
    monkeypatch.setattr(gram, "NARROWEST", 4)
    statistic, norms = InputGram(11), InputNorms(11)
    batches = [torch.randint(-3, 4, (2, 5, 11), generator=torch.Generator().manual_seed(s)).to(dtype) for s in (0, 1)]
    for batch in batches:
        statistic.add(batch)
        norms.add(batch)
    rows = torch.cat(batches).reshape(-1, 11).float()
    assert torch.equal(statistic.matrix(), rows.T @ rows)
    assert torch.equal(statistic.diagonal(), norms.diagonal())
    assert torch.equal(norms.diagonal(), rows.square().sum(0))
    assert statistic.tokens == norms.tokens == 20
