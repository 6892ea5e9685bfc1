"""`tokenizer.train`: a tokenizer of the recipe's own texts, trained once and kept in the cache.

It is trained on a sample of the training side whose choice depends on the texts alone, 200 MB at most.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gptcli.data.encode import safe_cuts, tokenizer_threads, utf8_size
from gptcli.data.finish import check_sides
from gptcli.data.infill import TOKENS
from gptcli.data.job import MEGA, Job
from gptcli.data.split import SAMPLE_BUCKETS, SAMPLE_BYTES, bucket_column, sample_buckets
from gptcli.data.stages import repeated_marks, run_stage, surveyed, waiting
from gptcli.data.tokenizer import END_OF_TEXT, PAD, save_bytes_tokenizer, train_bpe
from gptcli.data.work import Task, sample
from gptcli.errors import RecipeError
from gptcli.files import cache_root, committed_folder, fingerprint, locked, remove_uncommitted

if TYPE_CHECKING:
    from gptcli.data.chat_template import ChatTemplate
    from gptcli.recipe.load import LoadedRecipe
    from gptcli.recipe.schema import TokenizerTraining
    from gptcli.reporting import Reporter

# 2: another spelling of the patterns, a sample by buckets.
FORMAT = 2


def trained_tokenizer(
    spec: TokenizerTraining,
    template: ChatTemplate | None,
    loaded: LoadedRecipe,
    job: Job,
    reporter: Reporter,
    media_tokens: Sequence[str] = (),
) -> tuple[Path, bool]:
    """(folder of the tokenizer that a recipe asks to train, whether it was trained now and not found in the cache).

    The special tokens of a named `template`, those of objective fim, and those that stand for images and sounds, are
    among its own.
    """
    if spec.algorithm == "bytes":
        if media_tokens:
            raise RecipeError(
                f"algorithm bytes has no {', '.join(media_tokens)}, which stand for images and sounds",
                where=loaded.where("tokenizer.train"),
                remedy="tokenizer: {train: {algorithm: bpe, vocab_size: 512}}",
            )
        folder = cache_root() / "tokenizers" / fingerprint([FORMAT, "bytes"])
        if not folder.is_dir():
            with committed_folder(folder) as work:
                save_bytes_tokenizer(work)
        return folder, False
    if job.has_tokens:
        raise RecipeError(
            "a tokenizer cannot be trained on tokens made before, which are another one's",
            where=loaded.where("tokenizer.train"),
            remedy="Name the tokenizer that made them: tokenizer: {from: ...}",
        )
    for_infill = TOKENS if job.infill is not None else ()
    for_chat = template.special_tokens if template else ()
    specials = list(dict.fromkeys([*(spec.special_tokens or ()), *for_chat, *for_infill, *media_tokens]))
    # The recipe's own special tokens are counted where it is read; a template's are known only here.
    if spec.vocab_size < (least := 256 + len({END_OF_TEXT, PAD, *specials})):
        raise RecipeError(
            f"vocab_size must be at least {least}: 256 bytes and {least - 256} specials (of chat and media too)",
            where=loaded.where("tokenizer.train.vocab_size"),
            remedy=f"tokenizer.train.vocab_size: {least}, or more",
        )
    key = [FORMAT, spec.algorithm, spec.vocab_size, spec.pattern, specials, SAMPLE_BYTES, job.spec]
    folder = cache_root() / "tokenizers" / fingerprint(key)
    if folder.is_dir():
        return folder, False
    with locked(folder.name, waiting(reporter)):
        if folder.is_dir():
            return folder, False
        remove_uncommitted(folder)
        texts = _training_sample(loaded, job, reporter)
        size = sum(map(utf8_size, texts))
        reporter.say(f"training a tokenizer of {spec.vocab_size:,} entries on {size / MEGA:,.1f} MB of text")
        started = time.monotonic()
        with tokenizer_threads(every_core=True), committed_folder(folder) as work:
            pieces = (piece for text in texts for piece in safe_cuts(text))
            entries = train_bpe(pieces, work, vocab_size=spec.vocab_size, pattern=spec.pattern, special_tokens=specials)
    if entries < spec.vocab_size:
        reporter.say(
            f"the text gave a tokenizer of {entries:,} entries, not {spec.vocab_size:,}: "
            "no further pair of tokens occurs twice (the model's vocabulary follows)"
        )
    reporter.say(f"trained the tokenizer in {time.monotonic() - started:.1f} s")
    return folder, True


def _training_sample(loaded: LoadedRecipe, job: Job, reporter: Reporter) -> list[str]:
    """The sample of the training side, in the order of the sources; at most `SAMPLE_BYTES` of text."""
    folder, results = surveyed(loaded, job, reporter, None)
    dropped = sum((Counter(result["dropped"]) for result in results.values()), Counter[str]())
    chains = [chain for chain in job.chains if not chain[0].stream.held_out]
    pieces = [piece for chain in chains for piece in chain if piece.index in results]
    sides = {"train": 0, "validation": 0}
    buckets = SAMPLE_BUCKETS
    if pieces:
        held_out = sum(int(np.load(folder / piece.name / "held_out.npy").sum()) for piece in pieces)
        documents = sum(results[piece.index]["documents"] for piece in pieces)
        sides = {"train": documents - held_out, "validation": documents if job.split.tail else held_out}
        buckets = sample_buckets(
            (
                (
                    bucket_column(np.load(folder / piece.name / "digests.npy")),
                    np.load(folder / piece.name / "bytes.npy"),
                )
                for piece in pieces
            ),
            SAMPLE_BYTES,
        )
    check_sides(job, sides["train"], None if job.validation else sides["validation"], dropped)
    repeated = repeated_marks(loaded, job, reporter, None) if job.data.deduplicate == "exact" else None
    task = Task(folder, job.split, repeated, buckets=buckets)
    found = dict(run_stage(sample, chains, task, loaded, reporter, "sampling"))
    return _bounded([text for index in sorted(found) for text in found[index]["texts"]])


def _bounded(texts: list[str]) -> list[str]:
    """The texts, cut to `SAMPLE_BYTES` where one bucket has more: a long text, or one that is there many times."""
    if sum(map(utf8_size, texts)) <= SAMPLE_BYTES:
        return texts
    kept = []
    left = SAMPLE_BYTES
    for text in sorted(texts):  # the choice does not depend on their order
        raw = text.encode("utf-8")
        kept.append(raw[:left].decode("utf-8", "ignore"))
        left -= len(raw)
        if left <= 0:
            break
    return kept
