"""A run at work, as its file of events tells while it grows."""

import io
import json

import pytest
from rich.console import Console

from fedspallm_appfl.errors import ModelError
from fedspallm_appfl.reports.watching.following import Followed
from fedspallm_appfl.reports.watching.picture import Picture
from fedspallm_appfl.reports.watching.watched import Watched


def event(kind, time, **fields):
    return {"event": kind, **fields, "time": time}


def upload(client, message, time, block, messages=2, round_index=0, counted=(0, 1), exchanges=1):
    where = {"round": round_index, "exchange": 0, "exchanges": exchanges, "counted": counted and [*counted]}
    sent = {"message": message, "messages": messages, "block_bytes": {str(block): 500}, "bytes": 500}
    return event("upload", time, client=client, blocks=str(block), **where, **sent)


def start(time=0.0, clients=("ann", "bob"), rounds=1):
    return event("start", time, clients=[*clients], rounds=rounds, version="1")


def watched(*events, recovery=0):
    run = Watched(recovery)
    for one in events:
        run.take(one)
    return run


def line(one):
    return json.dumps(one) + "\n"


def test_a_file_is_awaited_and_a_line_that_is_not_whole_too(tmp_path):
    file = tmp_path / "metrics.jsonl"
    followed = Followed(file)
    assert followed.news() == (False, [])
    first, second = line(start()), line(event("ready", 1.0))
    file.write_text(first + second[:9])
    assert followed.news() == (False, [start()])
    assert followed.news() == (False, [])
    with file.open("a") as opened:
        opened.write(second[9:])
    assert followed.news() == (False, [event("ready", 1.0)])
    assert [one.name for one in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert followed.written == file.stat().st_mtime


@pytest.mark.parametrize("longer", [False, True])
def test_another_run_in_the_same_place_is_read_from_its_beginning(tmp_path, longer):
    """Its file may be longer than the one before was, by the time of the next look."""
    file = tmp_path / "metrics.jsonl"
    file.write_text(line(start()) + line(event("ready", 1.0)))
    followed = Followed(file)
    followed.news()
    file.unlink()
    file.write_text(line(start(clients=("x" * 500 * longer,))))
    anew, news = followed.news()
    assert anew and [one["event"] for one in news] == ["start"]
    file.unlink()
    assert followed.news() == (True, [])
    assert followed.news() == (False, [])


def test_a_file_that_is_cut_in_place_is_another_one(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(line(start()) + line(event("ready", 1.0)))
    followed = Followed(file)
    followed.news()
    file.write_text(line(start()))
    assert followed.news() == (True, [start()])


def test_a_line_that_is_no_event_is_told_with_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(line(start()) + "{}\n")
    with pytest.raises(ModelError, match="line 2 of .*metrics.jsonl is no event"):
        Followed(tmp_path / "metrics.jsonl").news()


def test_what_clients_have_sent_and_the_time_left():
    """Of 2 clients with 2 messages each the pace is that of uploads after the second: 10 s for one, so 10 s more."""
    block = event("block", 31.0, round=0, block=0, of=2)
    run = watched(start(), upload("ann", 0, 10.0, 0), upload("bob", 0, 20.0, 0), upload("ann", 1, 30.0, 1), block)
    assert {name: (one.state, one.blocks, one.nbytes, one.heard) for name, one in run.clients.items()} == {
        "ann": ("has sent all", {"0", "1"}, 1000, 30.0),
        "bob": ("at work", {"0"}, 500, 20.0),
    }
    assert (run.stage, run.pace.done, run.pace.total, run.seconds_left) == ("pruning", 3, 4, 10.0)
    assert (run.closed, run.blocks, run.over) == ({0}, 2, False)
    run.take(upload("bob", 1, 41.0, 1))
    assert run.seconds_left is None


def test_who_has_a_further_exchange_has_not_sent_all():
    run = watched(start(), upload("ann", 0, 1.0, 0, messages=1, exchanges=2), upload("bob", 0, 2.0, 0, messages=1))
    assert [one.state for one in run.clients.values()] == ["at work", "has sent all"]


def test_blocks_are_counted_in_each_round():
    done = [event("block", 2.0, round=0, block=number, of=2) for number in range(2)]
    run = watched(start(rounds=2), upload("ann", 1, 1.0, 0), *done, event("round", 3.0, round=0))
    assert (run.closed, run.stage) == ({0, 1}, "pruning")
    run.take(upload("ann", 0, 4.0, 0, round_index=1))
    assert (run.closed, run.round, run.clients["ann"].blocks, run.clients["ann"].nbytes) == (set(), 1, {"0"}, 1000)


def test_recovery_and_keys_of_secure_sums_are_told_apart_from_pruning():
    run = watched(start(), upload("ann", 0, 1.0, 0, counted=None), recovery=1)
    assert (run.stage, run.pace.total) == ("exchanging keys of secure sums", 0)
    run.take(upload("ann", 0, 2.0, 0, counted=(0, 2)))
    assert run.stage == "pruning"
    run.take(event("training", 2.5, turn=0, clients=["ann", "bob"]))
    run.take(event("step", 2.7, turn=0, client="bob", step=3, of=16))
    assert [one.state for one in run.clients.values()] == ["training", "step 3 of 16"]
    assert (run.stage, run.clients["bob"].heard) == ("recovery", 2.7)
    run.take(upload("ann", 0, 3.0, 0, counted=(1, 2)))
    assert run.stage == "recovery"


def test_a_run_that_goes_on_is_not_over():
    sent = [upload(client, 0, time, 0) for client, time in (("ann", 1.0), ("bob", 1.0), ("ann", 1.5))]
    run = watched(start(), *sent, event("failed", 2.0, why="no room"))
    assert (run.over, run.failed, run.stage) == (True, "no room", "failed")
    run.take(event("resumed", 2.5))
    assert (run.over, run.failed, run.clients["ann"].nbytes) == (False, None, 1000)
    assert run.seconds_left is None  # of this start there is no pace yet
    run.take(event("end", 9.0))
    assert (run.over, run.ended, run.stage, run.clients["ann"].state) == (True, True, "finished", "done")


def test_a_client_that_is_left_out_stays_so():
    run = watched(start(), event("absent", 1.0, round=0, client="bob", why="gone"), event("end", 2.0))
    assert {name: one.state for name, one in run.clients.items()} == {"ann": "done", "bob": "left out"}


def test_quality_is_the_geometric_mean_over_texts_and_over_clients_own_models():
    rows = {"dense": (2.0, 8.0), "standalone/ann": (3.0, 3.0), "standalone/bob": (12.0, 12.0)}
    found = [
        event("evaluation", 1.0, method=method, of=[number, 3], perplexity=dict(zip("xy", row, strict=True)))
        for number, (method, row) in enumerate(rows.items(), 1)
    ]
    run = watched(start(), *found, event("measured", 2.0, client="ann", tokens=2, dense=0.0, pruned=0.0))
    assert run.perplexity == pytest.approx({"dense": 4.0, "standalone": 6.0})
    assert run.own_perplexity == (1.0, 1.0)


def drawn(run, **console):
    file = io.StringIO()
    Console(file=file, width=80, **console).print(Picture("runs/demo", run, 5.0))
    return file.getvalue()


def test_a_picture_fits_a_terminal():
    """With names as long as they may be, and more clients than lines; the one that was heard of long ago is shown."""
    names = [f"{number:03}{'x' * 97}" for number in range(60)]
    sent = [upload(name, 0, 10.0 + number, 0) for number, name in enumerate(reversed(names))]
    text = drawn(watched(start(clients=names), *sent), force_terminal=True, height=24, color_system=None)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) <= 24
    assert any(one.strip().startswith("059") for one in lines) and "and 49 more" in text
    assert not any(one.strip().startswith("000") for one in lines)


def test_a_file_of_a_picture_has_all_clients():
    text = drawn(watched(start(clients=[f"c{number}" for number in range(60)]), event("failed", 7500.0, why="no room")))
    assert "c0 " in text and "c59" in text and "no room" in text and "2 h 5 min of work" in text
