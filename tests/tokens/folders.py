"""Folders of tokenizers as models have them, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SAID = ["the gateway keeps what it has promised", "and late tokens have a cause", "<|x|>", "été"]
SPECIAL = ["<|start|>", "<|end|>", "<|begin|>"]
CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_level() -> Tokenizer:
    """As Llama 3, Qwen and GPT have them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SAID * 9, trainer)
    return with_special(tokenizer)


def of_words() -> Tokenizer:
    """As Llama 2 and Mistral: the first word of a text has a mark that no other beginning has."""
    tokenizer = Tokenizer(models.BPE(unk_token="?", byte_fallback=False, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    alphabet = sorted(set("".join(SAID)) | {"?", "▁"})
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False, special_tokens=["?"]
    )
    tokenizer.train_from_iterator(SAID * 9, trainer)
    return with_special(tokenizer)


def with_special(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_special_tokens([AddedToken("<|greedy|>", lstrip=True, rstrip=True)])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    begin = tokenizer.token_to_id("<|begin|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    return tokenizer


def folder_of(tokenizer: Tokenizer, at: Path, template: str | None = CHATML, **said: Any) -> Path:
    tokenizer.save(str(at / "tokenizer.json"))
    settings = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}, **said}
    if template is not None:
        settings["chat_template"] = template
    (at / "tokenizer_config.json").write_text(json.dumps(settings))
    return at
