"""What is shown while a run works: plain lines in a batch log, a bar on a terminal."""

import io

import pytest
from rich.console import Console

from fedspallm_appfl.reports import progress
from fedspallm_appfl.reports.progress import RunProgress, console


def upload(client, blocks, message=0, round_index=0, exchange=0, exchanges=1):
    name = {"event": "upload", "client": client, "round": round_index, "counted": [exchange, exchanges]}
    return name | {"blocks": blocks, "message": message, "messages": 2}


def place(rank, clients, device="cpu", bound=""):
    return {
        "event": "place",
        "rank": rank,
        "host": f"node{rank}",
        "clients": clients,
        "device": device,
        "threads": 2,
        "bound": bound,
    }


EVALUATION = {"event": "evaluation", "method": "dense", "of": [2, 7], "perplexity": {"law": 2.0, "news": 8.0}}


@pytest.fixture
def shown():
    """Show events ten seconds apart to a console that is no terminal, or is one; gives what was written."""

    def shown(*events, terminal=False, rounds=1, clients=2, recovery=0):
        file = io.StringIO()
        with RunProgress(Console(file=file, width=120, force_terminal=terminal), rounds, clients, recovery) as run:
            for number, event in enumerate(events):
                run({**event, "time": 10.0 * number})
        return file.getvalue()

    return shown


def test_an_upload_is_a_plain_line_with_the_time_that_is_left(shown):
    """Not before all clients could have sent one: under MPI those of a rank arrive together."""
    text = shown(upload("a", "0-3,7"), upload("b", "4"), upload("a", "8", message=1), upload("b", "9", message=1))
    assert text.splitlines() == [
        "round 1/1  client a  block 0-3,7  1/4",
        "round 1/1  client b  block 4  2/4",
        "round 1/1  client a  block 8  3/4  10 s of pruning left",
        "round 1/1  client b  block 9  4/4  0 s of pruning left",
    ]


def test_over_globus_compute_one_sees_who_is_waited_for(shown):
    """A client's uploads come all at once, so their pace tells nothing of what is left."""
    sent = {"event": "sent", "round": 0, "clients": ["a", "b"]}
    answer = {"event": "answer", "round": 0, "client": "b", "seconds": 754.0}
    text = shown(sent, answer, *(upload(client, "0-3") for client in "bbab"))
    assert text.splitlines()[:3] == [
        "round 1/1  waiting for a, b",
        "round 1/1  client b has answered after 13 min",
        "round 1/1  client b  block 0-3  1/4",
    ]
    assert "left" not in text
    waiting = {"event": "waiting", "round": 0, "clients": ["a"], "seconds": 1200}
    assert shown(sent, waiting).splitlines()[1] == "round 1/1  still waiting for a after 20 min"
    assert "waiting for a, b" in shown(sent, terminal=True)


@pytest.mark.parametrize(
    ("seconds", "words"), [(99, "99 s"), (100, "2 min"), (5000, "83 min"), (6000, "1 h 40 min"), (7500, "2 h 5 min")]
)
def test_long_times_are_told_in_minutes_and_hours(seconds, words):
    assert progress.duration(seconds) == words


def test_rounds_are_counted_from_one_and_all_of_them_in_the_total(shown):
    assert shown(upload("a", "1", round_index=1), rounds=3) == "round 2/3  client a  block 1  5/12\n"


def test_all_exchanges_of_a_round_are_in_the_total(shown):
    uploads = [upload("a", "1", exchange=number, exchanges=3) for number in range(3)]
    assert [line.split("  ")[3] for line in shown(*uploads).splitlines()] == ["1/12", "5/12", "9/12"]


def test_a_message_without_blocks_is_counted_but_makes_no_line(shown):
    text = shown(upload("a", ""), upload("b", "4"))
    assert [line.split("  ")[:4] for line in text.splitlines()] == [["round 1/1", "client b", "block 4", "2/4"]]


def test_exchanges_of_keys_are_not_counted(shown):
    keys = {**upload("a", ""), "counted": None, "messages": 1}
    work = [upload(client, "0", exchange=1, exchanges=2, message=message) for message in range(2) for client in "ab"]
    lines = shown(keys, keys, *work, keys).splitlines()
    assert [line.split("  ")[3] for line in lines] == ["5/8", "6/8", "7/8", "8/8"]
    assert "client a  keys of secure sums" in shown(keys, terminal=True)


def test_a_round_of_recovery_says_who_trains_before_anything_is_sent(shown):
    text = shown({"event": "training", "turn": 1, "clients": ["a", "b"]}, recovery=2)
    assert text == "round 2/2 of recovery  training by a, b, each of which sends its changes afterwards\n"
    text = shown({"event": "step", "turn": 0, "client": "a", "step": 3, "of": 16}, recovery=2)
    assert text == "round 1/2 of recovery  client a  step 3 of 16\n"
    uploads = [
        upload("a", "0", exchange=number, exchanges=3) | {"exchange": number, "exchanges": 3} for number in (0, 2)
    ]
    pruned, recovered = shown(*uploads, recovery=2).splitlines()
    assert pruned.startswith("round 1/1  client a  block 0")
    assert recovered.startswith("round 2/2 of recovery  client a  block 0")


def test_an_evaluation_is_a_line(shown):
    assert shown(EVALUATION) == "perplexity of dense  4.00  2/7\n"


def test_other_events_are_not_shown(shown):
    assert shown({"event": "start"}, {"event": "block", "block": 1}, {"event": "round", "round": 0}) == ""


def test_placement_is_shown_once_all_clients_have_a_place(shown):
    first, second = place(1, ["a", "b"], "cuda:0", "2,3"), place(2, ["c"])
    assert shown(first, clients=3) == ""
    assert "process" in shown(first, second, clients=3)
    rows = [
        [cell.strip() for cell in row.strip("│ ").split("│")] for row in shown(first, second, clients=3).splitlines()
    ]
    assert ["1", "node1", "a, b", "cuda:0", "2", "2,3"] in rows
    assert ["2", "node2", "c", "cpu", "2", "-"] in rows


def test_placement_in_one_process_without_a_gpu_speaks_of_neither_ranks_nor_gpus(shown):
    text = shown(place(0, ["a", "b"], bound="0"))
    assert "node0" in text
    assert "rank" not in text and "process" not in text and "CUDA" not in text
    assert "CUDA_VISIBLE_DEVICES" in shown(place(0, ["a", "b"], "cuda:0"))


def test_a_batch_log_holds_no_control_characters(shown):
    text = shown(place(1, ["a", "b"]), upload("a", "1"), {**EVALUATION, "of": [1, 2]})
    assert not {"\x1b", "\r"} & set(text)


def test_a_terminal_shows_a_bar_and_no_lines(shown):
    text = shown(upload("a", "0-3,7"), upload("b", "4"), terminal=True)
    assert "\x1b[" in text
    assert "s left" not in text


@pytest.mark.parametrize("line", ["x" * 500, "a path with spaces/" * 20])
def test_lines_are_not_wrapped_where_the_output_is_no_terminal(line):
    file = io.StringIO()
    console(file=file).print(line)
    assert file.getvalue() == line + "\n"
