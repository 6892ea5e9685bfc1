"""The sections `launch`, `tokenize`, `tracking`, `generate` and `eval` of a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from gptcli.recipe.fields import AutoOrCount, Count, CountOrZero, NotNegative, Positive, Ratio, Section, Texts
from gptcli.recipe.sections_data import MeasuredSources
from gptcli.recipe.template import parse_template


class Parallel(Section):
    """How a model is split over devices (accelerate's parallelism_config)."""

    tp: Count = Field(default=1, description="Processes that divide each matrix and work on the same rows.")
    cp: Count = Field(default=1, description="Processes that divide each row.")
    dp_replicate: Count = Field(
        default=1, description="fsdp: copies of the model, each divided over the rest (hybrid sharding)."
    )


class Fsdp(Section):
    """How FSDP2 divides a model; names as in accelerate and transformers."""

    version: Literal[2] = Field(default=2, description="FSDP2 is what there is.")
    reshard_after_forward: bool = Field(
        default=True, description="Gather a layer's weights again for the backward pass; false: keep them between."
    )
    cpu_offload: bool = Field(default=False, description="Keep weights, gradients and optimizer state on the host.")
    transformer_layer_cls_to_wrap: str | list[str] | None = Field(
        default=None, description="Classes of the modules that are gathered one by one; none: the model's layers."
    )


class Launch(Section):
    """On how many processes and machines a command runs."""

    processes: AutoOrCount = Field(default="auto", description="auto: every visible GPU, or one process on CPU.")
    nodes: Count = Field(default=1, description="Machines.")
    strategy: Literal["auto", "ddp", "fsdp", "deepspeed"] = Field(
        default="auto", description="How processes share the model."
    )
    rendezvous: str | None = Field(default=None, description="host:port at which the machines meet.")
    parallel: Parallel = Field(default_factory=Parallel.model_construct, description="accelerate's parallelism_config.")
    fsdp: Fsdp = Field(default_factory=Fsdp.model_construct, description="How fsdp divides the model.")
    deepspeed: dict[str, Any] = Field(
        default={},
        description="A DeepSpeed configuration; batches, precision, optimizer and clipping are filled in.",
    )


class Tokenize(Section):
    """How texts are turned into tokens."""

    processes: AutoOrCount = Field(default="auto", description="auto: every core.")
    shard_tokens: Count = Field(default=64_000_000, description="Tokens of a file of tokens.")
    executor: Literal["local", "ray"] = Field(default="local", description="Where the work is done.")


class Tracking(Section):
    """Where the metrics go besides metrics.jsonl."""

    to: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = Field(default=[], description="Trackers.")
    project: str | None = Field(default=None, description="The tracker's project.")
    name: str | None = Field(default=None, description="The run's name there; none: the recipe's name.")
    tags: Texts = Field(default=[], description="Tags of the run there.")


class Generate(Section):
    """How texts are generated: by `gptcli generate`, and on the way through training."""

    prompts: Texts = Field(default=[], description="What texts start with.")
    max_new_tokens: Count = Field(default=100, description="Tokens at most.")
    min_new_tokens: CountOrZero = Field(default=0, description="Tokens at least.")
    temperature: NotNegative = Field(default=0.8, description="0: always the likeliest token.")
    top_p: Ratio = Field(default=0.95, description="Only the likeliest tokens that together have this probability.")
    top_k: CountOrZero = Field(default=50, description="Only so many of the likeliest tokens; 0: all.")
    min_p: Ratio = Field(default=0.0, description="Only tokens with this share of the likeliest token's probability.")
    repetition_penalty: Positive = Field(default=1.0, description="Above 1: repeating is made less likely.")
    no_repeat_ngram_size: CountOrZero = Field(
        default=0, description="No run of so many tokens comes twice, prompt included; 0: no such rule."
    )
    num_beams: Count = Field(default=1, description="Above 1: beam search, where nothing is drawn.")
    num_return_sequences: Count = Field(default=1, description="Texts a prompt.")
    stop: Texts = Field(default=[], description="Texts at which to stop.")
    bad_words: Texts = Field(default=[], description="Texts whose usual tokens never come.")


OF_LABELS = ("accuracy", "precision", "recall")  # and f1, which is that of words where there are no labels
WITHOUT_REFERENCES = ("perplexity", "quality")


class Eval(Section):
    """What `gptcli eval` measures."""

    data: MeasuredSources | None = Field(
        default=None, description="A source or a list; none: the recipe's validation data."
    )
    prompt: str | None = Field(
        default=None,
        description="What the model is asked, a template over the row's columns, `{col}`, and `{image}` where media "
        "of `data.images` stand; none: that of `data.prompt`, else `{prompt}`.",
    )
    references: str | None = Field(default=None, description="The column that holds the reference or a list of them.")
    limit: Count | None = Field(default=None, description="At most this many documents.")
    stride: Count | None = Field(default=None, description="How far a window moves; none: by its length.")
    metrics: list[
        Literal[
            "perplexity",
            "accuracy",
            "precision",
            "recall",
            "f1",
            "exact_match",
            "numeric_match",
            "bleu",
            "chrf",
            "rouge",
            "wer",
            "cer",
            "quality",
        ]
    ] = Field(default=["perplexity"], description="What is measured.")
    labels: list[str] | None = Field(
        default=None, description="Classification: scored by the likelihood of each label."
    )
    label_scores: Literal["likelihood", "normalized", "calibrated"] = Field(
        default="likelihood",
        description="likelihood: of all tokens of a label; normalized: a token of it; calibrated: over its likelihood "
        "after prompts without content (Zhao et al. 2021).",
    )
    tasks: list[str] = Field(default=[], description="lm-evaluation-harness task names, or paths of task YAMLs.")
    num_fewshot: CountOrZero | None = Field(
        default=None, description="Examples before each question of a task; none: as the task has it."
    )

    @model_validator(mode="after")
    def _metrics_have_what_they_need(self) -> Eval:
        if self.prompt is not None:
            try:
                parse_template(self.prompt)
            except ValueError as error:
                raise ValueError(f"prompt: {error}") from None
        if self.labels is not None:
            _check_labels(self.labels)
        if not self.metrics:
            raise ValueError("metrics is empty; name one, such as perplexity")
        of_labels = [metric for metric in self.metrics if metric in OF_LABELS]
        if of_labels and self.labels is None:
            raise ValueError(f"{of_labels[0]} needs labels, such as labels: [' negative', ' positive']")
        if self.labels is not None and not of_labels and "f1" not in self.metrics:
            raise ValueError("labels are measured by accuracy, precision, recall or f1; add one of them to metrics")
        compared = [metric for metric in self.metrics if metric not in WITHOUT_REFERENCES]
        if compared and self.references is None:
            raise ValueError(f"{compared[0]} needs references: the column that holds what is right")
        if self.labels is None and self.label_scores != "likelihood":
            raise ValueError("label_scores belongs to labels; remove it")
        return self


def _check_labels(labels: list[str]) -> None:
    names = [label.strip() for label in labels]
    if len(names) < 2:
        raise ValueError("labels needs at least two")
    if "" in names:
        raise ValueError("a label is empty, and has no likelihood")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"the label {twice!r} is there twice (white space around it does not count)")
