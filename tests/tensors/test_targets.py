"""Patterns that name matrices, and the target of each matrix."""

import pytest

from fedspallm_appfl.tensors.patterns import matches, near
from fedspallm_appfl.tensors.target import parse_target
from fedspallm_appfl.tensors.targets import Targets, parse_sparsity

MATRICES = [(block, name) for block in range(4) for name in ("self_attn.q_proj", "mlp.down_proj")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("2", [(2, "self_attn.q_proj"), (2, "mlp.down_proj")]),
        ("blocks.2", [(2, "self_attn.q_proj"), (2, "mlp.down_proj")]),
        ("1-2.mlp", [(1, "mlp.down_proj"), (2, "mlp.down_proj")]),
        ("blocks.0,2-3.*.q_proj", [(0, "self_attn.q_proj"), (2, "self_attn.q_proj"), (3, "self_attn.q_proj")]),
        ("blocks.*.self_attn.*", [(block, "self_attn.q_proj") for block in range(4)]),
        ("down_proj", [(block, "mlp.down_proj") for block in range(4)]),
        ("*.down_proj", [(block, "mlp.down_proj") for block in range(4)]),
        ("*", MATRICES),
        ("down", []),  # whole parts of a name only
        ("4-9", []),
        ("lm_head", []),
    ],
)
def test_a_pattern_means_blocks_names_or_both(pattern, expected):
    assert [one for one in MATRICES if matches(pattern, *one)] == expected


def test_what_might_have_been_meant():
    assert near("*.dwn_proj", MATRICES).startswith("did you mean down_proj")
    assert "self_attn" in near("attn", MATRICES)
    assert near("blocks.7", MATRICES).endswith("The blocks with something to prune are 0 to 3")


def test_the_last_pattern_that_means_a_matrix_decides():
    sparsity = parse_sparsity({"default": 0.5, "blocks.0-1": 0.3, "*.down_proj": "2:4", 1: 0})
    found = {one: str(sparsity.of(*one)) for one in MATRICES}
    assert found == {
        (0, "self_attn.q_proj"): "0.3",
        (0, "mlp.down_proj"): "2:4",
        (1, "self_attn.q_proj"): "0",
        (1, "mlp.down_proj"): "0",
        **{(block, "self_attn.q_proj"): "0.5" for block in (2, 3)},
        **{(block, "mlp.down_proj"): "2:4" for block in (2, 3)},
    }
    assert str(sparsity) == "0.5, blocks.0-1 0.3, *.down_proj 2:4, 1 0"
    assert parse_sparsity(sparsity.plain()) == sparsity
    assert sparsity.with_default(parse_target(0.7)).of(2, "self_attn.q_proj") == parse_target(0.7)


@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_a_single_target_is_that_of_all(text):
    target = parse_target(text)
    assert parse_sparsity({"default": text}) == parse_sparsity(text) == target == target.of(3, "q") == target.default
    assert str(parse_sparsity(text)) == text
    assert not isinstance(target, Targets)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"blocks.0": 0.3}, "names the default too"),
        ({"default": 0.5, "blocks.0": 1.5}, r"blocks.0: sparsity is a share in \[0, 1\)"),
        ([0.4, 0.5, 0.5, 0.6], r'written \{default: 0.5, "blocks.0": 0.4, "blocks.3": 0.6\}'),
        ([], "one target, or a mapping"),
    ],
)
def test_what_is_no_target_is_refused(value, says):
    with pytest.raises(ValueError, match=says):
        parse_sparsity(value)
