"""Converts Meta's original checkpoints (`params.json`, `consolidated.*.pth`, `tokenizer.model`) to a Hugging Face folder.

Supported are Llama 2, 3, 3.1, 3.2 (text) and 3.3, including checkpoints split into several files for model parallelism. The
files are pickles. torch's restricted reader maps them into memory and runs no code from them. At most one gigabyte (or one
tensor) is assembled and written at a time. Weights keep their stored type.

`params.json` does not contain two values, which the user of transformers' own converter must supply. Here they are derived:

- Context length: 4,096 for Llama 2, 16,384 for Llama 2 with a raised rotary base (Code Llama), 8,192 for Llama 3, and
  131,072 with scaled rotary frequencies.
- Factor of the rotary scaling: 32 if the output layer is tied to the embedding (only the small Llama 3.2 models are), else
  8. A `rope_scaling_factor` or `rope_high_freq_factor` in `params.json` takes precedence.

No chat template is written; the recipe names one (`llama-2`, `llama-3`, `llama-3.1`). Stop ids are those of Meta's code.

Not supported, and rejected: Llama 4, mixtures of experts, image models, quantised checkpoints, and checkpoints with more
parts than key-value heads. Llama 1 is not supported either, but is not detected: its files look like Llama 2's.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from corral.errors import ModelError
from corral.model.config import state_for_transformers_4
from corral.model.folder import licence_texts
from corral.model.meta_params import AGAIN, OTHER, MetaParams, read_params
from corral.model.meta_tokenizer import MetaTokenizer, read_tokenizer
from corral.storage import write_json
from corral.template.tokenizer_files import save_tokenizer

if TYPE_CHECKING:
    import torch

CONVERSION_VERSION = 2
"""Increase it when `convert` would write other bytes for the same files: cached conversions are then redone."""

_PART = re.compile(r"consolidated\.(\d+)\.pth")
_FILE_BYTES = 2**30
_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"
_IGNORED = "rope.freqs"  # a buffer that transformers computes


@dataclass(frozen=True, slots=True)
class _Weight:
    """One tensor of the model.

    Args:
        target: name in the Hugging Face folder.
        source: name in Meta's checkpoint.
        shape: shape of the whole tensor.
        split: dimension along which the tensor is split over the parts; None if every part holds all of it.
        heads: number of heads, for query and key projections only.
    """

    target: str
    source: str
    shape: tuple[int, ...]
    split: int | None = None
    heads: int | None = None


_Part: TypeAlias = "dict[str, torch.Tensor]"


def is_meta_checkpoint(folder: Path) -> bool:
    """Whether a folder has a file of Meta's layout and no `config.json` of Hugging Face's. It may be incomplete."""
    if (folder / "config.json").exists():
        return False
    return (folder / "params.json").exists() or any(_PART.fullmatch(path.name) for path in folder.glob("*.pth"))


def checkpoint_files(source: Path) -> list[Path]:
    """The input files of the conversion: `params.json`, the tokenizer, and the parts in order.

    The tokenizer may be in the parent folder, where the download of Llama 2 puts one for all sizes.

    Raises:
        ModelError: if one of the files is missing.
    """
    params = source / "params.json"
    if not params.is_file():
        raise ModelError("the checkpoint has no params.json", where=str(source), hint=AGAIN)
    numbered = {int(match[1]): path for path in source.glob("*.pth") if (match := _PART.fullmatch(path.name))}
    gap = next((number for number in range(len(numbered) or 1) if number not in numbered), None)
    if gap is not None:
        raise ModelError(f"the checkpoint's part consolidated.{gap:02d}.pth is missing", where=str(source), hint=AGAIN)
    tokenizers = [source / "tokenizer.model", source.absolute().parent / "tokenizer.model"]
    tokenizer = next((path for path in tokenizers if path.is_file()), None)
    if tokenizer is None:
        raise ModelError(
            "the checkpoint has no tokenizer.model",
            where=str(source),
            hint="copy the tokenizer.model that Meta publishes with the model into the folder",
        )
    return [params, tokenizer, *(numbered[number] for number in sorted(numbered))]


def convert(source: Path, folder: Path, progress: Callable[[str], None]) -> None:
    """Writes the model as a Hugging Face folder: safetensors, config, tokenizer, stop ids, licence texts.

    Args:
        source: Meta's folder.
        folder: an existing, empty directory. `storage.new_directory` makes the conversion atomic.
        progress: called with a message if the rotary scaling factor had to be derived.

    Raises:
        ModelError: if a file is missing, damaged or contains code; if the parameters are invalid or of another
            architecture; or if the weights or the tokenizer do not match them.
    """
    params_path, tokenizer_path, *paths = checkpoint_files(source)
    params = read_params(params_path)
    tokenizer = read_tokenizer(tokenizer_path, scaled_rope=params.use_scaled_rope)
    parts = [_open_part(path) for path in paths]
    rows = params.vocab_size or tokenizer.size
    if rows != tokenizer.size:
        raise ModelError(
            f"vocab_size is {rows} in params.json, and the tokenizer has {tokenizer.size} tokens",
            where=str(tokenizer_path),
            hint="use the tokenizer.model that Meta publishes with this very model",
        )
    tied = _is_tied(parts, params)
    weights = list(_layout(params, rows, parts, tied=tied))
    _check_weights(weights, parts, paths)
    config = _config(params, tokenizer, tied=tied, say=progress)
    config["dtype"] = str(parts[0][_EMBEDDING].dtype).removeprefix("torch.")
    sizes = [math.prod(weight.shape) * parts[0][weight.source].element_size() for weight in weights]
    del parts  # pages read from a mapped file stay in memory until it is closed
    _write_weights(weights, sizes, paths, folder)
    _write_texts(config, tokenizer, folder)
    for licence in licence_texts(source) or licence_texts(tokenizer_path.parent):
        shutil.copyfile(licence, folder / licence.name)


# ---- config and tokenizer


def _config(params: MetaParams, tokenizer: MetaTokenizer, *, tied: bool, say: Callable[[str], None]) -> dict[str, Any]:
    from corral.model.rope import llama3_rule

    # The defaults of Meta's code for values that the file lacks.
    theta = params.rope_theta or (500000.0 if tokenizer.tiktoken else 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    context = 8192 if tokenizer.tiktoken else (16384 if theta > 10000 else 4096)
    if params.use_scaled_rope:
        factor = params.rope_scaling_factor or (32.0 if tied else 8.0)
        if params.rope_scaling_factor is None:
            say(
                f"rotary frequencies are scaled by {factor:g}, as in Llama {'3.2 1B and 3B' if tied else '3.1'}: "
                f"params.json does not say by what, and the output layer is {'' if tied else 'not '}tied to the embedding"
            )
        rope = llama3_rule(theta, factor, params.rope_high_freq_factor)
        context = 131072
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": tokenizer.size,
        "hidden_size": params.dim,
        "intermediate_size": params.hidden,
        "num_hidden_layers": params.n_layers,
        "num_attention_heads": params.n_heads,
        "num_key_value_heads": params.n_kv_heads,
        "rms_norm_eps": params.norm_eps,
        "max_position_embeddings": context,
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.stops if len(tokenizer.stops) > 1 else tokenizer.stops[0],
    }


def _write_texts(config: dict[str, Any], tokenizer: MetaTokenizer, folder: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    model_config = LlamaConfig(**config)
    model_config.save_pretrained(folder)
    state_for_transformers_4(folder, model_config)
    GenerationConfig.from_model_config(model_config).save_pretrained(folder)
    tokenizer.fast.model_max_length = config["max_position_embeddings"]
    save_tokenizer(tokenizer.fast, folder)


# ---- weights


def _open_part(path: Path) -> _Part:
    """Maps the tensors of one file into memory. Raises ModelError if it is damaged, or holds code or quantised weights."""
    import pickle

    import torch

    try:
        value: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            "the checkpoint holds code or objects besides tensors, which corral does not run",
            where=str(path),
            hint=f"do not load it with anything else before you know where it comes from; {AGAIN}",
        ) from error
    except Exception as error:  # torch has no error class for damaged files
        raise ModelError(
            f"the checkpoint's part is cut short or damaged: {_first_line(error)}", where=str(path), hint=AGAIN
        ) from error
    tensors = {name: tensor for name, tensor in value.items() if name != _IGNORED} if isinstance(value, dict) else {}
    odd = [str(name) for name, tensor in tensors.items() if not (isinstance(name, str) and torch.is_tensor(tensor))]
    if odd or not tensors:
        detail = f"{odd[0]!r} is none" if odd else "there are none"
        raise ModelError(f"the checkpoint's part is no table of tensors: {detail}", where=str(path), hint=AGAIN)
    floats = (torch.float32, torch.bfloat16, torch.float16)
    quantised = [name for name, tensor in tensors.items() if tensor.dtype not in floats]
    if quantised:
        kind = str(tensors[quantised[0]].dtype).removeprefix("torch.")
        raise ModelError(
            f"the weights are stored quantised ({quantised[0]} as {kind}); corral starts from full weights",
            where=str(path),
            hint="use the bfloat16 checkpoint of the model",
        )
    return cast("_Part", tensors)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _is_tied(parts: list[_Part], params: MetaParams) -> bool:
    """Whether the output layer is tied to the embedding: bit-identical to it, or absent (allowed for Llama 3.2 only)."""
    import torch

    if not any(_OUTPUT in part for part in parts):
        return params.use_scaled_rope
    return all(
        _OUTPUT in part and _EMBEDDING in part and torch.equal(part[_OUTPUT], part[_EMBEDDING]) for part in parts
    )


def _layout(params: MetaParams, rows: int, parts: list[_Part], *, tied: bool) -> Iterator[_Weight]:
    """Yields the model's tensors in order, with Meta's names. It stops early if a whole layer is missing."""
    dim, hidden = params.dim, params.hidden
    kv = dim // params.n_heads * params.n_kv_heads
    embedding = parts[0].get(_EMBEDDING)
    by_rows = embedding is None or embedding.ndim != 2 or embedding.shape[1] == dim  # Llama 2 splits the columns
    yield _Weight("model.embed_tokens.weight", _EMBEDDING, (rows, dim), 0 if by_rows else 1)
    for layer in range(params.n_layers):
        theirs, ours = f"layers.{layer}", f"model.layers.{layer}"
        yield _Weight(f"{ours}.input_layernorm.weight", f"{theirs}.attention_norm.weight", (dim,))
        if f"{theirs}.attention_norm.weight" not in parts[0]:
            return
        attention = f"{ours}.self_attn"
        yield _Weight(
            f"{attention}.q_proj.weight", f"{theirs}.attention.wq.weight", (dim, dim), 0, heads=params.n_heads
        )
        yield _Weight(
            f"{attention}.k_proj.weight", f"{theirs}.attention.wk.weight", (kv, dim), 0, heads=params.n_kv_heads
        )
        yield _Weight(f"{attention}.v_proj.weight", f"{theirs}.attention.wv.weight", (kv, dim), 0)
        yield _Weight(f"{attention}.o_proj.weight", f"{theirs}.attention.wo.weight", (dim, dim), 1)
        yield _Weight(f"{ours}.post_attention_layernorm.weight", f"{theirs}.ffn_norm.weight", (dim,))
        yield _Weight(f"{ours}.mlp.gate_proj.weight", f"{theirs}.feed_forward.w1.weight", (hidden, dim), 0)
        yield _Weight(f"{ours}.mlp.up_proj.weight", f"{theirs}.feed_forward.w3.weight", (hidden, dim), 0)
        yield _Weight(f"{ours}.mlp.down_proj.weight", f"{theirs}.feed_forward.w2.weight", (dim, hidden), 1)
    yield _Weight("model.norm.weight", "norm.weight", (dim,))
    if not tied:
        yield _Weight("lm_head.weight", _OUTPUT, (rows, dim), 0)


def _check_weights(weights: list[_Weight], parts: list[_Part], paths: list[Path]) -> None:
    """Raises ModelError unless every part holds its share of every tensor, and no other tensor."""
    known = {weight.source for weight in weights} | {_OUTPUT}
    for part, path in zip(parts, paths, strict=True):
        for weight in weights:
            tensor = part.get(weight.source)
            if tensor is None:
                raise ModelError(f"the checkpoint lacks {weight.source}", where=str(path), hint=AGAIN)
            shape = tuple(tensor.shape)
            if not _fits(weight, shape, len(parts)):
                raise _wrong_shape(weight, shape, paths, path, _parts_of(weights, part, len(paths)))
        others = sorted(set(part) - known)
        if others:
            raise ModelError(
                f"the checkpoint holds {len(others)} tensors that params.json does not ask for ({', '.join(others[:3])})",
                where=str(path),
                hint=OTHER,
            )


def _fits(weight: _Weight, shape: tuple[int, ...], parts: int) -> bool:
    whole = tuple(size * parts if axis == weight.split else size for axis, size in enumerate(shape))
    in_heads = weight.heads is None or weight.heads % parts == 0
    return whole == weight.shape and in_heads


def _parts_of(weights: list[_Weight], part: _Part, there: int) -> int | None:
    """The number of parts for which all tensors of `part` have the right shape, if above `there`; None if there is none."""
    shapes = [(weight, tuple(part[weight.source].shape)) for weight in weights if weight.source in part]
    counts = range(there + 1, 129)
    return next((count for count in counts if all(_fits(weight, shape, count) for weight, shape in shapes)), None)


def _wrong_shape(weight: _Weight, shape: tuple[int, ...], paths: list[Path], path: Path, of: int | None) -> ModelError:
    if of is not None:
        what = f"the checkpoint's part consolidated.{len(paths):02d}.pth is missing: {path.name} is one of {of} parts"
        return ModelError(what, where=str(path.parent), hint=AGAIN)
    shared = f" in {len(paths)} parts" if len(paths) > 1 else ""
    return ModelError(
        f"{weight.source} has shape {list(shape)}, and params.json asks for {list(weight.shape)}{shared}",
        where=str(path),
        hint="params.json and the consolidated files must be of the same model: fetch the folder again",
    )


def _write_weights(weights: list[_Weight], sizes: list[int], paths: list[Path], folder: Path) -> None:
    """Writes safetensors files of at most `_FILE_BYTES` (or one tensor), and an index if there are several.

    Args:
        weights: the tensors to write, in order.
        sizes: bytes of each tensor.
        paths: the parts. They are reopened for each output file, which frees the memory of the previous one.
        folder: the directory to write into.
    """
    from safetensors.torch import save_file

    groups: list[list[_Weight]] = [[]]
    filled = 0
    for weight, size in zip(weights, sizes, strict=True):
        if groups[-1] and filled + size > _FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(weight)
        filled += size
    several = len(groups) > 1
    file_of: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if several else "model.safetensors"
        parts = [_open_part(path) for path in paths]
        # transformers requires the "format" entry: it names the library of the tensors.
        save_file({w.target: _whole(w, parts) for w in group}, folder / name, metadata={"format": "pt"})
        file_of |= {weight.target: name for weight in group}
    if several:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": file_of}
        write_json(folder / "model.safetensors.index.json", index)


def _whole(weight: _Weight, parts: list[_Part]) -> torch.Tensor:
    """Assembles one tensor from its parts, in newly allocated memory. Query and key rows get transformers' rotary order.

    Meta rotates neighbouring rows, (0, 1), (2, 3) …, as in Su et al. 2021 (arXiv 2104.09864). transformers rotates each row
    of a head's first half together with the corresponding row of the second half.
    """
    import torch

    if weight.split is None:
        return parts[0][weight.source].clone()
    whole = torch.cat([part[weight.source] for part in parts], weight.split)
    if weight.heads is not None:
        rows, columns = weight.shape
        pairs = whole.reshape(weight.heads, rows // weight.heads // 2, 2, columns)
        whole = pairs.transpose(1, 2).reshape(rows, columns)
    return whole
