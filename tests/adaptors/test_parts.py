"""A message whose tensors went elsewhere counts once everything of it has been told."""

from fedspallm_appfl.adaptors.parts import Note, Parts
from fedspallm_appfl.rounds.folds.intake import Receipt


def test_a_message_waits_for_all_of_its_parts_whatever_comes_first():
    for order in ("message first", "a note first"):
        parts = Parts()
        first = Note(7, {"a": Receipt({(0, "q"): True}, 3, {0: 3})}, [])
        second = Note(7, {"a": Receipt({(0, "k"): False}, 2, {0: 2}), "b": Receipt({(1, "q"): True}, 1, {1: 1})}, [])
        if order == "message first":
            parts.waiting[7] = [1, 2], "told"
            assert parts.whole(7) is None
            parts.notes[7] = [first]
        else:
            parts.notes[7] = [first]
            assert parts.whole(7) is None
            parts.waiting[7] = [1, 2], "told"
        assert parts.whole(7) is None
        parts.notes[7].append(second)
        message, receipts = parts.whole(7)
        assert message == "told"
        assert receipts["a"] == Receipt({(0, "q"): True, (0, "k"): False}, 5, {0: 5})
        assert receipts["a"].blocks == {0} and receipts["b"].blocks == {1}
        assert parts.whole(7) is None and not parts.notes and not parts.waiting


def test_a_message_without_parts_is_whole_at_once():
    parts = Parts()
    parts.waiting[3] = [], "told"
    assert parts.whole(3) == ("told", {})


def test_what_one_rank_refuses_is_noted_first_of_all():
    receipt = Receipt()
    receipt.add(Receipt(refused="refused: NaN"))
    receipt.add(Receipt({(0, "q"): True}, 3, {0: 3}))
    receipt.add(Receipt(refused="refused: later"))
    assert receipt == Receipt({(0, "q"): True}, 3, {0: 3}, "refused: NaN")
