"""What a run records of itself: versions, code, hardware, and the model card of `final/`."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli import __version__
from gptcli.errors import CheckpointError
from gptcli.launch import is_main_process
from gptcli.model.card import card_head

if TYPE_CHECKING:
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.recipe.schema import Recipe
    from gptcli.reporting import Reporter
    from gptcli.runs.folder import RunFolder
    from gptcli.train.plan import Plan

_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "tokenizers", "numpy", "safetensors", "peft")


def versions() -> dict[str, str]:
    """The versions of Python, gptcli and the packages that decide a run's numbers."""
    found = {"python": platform.python_version(), "gptcli": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time as run.json has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def record_end(run: RunFolder, reporter: Reporter, status: str, reason: str) -> None:
    """Write to `run.json` how a run ended; where that fails (a full disk), what ended it stays the error to be told."""
    if not is_main_process():
        return
    try:
        run.update(status=status, reason=reason, ended=now())
    except (OSError, CheckpointError) as error:
        reporter.warn(f"run.json could not be written: {getattr(error, 'strerror', None) or error}")


def git_commit(folder: Path) -> str | None:
    """The commit of the repository that a folder lies in, with `-dirty` when files differ; None outside of one."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        dirty = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("-dirty" if dirty else "")


def command_line() -> str:
    """The command as it was typed."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def loss_unit(recipe: Recipe) -> str:
    """What a run's losses are measured in: those of preference tuning are their method's own."""
    assert recipe.data is not None
    return f"of {recipe.finetune.method}" if recipe.data.format == "preference" else "nats a token"


def model_card(loaded: LoadedRecipe, plan: Plan, result: dict[str, Any]) -> str:
    """A model card (Markdown with a YAML head) that says what the model is, from what, and how good."""
    recipe = loaded.recipe
    assert recipe.model is not None and recipe.data is not None
    sources = "\n".join(f"- `{source.path or source.tokens}`" for source in recipe.data.train)
    validation = result.get("validation") or {}
    rows = [
        ("type", recipe.model.type or f"continued from {recipe.model.from_}"),
        *_adapter_rows(recipe, plan),
        ("parameters", f"{plan.parameters:,}"),
        ("context", f"{recipe.data.sequence_length:,} tokens"),
        ("trained on", f"{result['tokens']:,} tokens in {result['step']:,} steps"),
        ("training loss", _figure(result.get("loss"))),
        (f"validation loss ({loss_unit(recipe)})", _figure(validation.get("loss"))),
        ("validation bits per byte", _figure(validation.get("bits_per_byte"))),
        *((name, _figure(value)) for name, value in validation.get("metrics", {}).items() if isinstance(value, float)),
    ]
    head = card_head(recipe.name, f"A causal language model, trained with gptcli {__version__}.", rows)
    return f"""{head}
Trained on:

{sources}

```python
{_how_to_load(recipe)}
```
"""


def _adapter_rows(recipe: Recipe, plan: Plan) -> list[tuple[str, str]]:
    """What a card says of an adapter and its base."""
    finetune = recipe.finetune
    if finetune.adapter == "none":
        return []
    assert recipe.model is not None
    lora = finetune.lora
    shape = f"r {lora.r}, alpha {lora.alpha:g}" if finetune.adapter_from is None else f"of {finetune.adapter_from}"
    merged = (
        "merged into the weights; as it was trained: adapter/" if finetune.merge else "this folder, without its base"
    )
    revision = f" ({recipe.model.revision})" if recipe.model.revision else ""
    return [
        ("base", f"{recipe.model.from_}{revision}"),
        ("adapter", f"{finetune.adapter}, {shape}, {plan.trained_parameters:,} parameters; {merged}"),
    ]


def _how_to_load(recipe: Recipe) -> str:
    head = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    tokenizer = 'tokenizer = AutoTokenizer.from_pretrained("final")'
    if recipe.finetune.adapter == "none" or recipe.finetune.merge:
        return f'{head}model = AutoModelForCausalLM.from_pretrained("final")\n{tokenizer}'
    assert recipe.model is not None
    return f"""from peft import PeftModel
{head}{tokenizer}
base = AutoModelForCausalLM.from_pretrained("{recipe.model.from_}")
base.resize_token_embeddings(max(len(tokenizer), base.vocab_size))
model = PeftModel.from_pretrained(base, "final")"""


def _figure(value: Any) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=5,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout.strip()
