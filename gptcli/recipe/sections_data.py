"""The sections `tokenizer`, `data` and `model` of a recipe: what is read, and what is trained.

Checks that need only these sections stand here, each with its remedy in the message; what needs two sections stands in
`schema`.
"""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from gptcli.recipe import units
from gptcli.recipe.fields import SHARE, AutoOrCountOrZero, Count, Positive, Section, Texts, accepts
from gptcli.recipe.sections_rows import EXAMPLES, Messages, Preference, as_messages, checked_template

PresetName: TypeAlias = Literal["1m", "10m", "30m", "124m", "350m", "774m", "1.5b", "vision-1m", "audio-1m"]
Documents: TypeAlias = Literal["file", "line", "blank-line"]
BYTES_VOCABULARY = 258
MAX_VOCABULARY = (
    2_000_000  # the largest published ones have a million entries; the trainer takes memory for all at once
)


def one_of(section: Section, group: str, names: tuple[str, ...], remedy: str, *, required: bool = True) -> None:
    """Raise a `ValueError` unless exactly one (at most one, if not `required`) of the alternatives is given."""
    given = [name for name in names if getattr(section, "from_" if name == "from" else name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other; keep one of {group}")
    if required and not given:
        raise ValueError(f"needs one of {group}; {remedy}")


class TokenizerTraining(Section):
    """A tokenizer of one's own, trained on the training data."""

    algorithm: Literal["bpe", "bytes"] = Field(
        default="bpe", description="bpe: byte-level BPE. bytes: 256 byte tokens and the two specials, nothing to train."
    )
    vocab_size: Count = Field(
        default=8192,
        le=MAX_VOCABULARY,
        description="Entries, specials (`<|endoftext|>`, `<|pad|>`) included; 258 with `bytes`.",
    )
    pattern: Literal["gpt2", "gpt4", "llama3", "qwen2"] = Field(
        default="gpt4", description="How text is cut into words before BPE merges."
    )
    special_tokens: Texts | None = Field(
        default=None, description="Further special tokens; those of a named chat_template are there without."
    )

    @model_validator(mode="before")
    @classmethod
    def _bytes_has_its_size(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("algorithm") == "bytes" and value.get("vocab_size") is None:
            return {**value, "vocab_size": BYTES_VOCABULARY}
        return value

    @model_validator(mode="after")
    def _size_fits(self) -> TokenizerTraining:
        if self.algorithm == "bytes" and self.special_tokens:
            raise ValueError("algorithm bytes has no further special_tokens; remove them, or use bpe")
        if self.algorithm == "bytes" and self.vocab_size != BYTES_VOCABULARY:
            raise ValueError(f"algorithm bytes always has vocab_size {BYTES_VOCABULARY}; remove vocab_size")
        least = BYTES_VOCABULARY + len(set(self.special_tokens or ()))
        if self.vocab_size < least:
            raise ValueError(f"vocab_size must be at least {least}: 256 bytes and {least - 256} specials")
        return self


class Tokenizer(Section):
    """Exactly one of `from` and `train`. Without this section, the tokenizer of `model.from`."""

    from_: str | None = Field(default=None, alias="from", description="A Hub id, a folder, or a tokenizer.json.")
    train: TokenizerTraining | None = Field(default=None, description="Train one on the training data.")
    chat_template: str | None = Field(default=None, description="A chat template's name or file; kept with the model.")

    @model_validator(mode="after")
    def _exactly_one(self) -> Tokenizer:
        one_of(self, "from, train", ("from", "train"), "for example train: {algorithm: bpe, vocab_size: 8192}")
        return self


def _path(value: object) -> object:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, dict) and value and all(isinstance(item, str) and item for item in value.values()):
        return value
    raise ValueError("expected a path (or {column: path, ...} for parallel line files)")


class Source(Section):
    """Where rows come from: exactly one of `path` and `tokens`. A text alone is the path."""

    path: Annotated[str | dict[str, str] | None, BeforeValidator(_path)] = Field(
        default=None,
        description="`builtin:NAME`, a file, a glob, a folder, `hub:OWNER/NAME`, or parallel files by column.",
    )
    tokens: str | None = Field(default=None, description="Tokens made before: our shards' folder, a .bin or a .npy.")
    dtype: Literal["uint16", "uint32"] | None = Field(
        default=None, description="The type of the numbers in a .bin of `tokens`."
    )
    split: str | None = Field(default=None, description="The split of a Hub set or of a folder of splits.")
    weight: Positive | None = Field(
        default=None,
        description="Share of the rows, normalised over the sources; none given: in proportion to size. "
        "A source that runs out begins again. For `data.train` alone.",
    )
    text: str = Field(default="text", description="The column that holds the text (jsonl, csv, parquet, hub).")
    limit: Count | None = Field(default=None, description="At most this many rows.")
    config: str | None = Field(default=None, description="The configuration of a Hub set.")
    revision: str | None = Field(default=None, description="The revision of a Hub set.")
    columns: list[str] | None = Field(default=None, description="Names of the columns, for a file without a header.")
    map: dict[str, dict[str, Any]] | None = Field(
        default=None, description="New values of a column: {label: {0: no, 1: yes}}."
    )
    documents: Documents | None = Field(default=None, description="As `data.documents`, for this source alone.")

    @model_validator(mode="after")
    def _exactly_one(self) -> Source:
        one_of(self, "path, tokens", ("path", "tokens"), "for example path: corpus.txt")
        if self.dtype is not None and self.tokens is None:
            raise ValueError("dtype belongs to tokens; remove it")
        of_texts = {"split", "text", "config", "revision", "columns", "map", "documents"} & self.model_fields_set
        if self.tokens is not None and of_texts:
            raise ValueError(f"{sorted(of_texts)[0]} belongs to path, not to tokens; remove it")
        return self


class Tail(Section):
    """The last part of each text is held out."""

    tail: Annotated[
        float,
        BeforeValidator(units.part),
        accepts({"type": "number", "exclusiveMaximum": 1}, SHARE),
    ] = Field(description="The share of each text, from its end.")

    @model_validator(mode="after")
    def _not_nothing(self) -> Tail:
        if not self.tail:
            raise ValueError("tail must be above 0%; validation: 0 holds nothing out")
        return self


def as_sources(value: object) -> object:
    """One source (a path or a mapping) as a list of one; the paths in a list as sources."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError("expected a source or a list of sources, such as {path: corpus.txt}")
    return [{"path": item} if isinstance(item, str) else item for item in items]


def _validation_kind(value: object) -> str:
    if (isinstance(value, dict) and "tail" in value) or isinstance(value, Tail):
        return "<tail>"
    if (isinstance(value, str) and not units.is_share(value)) or isinstance(value, dict | list):
        return "<sources>"
    return "<share>"


def _validation_share(value: object) -> float:
    try:
        share = units.share_or_more(value)
    except ValueError:
        raise ValueError("expected a share such as 1%, {tail: 10%}, or a source such as {path: held-out.txt}") from None
    if share >= 1:
        raise ValueError("a validation share must be below 100%, such as 1%; to hold out a file: {path: FILE}")
    return share


class _OneOrMany:
    """The JSON schema of a list that may be written as one item, or as a path."""

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        item = {"anyOf": [{"type": "string"}, handler(core)["items"]]}
        return {"anyOf": [*item["anyOf"], {"type": "array", "items": item, "minItems": 1}]}


class _TextOrKeys:
    """The JSON schema of a section that may be written as one text."""

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(core)]}


def _unweighted(source: Source) -> Source:
    if source.weight is not None:
        raise ValueError("weight belongs to data.train; remove it")
    return source


Sources: TypeAlias = Annotated[list[Source], BeforeValidator(as_sources), _OneOrMany()]
# Texts that are measured, each once: nothing is mixed.
MeasuredSources: TypeAlias = Annotated[
    list[Annotated[Source, AfterValidator(_unweighted)]], BeforeValidator(as_sources), _OneOrMany()
]
ValidationShare: TypeAlias = Annotated[
    float,
    BeforeValidator(_validation_share),
    accepts({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, SHARE),
]


Validation: TypeAlias = Annotated[
    Annotated[ValidationShare, Tag("<share>")]
    | Annotated[Tail, Tag("<tail>")]
    | Annotated[MeasuredSources, Tag("<sources>")],
    Discriminator(_validation_kind),
]


class Data(Section):
    """What is trained on, what is held out, and how texts become rows."""

    train: Sources = Field(description="One source or a list.")
    validation: Validation = Field(
        default=0.01,
        description="A share of the documents, held out by a hash of their text (0: none); or a source or a list; "
        "or {tail: 10%}: the last part of each text.",
    )
    format: Literal["text", "prompt", "chat", "preference"] = Field(default="text", description="What a row is.")
    documents: Documents = Field(default="file", description="For plain .txt: what one document is.")
    prompt: Annotated[str | None, AfterValidator(checked_template)] = Field(
        default=None, description="format prompt: a template over the row's columns, `{col}`; `{{` is a brace."
    )
    completion: Annotated[str | None, AfterValidator(checked_template)] = Field(
        default=None, description="format prompt: the template of what is to be learnt; EOS is put behind it."
    )
    preference: Preference | None = Field(default=None, description="format preference: the columns.")
    messages: Annotated[Messages | None, BeforeValidator(as_messages), _TextOrKeys()] = Field(
        default=None, description="format chat: the column of messages, or {column, shape}."
    )
    images: Texts | None = Field(
        default=None, description="Columns that hold image paths or bytes; {image} places them in a prompt."
    )
    audios: Texts | None = Field(default=None, description="Columns that hold sounds.")
    videos: Texts | None = Field(default=None, description="Columns that hold videos.")
    allow_urls: bool = Field(default=False, description="Whether images and sounds may be fetched from URLs.")
    allow_outside: bool = Field(
        default=False, description="Whether images and sounds may lie elsewhere than below the data file's folder."
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="A row that cannot be read; skipped rows are counted."
    )
    cache_features: bool = Field(
        default=False,
        description="Run a frozen tower once on each image or sound; epochs and later runs read its outputs from disk.",
    )
    shuffle: bool = Field(default=True, description="A new order of the rows every epoch, keyed by the seed.")
    workers: AutoOrCountOrZero = Field(
        default="auto", description="Processes that prepare batches; 0: the training process itself."
    )
    sequence_length: Count = Field(default=1024, description="Tokens of a row.")
    packing: Literal["concat", "isolated", "none"] = Field(
        default="concat",
        description="concat (default of format text): one stream cut into rows; isolated (default of the others): "
        "several documents a row, each seeing only itself; none: one document a row.",
    )
    overlong: Literal["split", "truncate", "drop", "error"] = Field(
        default="split",
        description="isolated and none: a document longer than a row; one with media is dropped or an error, never "
        "cut. Preference data: truncate (its default), drop or error.",
    )
    deduplicate: Literal["none", "exact"] = Field(
        default="none", description="Drop documents whose text was seen before."
    )

    @property
    def weights(self) -> list[float] | None:
        """The weight of each source of `train`; None: in proportion to size."""
        given = [source.weight for source in self.train if source.weight is not None]
        return given or None

    @property
    def media(self) -> tuple[tuple[Literal["image", "audio", "video"], tuple[str, ...]], ...]:
        """The columns that hold media, by their kind."""
        named = tuple(tuple(columns or ()) for columns in (self.images, self.audios, self.videos))
        kinds: tuple[Literal["image", "audio", "video"], ...] = ("image", "audio", "video")
        return tuple((kind, columns) for kind, columns in zip(kinds, named, strict=True) if columns)

    @model_validator(mode="before")
    @classmethod
    def _packing_follows_the_format(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("format", "text") != "text" and value.get("packing") is None:
            return {**value, "packing": "isolated"}
        return value

    @model_validator(mode="before")
    @classmethod
    def _pairs_are_not_split(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("format") == "preference" and value.get("overlong") is None:
            return {**value, "overlong": "truncate"}
        return value

    @model_validator(mode="after")
    def _format_has_its_keys(self) -> Data:
        missing = [key for key in ("prompt", "completion") if self.format == "prompt" and getattr(self, key) is None]
        if missing:
            raise ValueError(
                f"format prompt needs {missing[0]}; for example {missing[0]}: '{{{EXAMPLES[missing[0]]}}}'"
            )
        for key in ("prompt", "completion", "messages", "preference"):
            belongs = "chat" if key == "messages" else "preference" if key == "preference" else "prompt"
            if getattr(self, key) is not None and self.format != belongs:
                raise ValueError(f"{key} belongs to format {belongs}; write format: {belongs}, or remove it")
        self._media_have_places()
        held_out = self.validation if isinstance(self.validation, list) else []
        if self.format == "text":
            if any(source.map for source in [*self.train, *held_out]):
                raise ValueError("map is for the columns of format prompt and chat; remove it from the source")
            for source in [*self.train, *held_out]:
                if isinstance(source.path, dict) and source.text not in source.path:
                    raise ValueError(
                        f"parallel files are columns, and none is named {source.text!r}; name the one that holds the "
                        f"text (text: {next(iter(source.path))}), or write format: prompt"
                    )
            return self
        if isinstance(self.validation, Tail):
            raise ValueError("validation by tail cuts texts, and a row is not cut; hold out a share: validation: 5%")
        if any(source.tokens is not None for source in [*self.train, *held_out]):
            raise ValueError(f"format {self.format} needs rows, and tokens do not say what is trained on; give path")
        return self

    def _media_have_places(self) -> None:
        columns = [column for _, named in self.media for column in named]
        if not columns:
            return
        keys = " and ".join(key for key in ("images", "audios", "videos") if getattr(self, key))
        if self.format not in ("prompt", "chat"):
            raise ValueError(f"{keys}: media are of rows of format prompt or chat, and format is {self.format}")
        if len(set(columns)) < len(columns):
            raise ValueError(f"{keys}: a column is named twice")
        if self.format == "chat":
            return
        asked = {column for _, column, _, _ in Formatter().parse(self.prompt or "") if column}
        said = {column for _, column, _, _ in Formatter().parse(self.completion or "") if column}
        for kind, named in self.media:
            for column in (*named, kind):
                if column in said:
                    raise ValueError(f"completion has {{{column}}} in it, and a model says text alone")
            if kind not in asked and (unplaced := [column for column in named if column not in asked]):
                raise ValueError(f"prompt has no place for {unplaced[0]!r}: write {{{kind}}} where it is to stand")

    @model_validator(mode="after")
    def _sources_agree(self) -> Data:
        weighted = [source.weight is not None for source in self.train]
        if any(weighted) and not all(weighted):
            raise ValueError("some sources of train have a weight and some have none; give every source one, or none")
        if isinstance(self.validation, list):
            held_out = {key for source in self.validation for key in _identities(source)}
            for source in self.train:
                for key in _identities(source):
                    if key in held_out:
                        raise ValueError(
                            f"{key[0]} is in both train and validation; hold out another file, or use validation: 1%"
                        )
        return self


def _identities(source: Source) -> list[tuple[str | None, ...]]:
    paths = list(source.path.values()) if isinstance(source.path, dict) else [source.path or source.tokens]
    return [(path, source.config, source.split) for path in paths]


class Model(Section):
    """Exactly one of `from` and `type`."""

    from_: str | None = Field(
        default=None, alias="from", description="A Hub id or a folder: continue it or fine-tune it."
    )
    type: str | None = Field(default=None, description="Any causal model_type of transformers: gpt2, llama, qwen3, ...")
    preset: PresetName | None = Field(
        default=None, description="Depth, width and heads for `type`; see the table of presets."
    )
    config: dict[str, Any] | None = Field(
        default=None, description="Any field of that type's configuration; wins over the preset."
    )
    trust_remote_code: bool = Field(default=False, description="Run code that comes with a model of the Hub.")
    revision: str | None = Field(default=None, description="The revision of a Hub model.")
    rope_scaling: dict[str, Any] | None = Field(
        default=None, description="A longer context than the model of `from` was made for."
    )
    smoke_type: str = Field(default="llama", description="The type of the tiny stand-in for `from` in a `--smoke` run.")

    @model_validator(mode="after")
    def _exactly_one(self) -> Model:
        one_of(self, "from, type", ("from", "type"), "for example type: llama and preset: 10m")
        if self.type is not None and self.preset is None and not self.config:
            raise ValueError("type needs a size: preset: 10m, or config: {num_hidden_layers: 6, hidden_size: 384, ...}")
        if self.from_ is not None and (self.preset is not None or self.config is not None):
            raise ValueError("preset and config belong to model.type; a model of from has its size; remove them")
        if self.type is not None and self.revision is not None:
            raise ValueError("revision belongs to model.from; remove it")
        if self.type is not None and self.rope_scaling is not None:
            raise ValueError("rope_scaling belongs to model.from; with type, set it under model.config")
        return self
