"""The model card of a pruned model: README.md in its folder, for whoever gets the folder without the run.

It names no client, no private text and no path. The card of the base model stays beside it as README.base.md.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fedspallm_appfl import __version__
from fedspallm_appfl.models.storage.checkpoint import is_hub_name
from fedspallm_appfl.models.storage.folder import BASE_CARD, CARD
from fedspallm_appfl.reports.parts import markdown
from fedspallm_appfl.reports.result import label, mean
from fedspallm_appfl.settings.paths import model_name
from fedspallm_appfl.settings.schema import Config
from fedspallm_appfl.validation.words import how, origin

LICENCE = ("license", "license_name", "license_link")  # keys of a card, as the hub spells them

USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```"""
UNTRAINED = "It was not trained after pruning. It has"
TRAINED = "Kept weights were fitted to text for a few steps after pruning. It has"
LIMITS = """- Zeros are stored like other weights: files are as large as the base model's, and dense kernels run no faster.
- Only the weights above were changed. Embeddings, norms, biases and the head are those of the base model.
- {trained} the limits of the base model, and perplexities show what it lost beside it."""


class _WrittenOut(yaml.SafeDumper):
    """Of the YAML that the hub reads, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write out what stands twice."""
        return True


def write(folder: Path, config: Config, perplexity: Mapping[str, Mapping[str, float]]) -> None:
    """Write the card of one model.

    Args:
        folder: holds `manifest.json` and `model/`.
        config: the experiment.
        perplexity: method -> text -> perplexity, the dense model first and this one last; empty if none was measured.
    """
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    base, licence = _base(config), _licence(folder / "model" / BASE_CARD)
    hub = {"base_model": base} if base == config.model.path else {}
    front = {
        **hub,
        **licence,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "sparse"],
    }
    front |= _index(f"{base} {manifest['target']}", perplexity)
    parts = [
        f"---\n{yaml.dump(front, Dumper=_WrittenOut, sort_keys=False)}---",
        f"# {base}, {manifest['target']} sparse",
        f"{base}, {_made(config)}: {manifest['zeros']:,} of {manifest['block_weights']:,} weights in the blocks are "
        f"pruned, {100 * manifest['sparsity']:.4f} % of those in the {len(manifest['matrices'])} matrices "
        "that could be pruned.",
        *_perplexities(config, perplexity),
        "## Use",
        USE,
        "## What it does not do",
        LIMITS.format(trained=TRAINED if config.recovery.rounds else UNTRAINED),
        "## Licence",
        _terms(licence),
    ]
    (folder / "model" / CARD).write_text("\n\n".join(parts) + "\n", "utf-8")


def _index(name: str, perplexity: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Perplexities of the pruned model, the last, as the hub reads them."""
    if not perplexity:
        return {}
    task = {"type": "text-generation"}
    results = [
        {
            "task": task,
            "dataset": {"name": text, "type": text},
            "metrics": [{"type": "perplexity", "value": round(value, 3)}],
        }
        for text, value in list(perplexity.values())[-1].items()
    ]
    return {"metrics": ["perplexity"], "model-index": [{"name": name, "results": results}]}


def _made(config: Config) -> str:
    """What was done, where, and by what; no path."""
    where = f"with fedspallm-appfl {__version__} in a federation of {len(config.clients)} clients"
    if config.recovery.model:
        return f"{origin(config).strip() or 'pruned before'}, then recovered {where}"
    return f"pruned {where}, {how(config)}"


def _base(config: Config) -> str:
    """The name of the base model: on the hub, or that of its folder."""
    path = Path(config.model.path).expanduser()
    on_hub = is_hub_name(config.model.path) and not path.is_dir()
    return config.model.path if on_hub else model_name(path.resolve())


def _licence(card: Path) -> dict[str, Any]:
    """What the front matter of a card says about the licence; nothing where it says nothing that can be read."""
    if not card.is_file():
        return {}
    head, _, rest = card.read_text("utf-8", errors="replace").partition("---\n")
    try:
        found = yaml.safe_load(rest.partition("\n---")[0]) if not head.strip() else {}
    except yaml.YAMLError:
        return {}
    return {key: found[key] for key in LICENCE if key in found} if isinstance(found, dict) else {}


def _terms(licence: Mapping[str, Any]) -> str:
    if not licence:
        return "The folder of the base model names no licence. Look it up there before you pass this model on."
    said = ", ".join(str(value) for value in licence.values())
    return f"That of the base model: {said}, as its card says ([{BASE_CARD}]({BASE_CARD}))."


def _perplexities(config: Config, perplexity: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not perplexity:
        return []
    texts = list(next(iter(perplexity.values())))
    rows = [
        [label(method), *(f"{row[text]:.3f}" for text in texts), f"{mean(row):.3f}"]
        for method, row in perplexity.items()
    ]
    settings = config.evaluation
    some = "all windows" if settings.windows is None else f"at most {settings.windows} windows"
    words = f"{some} of {settings.length} tokens of each text; the first token of a window is not predicted."
    return ["## Perplexity", markdown(["", *texts, "geometric mean"], rows), f"Over {words}"]
