"""A model's folder of safetensors: what it must hold to be loaded, and the hash that identifies its content.

Reads configs and the headers of weight files, never the weights. Pickle files and `auto_map` code are refused and never run.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, cast

from corral.errors import ModelError
from corral.export_forms import OPENVINO_MODEL
from corral.storage import cached_file_hashes

ADAPTER_CONFIG = "adapter_config.json"
"""The file that makes a folder a PEFT adapter."""
MODEL_TYPES = frozenset({"llama"})
"""Families whose attention, packing and merging corral's tests cover. transformers loads others, untested here."""

ROPE_TYPES = frozenset({"default", "linear", "dynamic", "yarn", "longrope", "llama3"})
"""Rotary embeddings that transformers 4 and 5 compute for a Llama."""

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


def check_folder(folder: Path) -> None:
    """Check that a folder can be loaded, from its configs and the headers of its weight files.

    Raises:
        ModelError: which file is wrong, what is wrong with it, and what to do.
    """
    if (folder / ADAPTER_CONFIG).is_file():  # transformers would load the adapter as well, without a message
        raise ModelError(
            f"the folder holds an adapter ({ADAPTER_CONFIG}), not a model alone",
            where=str(folder),
            hint="name its base model, or merge the adapter into it first",
        )
    config_path = folder / "config.json"
    config = read_json(config_path)
    tokenizer_path = folder / "tokenizer_config.json"
    tokenizer_config = read_json(tokenizer_path) if tokenizer_path.is_file() else {}
    for path, value in ((config_path, config), (tokenizer_path, tokenizer_config)):
        if "auto_map" in value:
            raise ModelError(
                "the model brings its own Python code (auto_map), which corral does not run",
                where=str(path),
                hint="use a model of the Llama family that transformers knows, without custom code",
            )
    if config.get("model_type") not in MODEL_TYPES:
        raise ModelError(
            f"model_type is {config.get('model_type')!r}; corral loads models of the Llama family: "
            f"{', '.join(sorted(MODEL_TYPES))}",
            where=str(config_path),
            hint="choose a Llama-family model, such as asset:smollm2-135m-instruct",
        )
    if (method := config.get("quantization_config")) is not None:
        name = cast("dict[str, Any]", method).get("quant_method") if isinstance(method, dict) else method
        raise ModelError(
            f"the weights are stored quantised ({name}); corral starts from full weights and quantises itself",
            where=str(config_path),
            hint="use the repository or folder with the original weights",
        )
    _check_rope(config, config_path)
    _check_one_set_of_weights(folder)


def _check_rope(config: dict[str, Any], path: Path) -> None:
    """Raises ModelError if programs would compute different rotary embeddings from a config, or none at all."""

    def refuse(reason: str) -> ModelError:
        hint = "compare config.json with the one that the model was published with"
        return ModelError(reason, where=str(path), hint=hint)

    # Each setting may stand in several places, and programs differ in which of them they read.
    names = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    stated: dict[str, Any] = {name: config[name] for name in names if config.get(name) is not None}
    for key in ("rope_parameters", "rope_scaling"):
        rope: Any = {} if config.get(key) is None else config[key]
        if not isinstance(rope, dict):
            raise refuse(f"{key} is {rope!r}, where an object is expected")
        settings = cast("dict[str, Any]", rope)
        named = [(("rope_type" if name == "type" else name), value) for name, value in settings.items()]
        for name, value in named:
            if value is None and name != "rope_type":  # as if it were not there
                continue
            if stated.setdefault(name, value) != value:
                raise refuse(f"config.json states {name} twice, as {stated[name]!r} and as {value!r}")
        kind = dict(named).get("rope_type")
        if kind is None and settings.keys() - {"rope_theta", "partial_rotary_factor"}:
            raise refuse(f"{key} names no rope_type: {json.dumps(settings)}")
        if kind is not None and kind not in sorted(ROPE_TYPES):  # not in the set: a list has no hash
            raise refuse(f"the rope_type is {kind!r}; known are {', '.join(sorted(ROPE_TYPES))}")
    # transformers 5 reads one of the two objects, and what it lacks from the top.
    read: Any = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = read.get("rope_theta", config.get("rope_theta", 1e4))
    if not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise refuse(f"rope_theta is {theta!r}, where a positive number is expected")
    if stated.get("partial_rotary_factor") not in (None, 1):
        raise refuse(f"partial_rotary_factor is {stated['partial_rotary_factor']!r}; a Llama rotates whole heads")


def _check_one_set_of_weights(folder: Path) -> None:
    """Raises ModelError if a tensor of the model is in two files: programs differ in which of them they read."""
    weights = weight_files(folder)
    file_of: dict[str, Path] = {}
    for path in [*weights, *sorted(set(folder.glob("*.safetensors")) - set(weights))]:
        for name in tensor_shapes(path):
            if (other := file_of.setdefault(name, path)) != path:
                raise ModelError(
                    f"the weight {name} is in {other.name} and in {path.name}, and programs differ in which they read",
                    where=str(folder),
                    hint="keep the files of one model here: model.safetensors, or its parts and model.safetensors.index.json",
                )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a model's JSON file. Raises: ModelError."""
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
        shards = read_json(index).get("weight_map")
        names = set(cast("dict[str, str]", shards).values()) if isinstance(shards, dict) else set[str]()
        missing = sorted(name for name in names if Path(name).name != name or not (folder / name).is_file())
        if missing or not names:
            what = f"names {missing[0]!r}, which is not there" if missing else "names no weight files"
            hint = "fetch the model again: a part is missing"
            if (folder / "model.safetensors").is_file():
                hint = "if model.safetensors is the whole model, delete the index; otherwise fetch the model again"
            raise ModelError(f"the index {what}", where=str(index), hint=hint)
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


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a safetensors file, from its header.

    Raises:
        ModelError: the file is cut short, or its header does not fit it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"the weight file is cut short or damaged: {error}",
            where=str(path),
            hint="fetch or copy the file again; for an asset, `corral cache clear NAME` first",
        ) from error


def model_identity(folder: Path) -> str:
    """sha256 over the names and contents of a model's or an adapter's weights, config and tokenizer.

    Hashes of files are cached by size and modification time, so only the first call reads gigabytes.
    """
    files = sorted({path for pattern in _IDENTITY for path in folder.glob(pattern) if path.is_file()})
    hashes = cached_file_hashes(folder, files)
    text = "".join(f"{name} {digest}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def licence_texts(folder: Path) -> list[Path]:
    """The licence, notice and use-policy files at the top of a folder, in order of name."""
    return sorted({path for pattern in _LICENCES for path in folder.glob(pattern) if path.is_file()})
