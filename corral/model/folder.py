"""What a folder of safetensors must be before it is loaded, and what identifies its content.

Reads the config and the headers of the weight files, never the weights, and runs nothing: pickle files and `auto_map` code
are refused by name. This module knows nothing about where a folder came from, nor how it is loaded.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

from corral.errors import ModelError
from corral.export_forms import OPENVINO_MODEL
from corral.storage import cached_file_hashes

ADAPTER_CONFIG = "adapter_config.json"
"""What makes a folder a PEFT adapter."""
MODEL_TYPES = frozenset({"llama"})
"""Families whose attention, packing and merging corral's tests cover. Others load in transformers, but unproven here."""

_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")
_IDENTITY = (
    "config.json",
    ADAPTER_CONFIG,
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "openvino_model.*",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
_ELEMENT_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
_LARGEST_HEADER = 100_000_000  # safetensors' own limit


def check_folder(folder: Path) -> None:
    """Makes sure that a folder can be loaded: reads the config and the headers of the weight files, no weights.

    Raises:
        ModelError: it says which file, what is wrong with it, and what to do.
    """
    if (folder / ADAPTER_CONFIG).is_file():  # transformers would load the adapter too, without a word
        raise ModelError(
            f"the folder holds an adapter ({ADAPTER_CONFIG}), not a model alone",
            where=str(folder),
            hint="name its base model, or merge the adapter into it first",
        )
    config = _read_json(folder / "config.json")
    for name, value in (
        ("config.json", config),
        ("tokenizer_config.json", _read_json(folder / "tokenizer_config.json", {})),
    ):
        if "auto_map" in value:
            raise ModelError(
                "the model brings its own Python code (auto_map), which corral does not run",
                where=str(folder / name),
                hint="use a model of the Llama family that transformers knows, without custom code",
            )
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ModelError(
            f"model_type is {kind!r}; corral loads models of the Llama family: {', '.join(sorted(MODEL_TYPES))}",
            where=str(folder / "config.json"),
            hint="choose a Llama-family model, such as asset:smollm2-135m-instruct",
        )
    if "quantization_config" in config:
        method = config["quantization_config"]
        name = cast("dict[str, Any]", method).get("quant_method") if isinstance(method, dict) else method
        raise ModelError(
            f"the weights are stored quantised ({name}); corral starts from full weights and quantises itself",
            where=str(folder / "config.json"),
            hint="use the repository or folder with the original weights",
        )
    for path in weight_files(folder):
        _check_safetensors(path)


def check_adapter(folder: Path) -> str:
    """Makes sure that a PEFT adapter can be loaded, as `check_folder` does of a model.

    Returns: the model it belongs to, as its config names it.

    Raises:
        ModelError: its config or its weights cannot be used, or it is no LoRA.
    """
    config = _read_json(folder / ADAPTER_CONFIG)
    where = str(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"the adapter's peft_type is {config.get('peft_type')!r}; corral loads LoRA adapters",
            where=where,
            hint="merge it with the program that made it, and name the merged model",
        )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            "the adapter does not say which model it belongs to (base_model_name_or_path)",
            where=where,
            hint="write the model's name or folder there",
        )
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise ModelError(
            "the adapter has no adapter_model.safetensors, and corral reads no other weights", where=str(folder)
        )
    _check_safetensors(weights)
    return base


def check_fit(adapter: Path, folder: Path) -> None:
    """Makes sure that a LoRA adapter's matrices are of the sizes of a model's weights.

    PEFT skips layers that are not there, and vLLM puts a small matrix into the corner of a large one, both without a word.

    Raises:
        ModelError: it names the layer.
    """
    weights = {name: shape for path in weight_files(folder) for name, shape in _shapes(path).items()}
    hint = "name the model that it was trained on as base_model_name_or_path in its adapter_config.json"
    for key, shape in _shapes(adapter / "adapter_model.safetensors").items():
        layer, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        weight = weights.get(f"{layer}.weight")
        if weight is None:
            raise ModelError(
                f"the adapter does not fit the model: {folder} has no layer {layer!r}", where=str(adapter), hint=hint
            )
        if (part == "A.weight" and shape[1] != weight[1]) or (part == "B.weight" and shape[0] != weight[0]):
            raise ModelError(
                f"the adapter does not fit the model: its {key} is {shape}, the model's weight {weight}",
                where=str(adapter),
                hint=hint,
            )


def _shapes(path: Path) -> dict[str, list[int]]:
    """Of the tensors in a file that `_check_safetensors` found whole."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def model_identity(folder: Path) -> str:
    """sha256 over the names and contents of a model's or an adapter's weights, config and tokenizer.

    Hashes of files are remembered by size and time of change, so that only the first call reads gigabytes.
    """
    files = sorted({path for pattern in _IDENTITY for path in folder.glob(pattern) if path.is_file()})
    hashes = cached_file_hashes(folder, files)
    text = "".join(f"{name} {digest}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def licence_texts(folder: Path) -> list[Path]:
    """The licence, notice and use-policy files at the top of a folder, in order of name."""
    return sorted({path for pattern in _LICENCES for path in folder.glob(pattern) if path.is_file()})


def _read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None and not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"there is no {path.name}",
            where=str(path.parent),
            hint="a model folder holds config.json, *.safetensors and tokenizer files",
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path.name} cannot be read: {error}", where=str(path), hint="fetch the model again"
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} holds no JSON object", where=str(path), hint="fetch the model again")
    return cast("dict[str, Any]", value)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order. Raises: ModelError: none, or one that the index names is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        names = set(cast("dict[str, str]", shards).values()) if isinstance(shards, dict) else set[str]()
        missing = sorted(name for name in names if Path(name).name != name or not (folder / name).is_file())
        if missing or not names:
            what = f"names {missing[0]!r}, which is not there" if missing else "names no weight files"
            raise ModelError(f"the index {what}", where=str(index), hint="fetch the model again: a part is missing")
        return [folder / name for name in sorted(names)]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if (folder / OPENVINO_MODEL).is_file():
        raise ModelError(
            "this is a model in OpenVINO's form, which only the openvino engine computes",
            where=str(folder),
            hint="leave out --engine, or name the model it was made from",
        )
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"the weights are pickle files ({', '.join(pickles[:3])}), which can run code; corral reads safetensors only",
            where=str(folder),
            hint="use a revision with safetensors, or convert it on a machine you can spare: load it with transformers "
            "and call save_pretrained",
        )
    raise ModelError(
        "there are no safetensors weights (model.safetensors, or an index and its parts)",
        where=str(folder),
        hint="use a model that publishes safetensors; of pickles only Meta's own checkpoints are read (consolidated.*.pth)",
    )


def _check_safetensors(path: Path) -> None:
    """Compares a weight file's header with its size: a file cut short is refused before it is mapped into memory."""
    size = path.stat().st_size
    again = "fetch or copy the file again; for an asset, `corral cache clear NAME` first"
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise ValueError(f"its header would be {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        end = 0
        spans: list[tuple[int, int]] = []
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                elements = 1
                for extent in entry["shape"]:
                    elements *= extent
                if last - first != elements * _ELEMENT_BYTES[entry["dtype"]]:
                    raise ValueError(f"tensor {name!r} has shape {entry['shape']} in {last - first} bytes")
                spans.append((first, last))
        for first, last in sorted(spans):
            if first != end:
                raise ValueError(f"its tensors leave a gap or overlap at byte {end}")
            end = last
        if 8 + length + end != size:
            raise ValueError(f"it has {size} bytes, its header says {8 + length + end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"the weight file is cut short or damaged: {error}", where=str(path), hint=again) from error
