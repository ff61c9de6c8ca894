"""Layer sampling: what a client with a quarter of the blocks saves, against one with all of them."""

from statistics import mean

from benchmarks import children
from benchmarks.context import Context
from benchmarks.models import save_llama
from benchmarks.tables import Table
from fedspallm_appfl.aggregation.layer_sampling import draw

CLIENTS = ("a", "b", "c", "d")
MUST = 0.55


def run(context: Context) -> Table:
    hidden, mlp, blocks, vocabulary = (64, 128, 4, 128) if context.quick else (768, 2048, 8, 4096)
    windows = (2, 16) if context.quick else (8, 512)
    folder = save_llama(context.scratch / "model", hidden, mlp, blocks, vocabulary)
    drawn = draw("balanced", 0, 0, 1, dict.fromkeys(CLIENTS, 0.25), blocks)
    job = ("jobs", "ours", "sparsegpt", folder, *windows, vocabulary)
    columns = ("blocks", "all blocks", "a quarter", "share of the time", "must", "met")
    table = Table("A client with a quarter of the blocks", columns)
    shares = []
    for mine in list(drawn.values())[: 1 if context.quick else None]:
        whole, quarter = (children.run(*job, *some)["seconds"] for some in ((), mine))
        shares.append(quarter / whole)
        table.add(mine, f"{whole:.2f} s", f"{quarter:.2f} s", f"{shares[-1]:.2f}", "", "")
    table.add("mean", "", "", f"{mean(shares):.2f}", f"<= {MUST}", "must" if mean(shares) <= MUST else "NO")
    table.notes.append(
        f"SparseGPT, {blocks} blocks, a draw of `balanced` sampling. Nothing runs after a client's last block, so the time "
        "depends on how deep its blocks lie; the four draws together cover every block once."
    )
    return table
