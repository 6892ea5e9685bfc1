"""Texts generated on the way: the recipe's prompts, to samples.jsonl and the screen, by the code of `generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptcli.generation.settings import settings
from gptcli.generation.text import complete
from gptcli.launch import is_main_process
from gptcli.runs import metrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gptcli.recipe.schema import Recipe
    from gptcli.reporting import Reporter
    from gptcli.runs.folder import RunFolder


class Sampler:
    """Completes the recipe's prompts; the random state of training is left as it was."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, run: RunFolder, reporter: Reporter) -> None:
        self._prompts = recipe.generate.prompts
        self._settings = settings(dict(recipe.generate), {"num_return_sequences": 1}, seed=recipe.seed)
        self._tokenizer = tokenizer
        self._run = run
        self._reporter = reporter

    def __call__(self, model: PreTrainedModel, step: int) -> None:
        """Write and show one completion of each prompt."""
        for prompt in self._prompts:
            text = complete(model, self._tokenizer, prompt, self._settings)[0].text
            if not is_main_process():  # it only takes part, for a model that is divided
                continue
            metrics.append(self._run.samples, {"step": step, "prompt": prompt, "text": text})
            self._reporter.say(f"step {step:,}  sample  {prompt}{text}".rstrip())
