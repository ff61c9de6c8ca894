"""Least squares on a given support against a float64 solve of each row, and `compensate` of each pruner."""

import pytest
import torch

from fedspallm_appfl.errors import PruningError
from fedspallm_appfl.pruning import least_squares, sparsegpt
from fedspallm_appfl.pruning import statistics as gram
from fedspallm_appfl.pruning.least_squares import Correlation
from fedspallm_appfl.pruning.pruner import Prepared, Pruner
from fedspallm_appfl.pruning.registry import keeps_weights, new_statistic
from fedspallm_appfl.pruning.statistics import InputGram, InputNorms, lift
from fedspallm_appfl.settings.schema import PRUNERS, Pruning
from fedspallm_appfl.tensors.target import parse_target
from helpers.least_squares import DAMPING, correlated_inputs, error, matrix_of, normal, prepared, rounded, solve_oracle

KEEP_WEIGHTS = ("wanda", "magnitude")
WITH_REFIT = [("sparsegpt", True), ("wanda", True), ("admm", False)]


@pytest.fixture
def narrow_blocks(monkeypatch):
    """Several blocks of columns in matrices of a few dozen."""
    monkeypatch.setattr(sparsegpt, "block_width", lambda target: 16)


def random_mask(rows, columns, seed=9):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 40), (60, 33)])
def test_the_solution_is_that_of_the_normal_equations(shape, monkeypatch):
    monkeypatch.setattr(least_squares, "TOLERANCE", 0.0)
    monkeypatch.setattr(least_squares, "ROWS", 16)
    weight, mask, matrix = normal(*shape), random_mask(*shape), matrix_of(correlated_inputs(shape[1]))
    found = least_squares.refit(weight, mask, weight * mask, Correlation(matrix.clone(), DAMPING))
    torch.testing.assert_close(found.double(), solve_oracle(weight, mask, matrix), rtol=1e-3, atol=1e-3)
    assert not found[~mask].any()


@pytest.mark.parametrize("features", [24, 100, 200])
def test_it_stops_within_a_thousandth_of_the_least_error(features):
    weight, mask, matrix = normal(50, features), random_mask(50, features), matrix_of(correlated_inputs(features))
    found = least_squares.refit(weight, mask, weight * mask, Correlation(matrix.clone(), DAMPING))
    least = error(solve_oracle(weight, mask, matrix), weight, matrix)
    assert least <= error(found, weight, matrix) * (1 + 1e-6) <= least * 1.001
    assert error(weight * mask, weight, matrix) > 1.5 * least


def test_many_iterations_do_no_harm_once_a_row_is_solved(monkeypatch):
    monkeypatch.setattr(least_squares, "TOLERANCE", -1.0)
    monkeypatch.setattr(least_squares, "MOST_ITERATIONS", 500)
    weight, mask, matrix = normal(20, 30), random_mask(20, 30), matrix_of(correlated_inputs(30))
    mask[3], mask[4] = False, True
    found = least_squares.refit(weight, mask, weight * mask, Correlation(matrix.clone(), DAMPING))
    torch.testing.assert_close(found.double(), solve_oracle(weight, mask, matrix), rtol=1e-3, atol=1e-3)
    assert torch.equal(found[3], torch.zeros(30))


def test_the_solution_does_not_depend_on_the_start():
    weight, mask, matrix = normal(20, 48), random_mask(20, 48), matrix_of(correlated_inputs(48))
    starts = [weight * mask, torch.zeros(20, 48), 3 * normal(20, 48, seed=5) * mask]
    errors = [
        error(least_squares.refit(weight, mask, start, Correlation(matrix.clone(), DAMPING)), weight, matrix)
        for start in starts
    ]
    assert max(errors) < min(errors) * 1.001


@pytest.mark.parametrize(("pruner", "refit"), WITH_REFIT)
def test_kept_weights_of_dead_inputs_stay_as_they_were(pruner, refit):
    inputs, weight, mask = correlated_inputs(24), normal(10, 24), random_mask(10, 24)
    inputs[:, [0, 7, 23]] = 0
    matrix = matrix_of(inputs)
    found = prepared(pruner, "0.5", matrix, refit=refit).compensate(weight, mask)
    assert torch.equal(found[:, [0, 7, 23]], (weight * mask)[:, [0, 7, 23]])
    least = error(solve_oracle(weight, mask, matrix), weight, matrix)
    assert error(found, weight, matrix) <= least * 1.001


@pytest.mark.parametrize(("pruner", "refit"), WITH_REFIT)
def test_inputs_that_are_all_zero_leave_every_kept_weight_alone(pruner, refit):
    weight, mask = normal(4, 8), random_mask(4, 8)
    tool = prepared(pruner, "0.5", torch.zeros(8, 8), refit=refit)
    assert torch.equal(tool.compensate(weight, mask), weight * mask)
    pruned, chosen = tool.prune(weight)
    assert torch.equal(pruned, weight * chosen)


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("text", ["0", "0.5", "0.7", "2:4"])
def test_compensating_for_the_mask_that_prune_chose_gives_what_prune_gave(narrow_blocks, pruner, refit, text):
    weight, matrix = normal(24, 72), matrix_of(correlated_inputs(72))
    tool = prepared(pruner, text, matrix, refit=refit)
    given = weight.clone()
    pruned, mask = tool.prune(weight)
    again = tool.compensate(weight, mask)
    if pruner == "admm":  # the search hands its own start over
        assert error(again, weight, matrix) == pytest.approx(error(pruned, weight, matrix), rel=1e-3, abs=1e-7)
    else:
        assert torch.equal(again, pruned)
    assert torch.equal(weight, given)


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_any_mask_can_be_compensated_for(narrow_blocks, pruner, text):
    """A mask of other counts than the target, as the federation may agree on; also with half of a row empty."""
    weight, mask, matrix = normal(24, 72), random_mask(24, 72), matrix_of(correlated_inputs(72))
    mask[5, :36] = False
    found = prepared(pruner, text, matrix).compensate(weight, mask)
    assert not found[~mask].any()
    before, least = error(weight * mask, weight, matrix), error(solve_oracle(weight, mask, matrix), weight, matrix)
    if pruner in KEEP_WEIGHTS:
        assert torch.equal(found, weight * mask)
    else:
        assert least * (1 - 1e-6) <= error(found, weight, matrix) < 0.9 * before


@pytest.mark.parametrize("pruner", ["sparsegpt", "wanda"])
@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_a_refit_keeps_the_mask_and_finds_the_best_weights_for_it(pruner, text):
    weight, matrix = normal(40, 64), matrix_of(correlated_inputs(64))
    (plain, mask), (fitted, same) = (prepared(pruner, text, matrix, refit=r).prune(weight) for r in (False, True))
    assert torch.equal(mask, same)
    least = error(solve_oracle(weight, mask, matrix), weight, matrix)
    assert error(fitted, weight, matrix) <= 1.001 * least < error(plain, weight, matrix)


def test_a_refit_sees_the_gram_matrix_that_the_pruner_has_used_up():
    def halves(weight):
        mask = torch.arange(weight.numel()).view(weight.shape) % 2 == 0
        return weight * mask, mask

    def prepare(settings, statistic):
        statistic.upper.fill_(7.0)
        return Prepared(halves, lambda weight, mask: weight * mask)

    weight, matrix = normal(40, 64), matrix_of(correlated_inputs(64))
    own = Pruner("own", needs=InputGram, prepare=prepare)
    settings = Pruning("own", parse_target("0.5"), refit=True)
    fitted, mask = own.ready(settings, InputGram.of(matrix.clone(), 1)).prune(weight)
    assert error(fitted, weight, matrix) <= 1.001 * error(solve_oracle(weight, mask, matrix), weight, matrix)


@pytest.mark.parametrize("exponent", [-30, 30])
def test_the_scale_of_the_inputs_changes_nothing(exponent):
    weight, mask, matrix = normal(10, 24), random_mask(10, 24), matrix_of(correlated_inputs(24))
    for pruner, refit in WITH_REFIT:
        one, other = (
            prepared(pruner, "0.5", scale * matrix, refit=refit).compensate(weight, mask)
            for scale in (1.0, 2.0**exponent)
        )
        torch.testing.assert_close(one, other)


def test_inputs_and_weights_as_small_as_float16_can_hold():
    inputs, weight, mask = 1e-6 * correlated_inputs(24), (1e-6 * normal(10, 24)).half(), random_mask(10, 24)
    matrix = matrix_of(inputs)
    found = prepared("admm", "0.5", matrix).compensate(weight, mask)
    least = error(solve_oracle(weight.float(), mask, matrix), weight, matrix)
    assert found.dtype == torch.float32
    assert error(found, weight, matrix) <= 1.001 * least


def test_which_settings_keep_weights_and_what_they_need_to_know():
    def of(pruner, refit):
        settings = Pruning(pruner, parse_target("0.5"), refit=refit)
        statistic = new_statistic(settings, 4, torch.device("cpu"))
        return keeps_weights(settings), type(statistic)

    assert [of(pruner, False) for pruner in ("sparsegpt", "admm", "wanda", "magnitude")] == [
        (False, InputGram),
        (False, InputGram),
        (True, InputNorms),
        (True, type(None)),
    ]
    assert [of(pruner, True) for pruner in ("sparsegpt", "admm", "wanda", "magnitude")] == [
        (False, InputGram),
        (False, InputGram),
        (False, InputGram),
        (True, type(None)),
    ]


def test_a_stored_sum_needs_no_more_than_its_upper_half():
    weight, matrix = normal(6, 24), matrix_of(correlated_inputs(24))
    for pruner, refit in [*WITH_REFIT, ("sparsegpt", False), ("wanda", False)]:
        garbage = matrix.triu() + torch.full_like(matrix, 7.0).tril(-1)
        both = [prepared(pruner, "0.5", m, refit=refit).prune(weight) for m in (matrix, garbage)]
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    stored = InputGram.of(matrix, 33)
    assert (stored.upper is matrix, stored.tokens) == (True, 33)


@pytest.mark.parametrize("size", [1, 3, 8, 21])
def test_a_mirrored_matrix_is_symmetric(size, monkeypatch):
    monkeypatch.setattr(gram, "NARROWEST", 2)
    matrix = normal(size, size)
    expected = matrix.triu() + matrix.triu(1).T
    assert torch.equal(gram.mirror(matrix), expected)


def correlations(matrix):
    norms = matrix.diagonal().double().sqrt()
    return matrix.double() / norms / norms[:, None]


def lowest(matrix):
    return float(torch.linalg.eigvalsh(correlations(matrix)).min())


def test_lifting_a_rounded_gram_matrix_raises_its_diagonal_no_more_than_twice_what_it_takes():
    matrix = rounded(matrix_of(correlated_inputs(64, tokens=70)))
    lifted, missing = matrix.triu(), -lowest(matrix)
    assert missing > gram.LEAST_DAMPING
    lift(lifted)
    rise = lifted.diagonal() / matrix.diagonal() - 1
    torch.testing.assert_close(rise, rise[:1].expand(64), rtol=1e-3, atol=0)
    assert missing < float(rise[0]) < 2 * missing
    assert torch.equal(lifted.triu(1), matrix.triu(1))


def test_lifting_leaves_a_definite_matrix_and_dead_features_as_they_are():
    inputs = correlated_inputs(16)
    inputs[:, [2, 9]] = 0
    matrix = matrix_of(inputs)
    lifted = matrix.clone()
    lift(lifted)
    assert torch.equal(lifted, matrix)


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.3])
def test_damping_is_doubled_only_where_it_must_be(damping):
    matrix = torch.tensor([[1.0, 1.25], [1.25, 1.0]])  # eigenvalues 2.25 and -0.25
    added = gram.damp(matrix, damping)
    assert added == pytest.approx({0.0: 0.32, 0.01: 0.32, 0.3: 0.3}[damping])
    torch.testing.assert_close(matrix.diagonal(), torch.full((2,), 1 + added))
    assert gram.damp(torch.eye(3), damping) == damping


@pytest.mark.parametrize("wrong", ["nan", "inf", "1e9"])
def test_a_gram_matrix_that_can_be_none_is_an_error(wrong):
    matrix = torch.eye(4)
    matrix[0, 1] = float(wrong)
    with pytest.raises(PruningError, match="holds NaN, infinity or correlations above 1"):
        prepared("admm", "0.5", matrix)


@pytest.mark.parametrize(("pruner", "refit"), [("admm", False), ("wanda", True)])
def test_an_indefinite_gram_matrix_gets_more_damping_and_that_is_noted(pruner, refit):
    weight, exact = normal(30, 64), matrix_of(correlated_inputs(64, tokens=70))
    matrix = rounded(exact)
    tool = prepared(pruner, "0.5", matrix, refit=refit)
    assert -lowest(matrix) < tool.notes["damping"]
    pruned, mask = tool.prune(weight)
    assert error(pruned, weight, exact) < 0.7 * error(weight * mask, weight, exact)


@pytest.mark.parametrize("pruner", ["sparsegpt", "admm"])
def test_a_lifted_gram_matrix_needs_no_more_damping(pruner):
    matrix = rounded(matrix_of(correlated_inputs(64, tokens=70)))
    lift(matrix)
    assert prepared(pruner, "0.5", matrix).notes == {}
