"""The sections `train` and `finetune` of a recipe: how long, how fast, with what, and what happens on the way."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from gptcli.recipe.fields import (
    AutoOrBool,
    AutoOrCount,
    Count,
    CountOrZero,
    Duration,
    NotNegative,
    Positive,
    Ratio,
    Section,
    Share,
    StepsOrShare,
    accepts,
)
from gptcli.recipe.sections_data import one_of

Beta: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
FLOOR_SCHEDULERS = ("cosine", "linear", "wsd")

TRAINER_ARGS_OF_RECIPE = {
    "output_dir": "output_dir",
    "overwrite_output_dir": "the option --overwrite",
    "resume_from_checkpoint": "the option --resume",
    "seed": "seed",
    "data_seed": "seed",
    "run_name": "name",
    "report_to": "tracking.to",
    "project": "tracking.project",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "per_device_train_batch_size": "train.micro_batch_size",
    "per_device_eval_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "auto_find_batch_size": "train.micro_batch_size",
    "optim": "train.optimizer",
    "learning_rate": "train.learning_rate",
    "lr_scheduler_type": "train.lr_scheduler",
    "warmup_steps": "train.warmup",
    "warmup_ratio": "train.warmup",
    "weight_decay": "train.weight_decay",
    "adam_beta1": "train.betas",
    "adam_beta2": "train.betas",
    "adam_epsilon": "train.adam_epsilon",
    "max_grad_norm": "train.max_grad_norm",
    "label_smoothing_factor": "train.label_smoothing",
    "neftune_noise_alpha": "train.neftune_noise_alpha",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "bf16_full_eval": "train.precision",
    "fp16_full_eval": "train.precision",
    "torch_compile": "train.compile",
    "torch_compile_backend": "train.compile",
    "torch_compile_mode": "train.compile",
    "use_liger_kernel": "train.compile (Liger's loss is taken where it is installed)",
    "gradient_checkpointing": "train.activation_checkpointing",
    "activation_checkpointing": "train.activation_checkpointing",
    "logging_steps": "train.log_every",
    "logging_strategy": "train.log_every",
    "logging_nan_inf_filter": "train.non_finite",
    "eval_steps": "train.eval_every",
    "eval_strategy": "train.eval_every",
    "eval_on_start": "train.eval_at_start",
    "save_steps": "train.save_every",
    "save_strategy": "train.save_every",
    "save_total_limit": "train.save_total_limit",
    "metric_for_best_model": "train.best_metric",
    "greater_is_better": "train.best_metric",
    "dataloader_num_workers": "data.workers",
    "fsdp": "launch.fsdp",
    "fsdp_config": "launch.fsdp",
    "deepspeed": "launch.deepspeed",
    "parallelism_config": "launch.parallel",
}


class Profile(Section):
    """A torch profiler trace in the run's folder."""

    start: CountOrZero = Field(default=10, description="The first step that is traced.")
    steps: Count = Field(default=5, description="How many steps are traced.")


class Fim(Section):
    """Fill in the middle (Bavarian et al. 2022): which documents are cut in three, their middle written last."""

    rate: Ratio = Field(default=0.5, description="The share of the training documents that are cut.")
    spm_rate: Ratio = Field(default=0.5, description="Of these, the share whose suffix stands before the prefix.")


class Train(Section):
    """How the model is trained. The commands that train need one of `max_tokens`, `max_steps`, `epochs`."""

    objective: Literal["causal", "fim", "masked"] = Field(
        default="causal",
        description="causal: the next token; fim: of documents that may be cut, their middle written last.",
    )
    fim: Fim = Field(default_factory=Fim.model_construct, description="objective fim: what is cut.")
    max_tokens: Count | None = Field(default=None, description="Length of the run in input tokens.")
    max_steps: Count | None = Field(default=None, description="Length of the run in optimizer steps.")
    epochs: Positive | None = Field(default=None, description="Length of the run in passes over the data.")
    global_batch_size: Count | None = Field(
        default=64,
        description="Rows an optimizer step, over all processes and accumulation; none with `global_batch_tokens`.",
    )
    global_batch_tokens: Count | None = Field(default=None, description="The same, in tokens.")
    micro_batch_size: AutoOrCount = Field(
        default="auto",
        description="Rows at once on a device; auto: the largest that a dry step fits in (a CPU: 8K tokens). "
        "Halved when memory runs out. Never changes the global batch.",
    )
    optimizer: str = Field(
        default="adamw",
        min_length=1,
        description="adamw, muon, adafactor, lion, sgd, adamw_8bit, or any OptimizerNames value of transformers.",
    )
    learning_rate: Positive = Field(default=3e-3, description="The highest learning rate.")
    lr_scheduler: str = Field(
        default="cosine",
        min_length=1,
        description="cosine, linear, constant, wsd, or any SchedulerType value of transformers.",
    )
    warmup: StepsOrShare = Field(default=0.02, description="A share of the steps (2%), or a number of steps.")
    decay: Share = Field(default=0.2, description="wsd: the last share of the steps, in which the rate falls.")
    min_lr_ratio: Ratio = Field(
        default=0.1, description="cosine, linear, wsd: the last learning rate over the highest."
    )
    muon_learning_rate: Positive | None = Field(
        default=None, description="muon: the rate of the 2-D hidden matrices; none: `learning_rate`."
    )
    weight_decay: NotNegative = Field(default=0.1, description="Decoupled weight decay.")
    betas: list[Beta] = Field(default=[0.9, 0.95], min_length=2, max_length=2, description="Adam's two averages.")
    adam_epsilon: Positive = Field(default=1e-8, description="Adam's epsilon.")
    max_grad_norm: NotNegative = Field(default=1.0, description="Gradients are clipped to this norm; 0: never.")
    z_loss: NotNegative = Field(default=0.0, description="Weight of the squared log of the softmax's normaliser.")
    label_smoothing: Ratio = Field(
        default=0.0,
        description="The share of a label's weight that goes to all tokens alike; the logged loss is without it.",
    )
    neftune_noise_alpha: Positive | None = Field(
        default=None,
        description="NEFTune: noise on the embeddings in training, of this over the root of length times width.",
    )
    max_time: Duration | None = Field(
        default=None, description="Save and stop with code 75 after this time (11h30m), for time-limited jobs."
    )
    profile: Profile | None = Field(default=None, description="A torch profiler trace in the run's folder.")
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = Field(
        default="auto",
        description="The arithmetic of training. auto: bf16 on GPUs from Ampere on, scaled fp16 on Volta and Turing; a "
        "CPU with fast bf16 times this model in both. fp8: with torchao, on Ada, Hopper and later.",
    )
    compile: AutoOrBool = Field(
        default="auto",
        description="torch.compile of the model below its head, tried before the first step and given up, with a line, "
        "where it fails. auto: on a GPU, for 500 steps or more.",
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = Field(
        default="auto",
        description="The attention kernel. auto: FlashAttention 3 on Hopper where it is installed, our own for short "
        "rows in bf16 on a CPU, else sdpa.",
    )
    activation_checkpointing: bool = Field(
        default=False, description="Compute activations twice instead of keeping them."
    )
    log_every: Count = Field(default=10, description="Steps between lines of metrics.jsonl.")
    eval_every: CountOrZero = Field(default=250, description="Steps between evaluations; 0: only at the end.")
    save_every: CountOrZero = Field(default=250, description="Steps between checkpoints; 0: only at the end.")
    save_total_limit: Count = Field(default=3, description="Checkpoints that are kept.")
    on_save_error: Literal["stop", "continue"] = Field(
        default="stop",
        description="What to do when a checkpoint cannot be written: stop with code 4, or go on to the next save. "
        "The last one, and one before a stop, must succeed.",
    )
    eval_at_start: bool = Field(default=False, description="Evaluate before the first step.")
    best_metric: str = Field(
        default="validation.loss",
        min_length=1,
        description="What the best checkpoint is chosen by, with `early_stopping_patience`: `validation.loss`, "
        "`.bits_per_byte`, `.perplexity`, or a number of the recipe's tasks, such as `validation.accuracy`. Lower is "
        "better of these three, `wer`, `cer` and `repetition`, higher of all others.",
    )
    sample_every: CountOrZero = Field(
        default=250,
        description="Steps between texts from `generate.prompts`, to samples.jsonl and the screen; 0: never.",
    )
    non_finite: Literal["stop", "skip"] = Field(
        default="stop",
        description="A loss or gradient that is not finite: stop with code 5, or skip the step's update; ten steps in "
        "a row stop.",
    )
    loss_spike: Literal["log", "skip", "stop"] = Field(
        default="log",
        description="A loss or gradient norm more than six standard deviations above the last 128 steps: say so, skip "
        "the step's update, or stop with code 5.",
    )
    early_stopping_patience: Count | None = Field(
        default=None,
        description="Stop after this many evaluations without a better `best_metric`; the best one's checkpoint is "
        "kept, and `final/` holds its weights.",
    )
    trainer_args: dict[str, Any] = Field(
        default={},
        description="Any other field of transformers.TrainingArguments; one that a key of the recipe sets is refused.",
    )

    def rows_of_step(self, length: int) -> int:
        """Rows of `length` tokens a step, over all processes; 0 where `global_batch_tokens` are less than one."""
        if self.global_batch_tokens is not None:
            return self.global_batch_tokens // length
        assert self.global_batch_size is not None  # the schema has one of the two
        return self.global_batch_size

    @model_validator(mode="before")
    @classmethod
    def _tokens_replace_rows(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("global_batch_tokens") is not None:
            return {"global_batch_size": None, **value}
        return value

    @model_validator(mode="after")
    def _agrees(self) -> Train:
        one_of(self, "max_tokens, max_steps, epochs", ("max_tokens", "max_steps", "epochs"), "", required=False)
        one_of(
            self,
            "global_batch_size, global_batch_tokens",
            ("global_batch_size", "global_batch_tokens"),
            "for example global_batch_size: 64",
        )
        if "min_lr_ratio" in self.model_fields_set and self.lr_scheduler not in FLOOR_SCHEDULERS:
            raise ValueError(
                f"min_lr_ratio works with lr_scheduler {', '.join(FLOOR_SCHEDULERS)}, not "
                f"{self.lr_scheduler}; remove it"
            )
        for name in self.trainer_args:
            if name in TRAINER_ARGS_OF_RECIPE:
                raise ValueError(f"trainer_args.{name} is set by {TRAINER_ARGS_OF_RECIPE[name]}; use that instead")
        return self


class Lora(Section):
    """The shape of a LoRA adapter."""

    r: Count = Field(default=16, description="The rank.")
    alpha: Positive = Field(default=32.0, description="What an adapter adds is multiplied by this over the rank.")
    dropout: Ratio = Field(default=0.0, description="Dropout before the adapter.")
    target_modules: str | list[str] = Field(
        default="all-linear",
        description="The last words of module names (q_proj), a regular expression of whole names, or all-linear: all "
        "linear layers but the output head; of a model that sees or hears, those of its language model. embeddings: "
        "the table of tokens.",
    )
    rank_stabilized: bool = Field(
        default=False, description="Over the square root of the rank instead (Kalajdzievski 2023)."
    )


class RegexReward(Section):
    """A reward of 1 where the pattern matches."""

    regex: str = Field(description="The pattern that a completion has to match.")


def _reward(value: object) -> object:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, dict):
        return RegexReward(**value)
    raise ValueError("expected exact_match, file.py:function, or {regex: PATTERN}")


class Finetune(Section):
    """What `gptcli finetune` does beyond `train`."""

    method: Literal["sft", "dpo", "kto", "orpo", "grpo"] = Field(default="sft", description="The method.")
    train_on: Literal["completion", "all"] = Field(
        default="completion", description="completion: completions, a chat's answers; all: prompts and questions too."
    )
    adapter: Literal["none", "lora", "dora", "qlora"] = Field(
        default="none",
        description="Full fine-tuning, or an adapter: small matrices that are trained beside the model's own (peft). "
        "qlora: lora on a model in 4 bits, on a GPU with bitsandbytes.",
    )
    adapter_from: str | None = Field(
        default=None, description="Go on with the adapter in this folder, which belongs to `model.from`."
    )
    lora: Lora = Field(default_factory=Lora.model_construct, description="The adapter's shape.")
    merge: bool = Field(default=False, description="`final/` is a whole model, with the adapter in `final/adapter/`.")
    beta: Positive = Field(default=0.1, description="dpo, kto, orpo: how far from the reference model.")
    reward: Annotated[
        str | RegexReward,
        BeforeValidator(_reward),
        accepts({"type": "string"}, {"type": "object", "required": ["regex"]}),
    ] = Field(default="exact_match", description="grpo: exact_match, file.py:function, or {regex: PATTERN}.")
    freeze: list[str] = Field(
        default=[],
        description="Names of modules that are not trained (`embed_tokens`, `layers.0`), nor what is in them; they get "
        "no adapter.",
    )

    @model_validator(mode="after")
    def _adapter_is_said(self) -> Finetune:
        if self.adapter == "none":
            for name, is_set in (("adapter_from", self.adapter_from is not None), ("merge", self.merge)):
                if is_set:
                    raise ValueError(f"{name} needs an adapter; set adapter: lora")
        if self.adapter_from is not None:
            given = self.lora.model_dump() != Lora().model_dump()
            for name, is_set in (("lora", given), ("freeze", bool(self.freeze))):
                if is_set:
                    raise ValueError(f"{name} is that of adapter_from; remove it")
        return self
