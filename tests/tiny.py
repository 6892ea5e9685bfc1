"""Tiny random models of several types, and tokenizers of three families, for tests without a network."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END, PAD = "<|endoftext|>", "<|pad|>"
TEXT = "hello world, the cat sat on the mat. " * 10


def byte_tokenizer(vocab_size: int = 300, *, bos: bool = False) -> Tokenizer:
    """Byte-level BPE; END is token 0. `bos`: its post-processor puts END in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return tokenizer


def fallback_tokenizer() -> Tokenizer:
    """What sentencepiece models are: words that begin with ▁, and bytes for all characters that are not known."""
    pieces = [END, PAD, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"helowrdctasnm,.", "é"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([END, PAD])
    return tokenizer


def wrapped(tokenizer: Tokenizer) -> Any:
    """A tokenizer as transformers has it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD)


def make_model(kind: str = "llama", *, vocab_size: int = 300, context: int = 64, **config: Any) -> Any:
    """A model of 2 layers x 32 with random weights, large enough to be far from uniform."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "vocab_size": vocab_size,
        "max_position_embeddings": context,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "initializer_range": 0.4,
    }
    if kind != "gpt2":
        sizes |= {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16}
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **config}))
    torch.set_rng_state(state)
    return model.eval()


@functools.cache
def shared_tokenizer() -> Any:
    """One byte-level tokenizer of 300 entries for all tests."""
    return wrapped(byte_tokenizer())


def save_model(folder: Path, kind: str = "llama", **config: Any) -> Path:
    """A Hugging Face folder with a tiny model and its tokenizer."""
    make_model(kind, **config).save_pretrained(folder)
    shared_tokenizer().save_pretrained(str(folder))
    return folder
