"""report.md and the final lines of a run: quality, sparsity, bytes, participation and unusual events."""

import platform
import shlex
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
import transformers
from rich.console import Group
from rich.text import Text

from fedspallm_appfl import __version__
from fedspallm_appfl.aggregation.layer_sampling import expected_uncovered, from_text, to_text
from fedspallm_appfl.errors import FedSpaLLMError
from fedspallm_appfl.events import EventLog
from fedspallm_appfl.models.storage.checkpoint import resolve_model
from fedspallm_appfl.models.storage.export import MatrixSparsity
from fedspallm_appfl.reports import outputs, own_text, targets
from fedspallm_appfl.reports.parts import Part, Table, bytes_text
from fedspallm_appfl.reports.result import (
    Result,
    count,
    label,
    mean,
    own_table,
    perplexity_table,
    sparsity_line,
    zeros_line,
)
from fedspallm_appfl.rounds.participants import algorithm_of, own_windows, participants, roster
from fedspallm_appfl.rounds.pruning import OUTPUT_ERROR
from fedspallm_appfl.settings.schema import Config, Paths
from fedspallm_appfl.tensors import native
from fedspallm_appfl.texts.tokenizer import beginning_words, tokenizer_for
from fedspallm_appfl.validation.words import headline, how, seen_words, unallocated_words
from fedspallm_appfl.wire.durable import write_text

TAKES_PART = (
    "Matrices take part that have zeros beyond those of the dense model, at least 1 % of their entries. The others stay as "
    "they are; `prune.ignore` in `config.yaml` lists them."
)


def traffic(log: EventLog) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of tensors sent by each client (up) and to each client (down)."""
    up: dict[str, int] = {}
    down: dict[str, int] = {}
    for event in log.uploads:
        up[event["client"]] = up.get(event["client"], 0) + event["bytes"]
    for event in log.of("round"):
        for client in up:
            down[client] = down.get(client, 0) + event["bytes_down"]
    for event in log.of("measured"):
        down[event["client"]] = down.get(event["client"], 0) + event["bytes_down"]
    return up, down


def closing(config: Config, results: Result, log: EventLog) -> Group:
    """The final lines of a run: perplexity of each method on each text, sparsity, bytes."""
    up, down = traffic(log)
    lines = "\n".join(
        [
            *_zeros(results),
            f"up {bytes_text(sum(up.values()))}, down {bytes_text(sum(down.values()))} in total, "
            f"{bytes_text(statistics.mean(up.values()))} up per client on average; "
            f"the dense prunable weights take {bytes_text(results.dense_bytes)}",
        ]
    )
    texts = list(config.evaluation.texts)
    tables = [perplexity_table(texts, results.perplexity)] if texts else []
    tables += [own_table(results.own)] if results.own else []
    return Group(Text(_title(config)), *tables, Text(lines))


def _zeros(results: Result) -> list[str]:
    """Sentences: what is zero, and what became of the zeros of the dense model."""
    return [sparsity_line(results.matrices, results.block_weights), *filter(None, [zeros_line(results.matrices)])]


def model_table(
    title: str,
    perplexity: Mapping[str, Mapping[str, float]],
    matrices: Mapping[str, Sequence[MatrixSparsity]],
    block_weights: int,
) -> Group:
    """Models for several targets: perplexity of each on each text if it was measured, and its sparsity."""
    lines = "\n".join(f"{target}: {sparsity_line(of, block_weights)}" for target, of in matrices.items())
    if not perplexity:
        return Group(Text(lines))
    texts = list(next(iter(perplexity.values())))
    return Group(Text(title), perplexity_table(texts, perplexity), Text(lines))


def _title(config: Config) -> str:
    train = config.client_configs.train_configs
    what = "Perplexity" if config.evaluation.texts else "Pruned"
    return f"{what}, {count(len(config.clients), 'client')}, {how(config)}, sparsity {train.sparsity}"


def write_report(file: Path, config: Config, results: Result, log: EventLog) -> None:
    """Write report.md."""
    shown = (part.markdown() if isinstance(part, Table) else part for part in parts(config, results, log))
    write_text(file, "\n\n".join([f"# {headline(config)}", *shown]) + "\n")


def parts(config: Config, results: Result, log: EventLog) -> list[Part]:
    """All that the report says below its headline."""
    return [
        f"{'. '.join(_zeros(results))}.",
        f"The model in `{results.model.name}/` is stored dense, with zeros: "
        "it takes the disk and memory of the dense model. Only the uploads are smaller.",
        *([f"**Clients {absent}.**"] if (absent := absence_line(log)) else []),
        *_perplexity(config, results, log),
        *_own_text(config, results, log),
        "## Sparsity",
        *_sparsity(config, results.matrices, log),
        *_targets(config, log),
        "## Bytes",
        *_bytes(config, results, log),
        "## Who took part",
        *_participation(config, results, log),
        *(
            f"{line.capitalize()}. Uploads were not screened: of single ones nothing is seen."
            for line in seen_words(config)
        ),
        *_outliers(log),
        *_notes(log),
        "## How to load",
        *_loading(config, results),
        "## Settings",
        *_settings(config, log),
    ]


def _perplexity(config: Config, results: Result, log: EventLog) -> list[Part]:
    if not results.perplexity:
        return []
    texts = list(next(iter(results.perplexity.values())))
    rows = [
        [label(method), *(f"{row[text]:.3f}" for text in texts), f"{mean(row):.3f}"]
        for method, row in results.perplexity.items()
    ]
    again = [] if algorithm_of(config).apart else _measured_again(config, log)
    return ["## Perplexity", Table(["", *texts, "geometric mean"], rows), _how_measured(config), *again]


def _own_text(config: Config, results: Result, log: EventLog) -> list[Part]:
    """What the clients have measured where their text lies."""
    missing = own_text.notes(log)
    if not (results.own or missing):
        return []
    of = "its own model" if algorithm_of(config).apart else "the pruned model"
    words = (
        f"Each client measured the dense model and {of} on up to {count(own_windows(config), 'window')} of its text that "
        "were kept out of pruning. Sums of losses and numbers of tokens were all that it sent."
    )
    table = [Table(own_text.HEAD, own_text.rows(results.own, 3))] if results.own else []
    absent = ["Not measured:", "\n".join(missing)] if missing else []
    return [f"## {own_text.TITLE}", *table, words, *absent]


def _how_measured(config: Config) -> str:
    settings = config.evaluation
    some = "All windows" if settings.windows is None else f"At most {count(settings.windows, 'window')}"
    begin = _beginning(config, settings.bos, *settings.texts.values())
    return f"{some} of {settings.length} tokens of each text{begin}; the first token of a window is not predicted."


def _beginning(config: Config, bos: str, *texts: Paths | None) -> str:
    """How windows of texts begin, in words; nothing of texts that are tokenized, or where the tokenizer is not here."""
    try:
        tokenizer = tokenizer_for(resolve_model(config.model.path), *filter(None, texts))
    except FedSpaLLMError:
        return ""
    return f"; {beginning_words(tokenizer, bos)}" if tokenizer is not None else ""


def _measured_again(config: Config, log: EventLog) -> list[str]:
    """The command that measures the last row of the table again; it would not join what a text is made of."""
    settings, model = config.evaluation, config.model
    files = [text for text in settings.texts.values() if isinstance(text, str)]
    joined = [name for name, text in settings.texts.items() if not isinstance(text, str)]
    if not files:
        return []
    ends = [event["dtype"] for event in log.of("end") if "dtype" in event]
    given = {
        "--length": settings.length,
        "--windows": settings.windows,
        "--batch": settings.batch,
        "--dtype": ends[-1] if ends else model.dtype,
        "--bos": settings.bos if settings.bos != "auto" else None,
        "--field": settings.field,
        "--blocks": model.blocks,
    }
    options = [str(word) for name, value in given.items() if value for word in (name, value)]
    code = ["--trust-remote-code"] if model.trust_remote_code else []
    words = ["fedspallm", "evaluate", str(Path(config.run_dir) / "model"), "--text", *files, *options, *code]
    but = f", but for {' and '.join(joined)}" if joined else ""
    return [f"The last row again{but}:", f"    {shlex.join(words)}"]


def _sparsity(config: Config, matrices: Sequence[MatrixSparsity], log: EventLog) -> list[Part]:
    facts = {event["block"]: event for event in log.of("block")}
    rows = []
    for block in sorted({matrix.block for matrix in matrices}):
        mine = [matrix for matrix in matrices if matrix.block == block]
        entries, zeros = sum(m.entries for m in mine), sum(m.zeros for m in mine)
        before = facts[block]["zeros_before_expansion"] / entries if block in facts else 0.0
        extra = sum(m.zeros_on_disk - m.zeros for m in mine)
        rows.append([str(block), f"{entries:,}", f"{zeros:,}", f"{zeros / entries:.6f}", f"{before:.4f}", str(extra)])
    over = sum(event["over_target"] for event in facts.values())
    head = ["block", "weights", "zeros", "sparsity", "before expansion", "kept but zero"]
    words = (
        "`before expansion` is the share that every client pruned; `kept but zero` counts kept weights that are zero."
    )
    if not algorithm_of(config).votes or config.recovery.model:
        head, rows = [*head[:4], *head[5:]], [[*row[:4], *row[5:]] for row in rows]
        words = "`kept but zero` counts kept weights that are zero."
    errors = outputs.errors(log)
    if errors:
        head = [*head, outputs.HEAD]
        rows = [[*row, f"{outputs.mean(errors[int(row[0])]):.3g}" if int(row[0]) in errors else "-"] for row in rows]
        words = f"{words} {outputs.WORDS}"
    note = [f"{over} entries beyond the target are zero, because every client pruned them."] if over else []
    last = f"{words} `manifest.json` lists every matrix."
    return [Table(head, rows), *note, *_experts(config, facts.values()), last]


def _experts(config: Config, blocks: Iterable[Mapping[str, Any]]) -> list[str]:
    """How many experts' matrices some clients or all of them had too few tokens for."""
    events = list(blocks)
    left_out, unreached = (sum(event.get(what, 0) for event in events) for what in ("left_out", "unreached"))
    if not left_out:
        return []
    what = config.server_configs.aggregator_kwargs.unreached
    done = "stay dense" if what == "dense" else f"were pruned by {what}"
    least = f"{config.client_configs.train_configs.min_tokens} tokens"
    if algorithm_of(config).gathers:
        least += f", or {config.gram.min_tokens or 'as many as an input is wide'} as `gram.min_tokens` says,"
    return [
        f"Fewer than {least} of a client reached some experts: {left_out} uploads of matrices or statistics "
        f"were left out, and {unreached} that came from no client {done}."
    ]


def _targets(config: Config, log: EventLog) -> list[Part]:
    """Targets that were chosen; nothing where nobody asked for a choice."""
    chosen = log.of("allocation")
    if not chosen:
        return [f"{line}." for line in unallocated_words(config)]
    line, found = targets.choice_line(chosen[-1]), chosen[-1]["targets"]
    table: list[Part] = [targets.WORDS, Table(*targets.table(found))] if found else []
    return ["## Targets", f"{line[0].upper()}{line[1:]}.", *table]


def _bytes(config: Config, results: Result, log: EventLog) -> list[Part]:
    up, down = traffic(log)
    rows = [[client, f"{up[client]:,}", f"{down.get(client, 0):,}"] for client in up]
    rows.append(["all", f"{sum(up.values()):,}", f"{sum(down.values()):,}"])
    dense = results.dense_bytes * len(config.clients) * config.server_configs.num_global_epochs
    sent = Counter[int]()
    for event in log.uploads:
        sent[event["round"]] += event["bytes"]
    per_round = [
        [str(r["round"] + 1), f"{sent[r['round']]:,}", f"{r['bytes_down'] * len(up):,}"] for r in log.of("round")
    ]
    final = sum(event["bytes_down"] for event in log.of("measured"))
    per_round += [["model to measure", "0", f"{final:,}"]] if final else []
    return [
        Table(["client", "up", "down"], rows),
        Table(["round", "up", "down"], per_round),
        Table(["block", "uploads", "up", "dense", "times smaller"], _bytes_by_block(results, log)),
        *_recovery(config, log),
        *_keys(log),
        f"Bytes of tensors. Sending all prunable weights dense, once per round and client, would take {dense:,}.",
    ]


def _keys(log: EventLog) -> list[str]:
    """What secure sums took beside the sums."""
    nbytes = sum(event["bytes"] for event in log.uploads if event["counted"] is None)
    return [f"Of what went up, {nbytes:,} bytes of keys and shares of secrets belong to no block."] if nbytes else []


def _recovery(config: Config, log: EventLog) -> list[str]:
    """What recovery was and sent; nothing without."""
    recovery = config.recovery
    if not recovery.rounds:
        return []
    counted = ((event["bytes"], *event["counted"]) for event in log.uploads if event["counted"])
    sent = sum(size for size, exchange, exchanges in counted if exchange >= exchanges - recovery.rounds)
    what = f"factors of rank {recovery.rank}" if recovery.rank else "changes"
    how = "as masked words" if config.server_configs.secure_sums else f"in {recovery.delta}"
    loss = "each block's output" if recovery.scope == "blockwise" else f"loss {recovery.loss}"
    return [
        f"Recovery: {count(recovery.rounds, 'round')} of {count(recovery.steps, 'step')} of {recovery.batch} windows, "
        f"{loss}. Clients sent {sent:,} bytes of {what} {how}, part of what is above.",
        *([TAKES_PART] if recovery.model else []),
    ]


def _bytes_by_block(results: Result, log: EventLog) -> list[list[str]]:
    """Uploaded bytes of each block, next to as many dense copies, as stored, as clients sent it."""
    entries, sent, senders = Counter[int](), Counter[int](), defaultdict[int, set[tuple[int, str]]](set)
    for matrix in results.matrices:
        entries[matrix.block] += matrix.entries
    for event in log.uploads:
        for block, nbytes in event["block_bytes"].items():
            sent[int(block)] += nbytes
            senders[int(block)].add((event["round"], event["client"]))
    width = results.dense_bytes // max(1, entries.total())
    dense = {block: width * entries[block] * len(senders[block]) for block in sent}
    return [
        [str(b), str(len(senders[b])), f"{sent[b]:,}", f"{dense[b]:,}", f"{dense[b] / sent[b]:.2f}" if sent[b] else "-"]
        for b in sorted(sent)
    ]


def _participation(config: Config, results: Result, log: EventLog) -> list[Part]:
    rows, places = [], {name: place for place in log.of("place") for name in place["clients"]}
    where = ["rank", "device", "threads"] if any(place["rank"] for place in places.values()) else ["device", "threads"]
    where = where if places else []  # over Globus Compute the sites know
    blocks, seconds = defaultdict[str, set[tuple[int, int]]](set), working_seconds(log)
    hosts: dict[str, str] = {}
    for event in log.uploads:
        name = event["client"]
        blocks[name].update((event["round"], block) for block in from_text(event["blocks"]))
        hosts.setdefault(name, event["host"])
    for client in participants(config):
        name, share = client.client_id, f"{client.train_configs.resource_share:g}"
        place = [str(places[name][what]) for what in where]
        rows.append(
            [name, share, str(len(blocks[name])), f"{seconds.get(name, 0.0):.1f}", hosts.get(name, "-"), *place]
        )
    heads = ["process" if what == "rank" else what for what in where]
    table = Table(["client", "resource share", "blocks sent", "seconds at work", "host", *heads], rows)
    covered = {event["block"] for event in log.of("block")}
    every = {matrix.block for matrix in results.matrices}
    missed = [] if config.recovery.model else sorted(every - covered)
    notes: list[Part] = [table, *_resumptions(log), *_absences(config, log)]
    if missed:
        notes.append(f"No client sent these blocks, and they stay dense: {to_text(missed)}.")
    if config.client_configs.train_configs.layer_sampling == "uniform" and not config.recovery.model:
        expected = expected_uncovered(roster(config), len(every))
        notes.append(f"Uniform sampling leaves {expected:.2f} of {len(every)} blocks uncovered a round in expectation.")
    return notes


def working_seconds(log: EventLog) -> dict[str, float]:
    """Seconds that each client spent on what it has sent."""
    seconds: dict[str, float] = {}
    for event in log.uploads:
        seconds[event["client"]] = seconds.get(event["client"], 0.0) + event["seconds"]
    return seconds


def absence_line(log: EventLog) -> str | None:
    """Which clients were left out of which rounds, in one line; None if all took part."""
    missed: dict[int, list[str]] = {}
    for event in log.of("absent"):
        missed.setdefault(event["round"] + 1, []).append(event["client"])
    rounds = "; ".join(f"round {number}: {', '.join(clients)}" for number, clients in missed.items())
    return f"left out, {rounds}" if rounds else None


def _absences(config: Config, log: EventLog) -> list[Part]:
    """Which clients were left out of which round and why; empty if all took part in all rounds."""
    absent = {(event["round"], event["client"]): event for event in log.of("absent")}
    if not absent:
        return []
    rounds = range(config.server_configs.num_global_epochs)
    took_part = [
        [str(index + 1), ", ".join(client for client in roster(config) if (index, client) not in absent)]
        for index in rounds
    ]
    rows = [
        [str(event["round"] + 1), event["client"], event["host"] or "-", event["blocks"] or "-", event["why"]]
        for event in absent.values()
    ]
    return [
        "Some clients were left out of rounds. Blocks are aggregated over the clients that sent them.",
        Table(["round", "took part"], took_part),
        Table(["round", "left out", "host", "blocks", "why"], rows),
    ]


def _resumptions(log: EventLog) -> list[Part]:
    """That the run was cut off, and what that means for the bytes; nothing where it was not."""
    times = len(log.of("resumed"))
    if not times:
        return []
    return [f"The run was cut off and went on, {count(times, 'time')}. What was sent again then counts again."]


def _outliers(log: EventLog) -> list[Part]:
    """Uploads with facts that no honest client's have and that are folded nevertheless, and columns brought back."""
    found: list[Part] = []
    columns = defaultdict[tuple[str, int], list[int]](list)
    rows = [[event["client"], str(event["block"]), event["unit"], event["why"]] for event in log.of("outlier")]
    for event in log.of("brought_back"):
        columns[event["client"], event["block"]].append(event["columns"])
    if rows:
        found.append(Table(["client", "block", "matrix or input", "why"], rows))
    if columns:
        far = [[client, str(block), str(len(of)), str(sum(of))] for (client, block), of in sorted(columns.items())]
        found += [
            "Columns that had gone far from the dense weights and were brought back. Honest clients have a few, where "
            "their text hardly uses a feature:",
            Table(["client", "block", "matrices", "columns"], far),
        ]
    return ["## Uploads that stand out", *found] if found else []


def _notes(log: EventLog) -> list[Part]:
    rows = [
        [
            event["client"],
            str(event["round"] + 1),
            linear,
            ", ".join(f"{key} {value:g}" for key, value in said.items()),
        ]
        for event in log.uploads
        for linear, notes in event["notes"].items()
        if (said := {key: value for key, value in notes.items() if key != OUTPUT_ERROR})
    ]
    notices = [event["text"] for event in log.of("notice")]
    if not rows:
        return ["## Unusual events", *notices] if notices else []
    head = "Matrices whose first factorization failed, with the damping that worked."
    return ["## Unusual events", *notices, head, Table(["client", "round", "block.linear", ""], rows)]


def _loading(config: Config, results: Result) -> list[Part]:
    """Python that loads the model."""
    apart = algorithm_of(config).apart
    folder = str(results.model / "CLIENT" / "model" if apart else results.model)
    code_too = ", trust_remote_code=True" if config.model.trust_remote_code else ""
    words = ["`CLIENT` stands for the client whose model it is."] if apart else []
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype="auto"{code_too})\n'
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r}{code_too})"
    )
    return [indent(code, "    "), *words]


def versions() -> str:
    """What runs here, for the event that ends a run."""
    return (
        f"fedspallm-appfl {__version__} ({native.description()}), torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )


def _settings(config: Config, log: EventLog) -> list[Part]:
    data = {(client.data.windows, client.data.length) for client in config.clients}
    begin = "".join(dict.fromkeys(_beginning(config, client.data.bos, client.data.text) for client in config.clients))
    calibration = " or ".join(f"{count(windows, 'window')} of {length} tokens" for windows, length in sorted(data))
    before = f", pruned model `{config.recovery.model}`" if config.recovery.model else ""
    ran = "".join(f"{event['versions']}; " for event in log.of("end")[-1:] if "versions" in event)
    return [
        f"Model `{config.model.path}`{before}; {calibration} per client for pruning, seed {config.seed}{begin}. The "
        "resolved configuration is `config.yaml`.",
        f"{ran}{log.seconds:.0f} s in total.",
    ]
