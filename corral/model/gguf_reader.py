"""Checks GGUF files, and converts them to a safetensors folder.

A GGUF file consists of a header, key-value metadata, a tensor table and the tensors' data. A reader that trusts the file's
counts, lengths and offsets can be made to read outside the file (CVE-2026-7482 is an example). `read_header` therefore
checks each of them against the file's size before any other reader opens the file. It supports versions 2 and 3 of the
specification, little-endian.

`convert_to_folder` uses transformers' converter, and rejects files with features that the converter silently drops: experts,
and rope scaling that matches no known rule. It also rebuilds the tokenizer's splitting rule where the converter does not
support it, so that token ids are those the model was trained with.

The caller caches the converted folder (`model.loading`); `export.gguf_writer` writes GGUF files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from corral.errors import CorralError, ModelError
from corral.model.config import state_for_transformers_4
from corral.model.gguf_shapes import ROPE_DIVISORS, find_shape_error
from corral.model.rope import llama3_parameters
from corral.storage import write_json
from corral.template.tokenizer_files import save_tokenizer

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MIN_TENSOR_ENTRY = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, dimension count, one dimension, type, offset
# Far above any real vocabulary. The file's size is no bound: a sparse file can have any size, and entries are held in memory.
_MOST_ENTRIES = 2**24
_LONGEST_TEXT = 2**26
_MIN_FIELD = 8 + 1 + 4 + 1
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_SPACE = "\u2581"
_USER_DEFINED = 4  # a token type
_SPLITS = ("smollm", "gpt-2", *_LLAMA3_NAMES)

CONVERSION_VERSION = 3
"""Increase it when `convert_to_folder` would write other bytes for the same file: cached conversions are then redone."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One entry of the tensor table. `shape` is in GGUF order (fastest first); `offset` and `size` are bytes in the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The metadata by key (arrays as lists) and the tensors. All tensors lie inside the file and do not overlap."""

    version: int
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]


def read_header(path: Path) -> GgufHeader:
    """Reads and checks everything except the tensors' data.

    Raises:
        ModelError: if the file cannot be read, is not a GGUF file, is truncated, or has an invalid count, length, type or
            offset. The message names the value and its byte position.
    """
    try:
        with open(path, "rb") as file:
            return _Reader(path, file).header()
    except OSError as error:
        raise ModelError(f"cannot read the GGUF file: {error.strerror or error}", where=str(path)) from error


class _Reader:
    """Reads little-endian values. Raises ModelError instead of reading past the end of the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.size = file.seek(0, 2)
        self.at = file.seek(0)

    def fail(self, what: str, at: int | None = None) -> ModelError:
        return ModelError(
            f"not a valid GGUF file: {what}",
            where=f"{self.path}, byte {self.at if at is None else at} of {self.size}",
            hint="download it again, and compare its sha256 with the publisher's",
        )

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise self.fail(f"{what} needs {count} bytes, {self.size - self.at} are left (truncated?)")
        data = self.file.read(count)
        if len(data) != count:
            raise self.fail(f"{what} could not be read whole")
        self.at += count
        return data

    def number(self, code: str, what: str) -> int:
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0])

    def count(self, what: str, unit: int) -> int:
        """Reads a count of items that take at least `unit` bytes each, and checks that the file can hold them."""
        start = self.at
        value = self.number("Q", what)
        if value * unit > self.size - self.at:
            raise self.fail(f"{what} is {value}, more than the rest of the file can hold", start)
        if value > (_LONGEST_TEXT if unit == 1 else _MOST_ENTRIES):
            raise self.fail(f"{what} is {value}, more than any model has", start)
        return value

    def string(self, what: str) -> str:
        length = self.count(f"length of {what}", 1)
        start = self.at
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8: {error.reason}", start + error.start) from error

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            raise self.fail(f"{what} has unknown type {kind}")
        if kind == _BOOL:
            return self.number("B", what) != 0
        return struct.unpack(f"<{_SCALARS[kind]}", self.take(struct.calcsize(f"<{_SCALARS[kind]}"), what))[0]

    def array(self, what: str) -> list[Any]:
        kind = self.number("I", f"element type of {what}")
        if kind == _STRING:
            return [self.string(f"{what}[{i}]") for i in range(self.count(f"length of {what}", 8))]
        if kind not in _SCALARS:  # nested arrays too: no program writes them, and their depth is unbounded
            raise self.fail(f"{what} is an array of unknown type {kind}")
        width = struct.calcsize(f"<{_SCALARS[kind]}")
        length = self.count(f"length of {what}", width)
        if length > _MOST_ENTRIES:
            raise self.fail(f"{what} has {length} elements, more than any model has")
        return list(struct.unpack(f"<{length}{_SCALARS[kind]}", self.take(length * width, what)))

    def header(self) -> GgufHeader:
        if (magic := self.take(4, "the magic number")) != _MAGIC:
            raise self.fail(f"it starts with {magic!r}, not {_MAGIC!r}", 0)
        version = self.number("I", "the version")
        if version not in _VERSIONS:
            big = " (big-endian)" if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS else ""
            raise self.fail(f"version {version}{big} is not one of {_VERSIONS}", 4)
        tensor_count = self.count("the tensor count", _MIN_TENSOR_ENTRY)
        field_count = self.count("the metadata count", _MIN_FIELD)
        metadata: dict[str, Any] = {}
        for index in range(field_count):
            start = self.at
            key = self.string(f"key {index}")
            if not key or key in metadata:
                raise self.fail(f"key {index} is {key!r}: empty or there twice", start)
            metadata[key] = self.value(self.number("I", f"type of {key}"), key)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment is {alignment!r}, not a power of two of at least 8")
        entries = [self.tensor(index) for index in range(tensor_count)]
        start = -(-self.at // alignment) * alignment
        return GgufHeader(version, metadata, self.placed(entries, start, alignment))

    def tensor(self, index: int) -> GgufTensor:
        """Reads one entry of the tensor table. Its offset is still relative to the start of the data."""
        start = self.at
        name = self.string(f"name of tensor {index}")
        dimensions = self.number("I", f"dimension count of tensor {name!r}")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self.fail(f"tensor {name!r} has {dimensions} dimensions, not 1 to {_MAX_DIMENSIONS}", start)
        shape = tuple(self.number("Q", f"dimension {d} of tensor {name!r}") for d in range(dimensions))
        kind = self.number("I", f"type of tensor {name!r}")
        offset = self.number("Q", f"offset of tensor {name!r}")
        try:
            quantization = GGMLQuantizationType(kind)
        except ValueError as error:
            raise self.fail(f"tensor {name!r} has unknown type {kind}", start) from error
        block, width = GGML_QUANT_SIZES[quantization]
        elements = prod(shape)  # Python's integers cannot overflow; the attack on other readers relies on that
        if elements == 0 or shape[0] % block:
            raise self.fail(f"tensor {name!r} has shape {shape}, which type {quantization.name} cannot have", start)
        return GgufTensor(name, shape, quantization.name, offset, elements // block * width)

    def placed(self, entries: list[GgufTensor], start: int, alignment: int) -> tuple[GgufTensor, ...]:
        """The tensors with absolute offsets. Raises ModelError if one leaves the file, overlaps another or shares its name."""
        names: set[str] = set()
        placed: list[GgufTensor] = []
        for entry in entries:
            end = start + entry.offset + entry.size
            if entry.offset % alignment or end > self.size:
                raise self.fail(
                    f"tensor {entry.name!r} lies at offset {entry.offset} with {entry.size} bytes, ending at byte {end} "
                    f"(truncated, or not aligned to {alignment})"
                )
            if entry.name in names:
                raise self.fail(f"tensor {entry.name!r} is there twice")
            names.add(entry.name)
            placed.append(GgufTensor(entry.name, entry.shape, entry.type, start + entry.offset, entry.size))
        ordered = sorted(placed, key=lambda tensor: tensor.offset)
        for before, after in pairwise(ordered):
            if before.offset + before.size > after.offset:
                raise self.fail(f"tensors {before.name!r} and {after.name!r} overlap", after.offset)
        return tuple(placed)


def convert_to_folder(path: Path, folder: Path) -> None:
    """Converts a GGUF file to a Hugging Face folder: float32 safetensors, tokenizer, template, stop ids.

    Args:
        path: a GGUF file of the llama architecture. It is checked with `read_header` first.
        folder: an existing, empty directory. `storage.new_directory` makes the conversion atomic.

    Raises:
        ModelError: if the file is damaged, or has a feature that the folder cannot express.
    """
    header = read_header(path)
    try:
        _refuse_unconvertible(path, header)
        _convert(path, folder, header)
        _verify(path, folder, header)
    except (CorralError, OSError):
        raise
    except Exception as error:  # three libraries raise for damaged values, without a common class
        raise ModelError(
            f"cannot convert this GGUF file: {type(error).__name__}: {error}",
            where=str(path),
            hint="download it again, and compare its sha256 with the publisher's",
        ) from error


def _convert(path: Path, folder: Path, header: GgufHeader) -> None:
    rope = _rope(path, header)
    # The converter would also read other files in the folder (a config, an adapter, a template), so the file is linked into
    # an empty one. No setting turns off the converter's progress bar, so stderr is redirected.
    with TemporaryDirectory() as alone, redirect_stderr(StringIO()):
        link = Path(alone) / "model.gguf"
        link.symlink_to(path.absolute())
        tokenizer = _tokenizer(link, header.metadata)
        model, info = cast(
            "tuple[Any, dict[str, Any]]",
            AutoModelForCausalLM.from_pretrained(
                alone,
                gguf_file=link.name,
                local_files_only=True,
                dtype=torch.float32,
                output_loading_info=True,
            ),
        )
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info.get(kind)}
    if wrong:
        raise ModelError(f"the GGUF file lacks weights of its architecture: {wrong}", where=str(path))
    # The weights are plain float32 now. Saving raises unless these two attributes are cleared.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    metadata = header.metadata
    model.config.rope_parameters = rope
    ends = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    stops = [metadata[key] for key in ends if key in metadata]
    model.config.bos_token_id = metadata.get("tokenizer.ggml.bos_token_id")
    model.config.eos_token_id = stops[0] if len(set(stops)) == 1 else (list(dict.fromkeys(stops)) or None)
    model.config.pad_token_id = metadata.get("tokenizer.ggml.padding_token_id")
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config.pop("_model_name_or_path", None)  # free text from the file, which readers would treat as a path
    write_json(folder / "config.json", config)
    state_for_transformers_4(folder, model.config)


def _refuse_unconvertible(path: Path, header: GgufHeader) -> None:
    metadata = header.metadata
    other = "use the model's safetensors folder instead"
    checks: list[tuple[str, Callable[[Any], bool], str]] = [
        ("general.architecture", lambda v: v == "llama", "corral reads GGUF files of the llama architecture only"),
        ("llama.expert_count", lambda v: v in (None, 0), "a mixture of experts is not a Llama model"),
        ("llama.rope.scaling.type", lambda v: v in (None, "none", "linear"), "this rope scaling is not known here"),
        ("tokenizer.ggml.model", lambda v: v in ("gpt2", "llama"), "this kind of tokenizer is not known"),
    ]
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        known = f"it must be one of {', '.join(_SPLITS)}: with another rule the token ids would be wrong"
        checks.append(("tokenizer.ggml.pre", lambda v: v in _SPLITS, known))
    for key, good, reason in checks:
        value = metadata.get(key)
        if not good(value):
            raise ModelError(f"cannot use this GGUF file: {key} is {value!r}; {reason}", where=str(path), hint=other)
    fault = find_shape_error(metadata, {tensor.name: tensor.shape for tensor in header.tensors})
    if fault is not None:
        raise ModelError(f"cannot use this GGUF file: {fault}", where=str(path), hint=other)
    embedding = next((tensor for tensor in header.tensors if tensor.name == "token_embd.weight"), None)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if embedding is None or not isinstance(tokens, list) or embedding.shape[-1] < len(cast("list[Any]", tokens)):
        embeddings = "none" if embedding is None else f"of shape {embedding.shape}"
        raise ModelError(
            f"cannot use this GGUF file: token embeddings {embeddings}, and a vocabulary of "
            f"{len(cast('list[Any]', tokens)) if isinstance(tokens, list) else 'no'} tokens",
            where=str(path),
            hint=other,
        )
    for key in ("bos", "eos", "eot", "eom", "padding", "unknown"):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None and not (isinstance(value, int) and 0 <= value < len(cast("list[Any]", tokens))):
            raise ModelError(f"tokenizer.ggml.{key}_token_id is {value!r}, outside the vocabulary", where=str(path))


def _rope(path: Path, header: GgufHeader) -> dict[str, Any]:
    """The file's rotary embedding as transformers' `rope_parameters`; transformers' converter reads only the base."""
    metadata = header.metadata
    theta = float(metadata.get("llama.rope.freq_base", 10000.0))
    tensor = next((tensor for tensor in header.tensors if tensor.name == ROPE_DIVISORS), None)
    linear = metadata.get("llama.rope.scaling.type") == "linear"
    factor = metadata.get("llama.rope.scaling.factor")
    rule: dict[str, Any] | None = None
    if tensor is None and not linear:
        rule = {"rope_type": "default", "rope_theta": theta}
    elif tensor is None and isinstance(factor, float) and factor >= 1:
        rule = {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    elif tensor is not None and not linear and tensor.type == "F32":
        with open(path, "rb") as file:
            file.seek(tensor.offset)
            rule = llama3_parameters(np.frombuffer(file.read(tensor.size), "<f4"), theta)
    if rule is None:
        stored = f"rope scaling by a factor of {factor}" if tensor is None else f"{ROPE_DIVISORS} ({tensor.type})"
        raise ModelError(
            f"cannot use this GGUF file: it holds {stored}, and no rule of Llama 3.1 or linear scaling was proved to make it",
            where=str(path),
            hint="use the model's safetensors folder instead",
        )
    return rule


def _tokenizer(path: Path, metadata: dict[str, Any]) -> Any:
    """transformers' conversion of the tokenizer, corrected where it differs from the file."""
    converted: Any = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    tokens = cast("list[str]", metadata["tokenizer.ggml.tokens"])
    state = json.loads(converted.backend_tokenizer.to_str())
    # If the file lacks transformers' default unknown token, transformers adds it with an id beyond the embeddings: drop it.
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < len(tokens)]
    # transformers leaves user-defined tokens to the merges. They must be matched in text, without being special.
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    known = {token["id"] for token in state["added_tokens"]}
    types = enumerate(metadata.get("tokenizer.ggml.token_type", [])[: len(tokens)])
    own = [token for token, kind in types if kind == _USER_DEFINED and token not in known]
    state["added_tokens"] += [{"id": token, "content": tokens[token], **flags} for token in own]
    vocab: dict[str, int] = state["model"]["vocab"]
    # transformers writes the spaces of user-defined tokens differently, so the file's own texts replace its texts.
    kept = {text: token for text, token in vocab.items() if token not in own}
    state["model"]["vocab"] = kept | {tokens[token]: token for token in own}
    state["added_tokens"].sort(key=lambda token: token["id"])
    if state["model"].get("unk_token") not in tokens:
        state["model"]["unk_token"] = None
    split = metadata.get("tokenizer.ggml.pre")
    if metadata["tokenizer.ggml.model"] == "gpt2" and split in _LLAMA3_NAMES:
        state["model"]["ignore_merges"] = True  # a whole word that is a token becomes that token, without merging
    backend: Any = Tokenizer.from_str(json.dumps(state))
    if metadata["tokenizer.ggml.model"] == "llama":
        # SentencePiece puts a space before every text, even one that starts with spaces; transformers skips those.
        steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
        if metadata.get("tokenizer.ggml.add_space_prefix", True):
            steps.insert(0, normalizers.Prepend(_SPACE))
        backend.normalizer = normalizers.Sequence(steps)
        backend.pre_tokenizer = None
    elif split == "smollm":
        # Digits are split off one by one. Without this step, white space before a digit is split differently.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    named = {
        f"{name}_token": AddedToken(tokens[metadata[f"tokenizer.ggml.{key}_token_id"]], normalized=False, special=True)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    starts = metadata["tokenizer.ggml.model"] == "llama" or split in _LLAMA3_NAMES  # llama.cpp's default without a flag
    ends = [
        (str(named[f"{name}_token"].content), int(metadata[f"tokenizer.ggml.{name}_token_id"]))
        if f"{name}_token" in named and metadata.get(f"tokenizer.ggml.add_{name}_token", default)
        else None
        for name, default in (("bos", starts), ("eos", False))
    ]
    (first, last) = ([end[0]] if end else [] for end in ends)
    backend.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{token}:1" for token in first), "$B:1", *(f"{token}:1" for token in last)],
        special_tokens=[end for end in ends if end],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata.get("llama.context_length"),
        **named,
    )


def _verify(path: Path, folder: Path, header: GgufHeader) -> None:
    """Reads the folder back and compares it with the GGUF header. Raises ModelError if they differ."""
    config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    metadata = header.metadata
    written = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            written += len(weights.keys())
    pairs: list[tuple[str, Any, Any]] = [
        ("architecture", ["LlamaForCausalLM"], config.architectures),
        ("number of tensors", sum(tensor.name != ROPE_DIVISORS for tensor in header.tensors), written),
        ("number of tokens", len(metadata["tokenizer.ggml.tokens"]), len(tokenizer)),
    ]
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        pairs.append(
            (f"{name} id", metadata.get(f"tokenizer.ggml.{key}_token_id"), getattr(tokenizer, f"{name}_token_id"))
        )
    for what, stated, actual in pairs:
        if stated != actual:
            raise ModelError(f"the GGUF file states {what} {stated}, its conversion has {actual}", where=str(path))
