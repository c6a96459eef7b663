"""Converts a Llama folder to an OpenVINO model in f32, f16, int8 or int4.

This module builds the graph node by node from the config and the safetensors weights. OpenVINO's own GGUF reader is not
used: it computes the rotary frequencies from their base alone, and so silently gets every Llama 3.1 and 3.2 model wrong. Here
transformers computes the frequencies from the config (Llama-3 scaling, linear, YaRN, …). The graph keeps keys and values as
state, in the pattern that OpenVINO GenAI turns into paged attention.

Importing this module needs the extra `openvino`. `engines.openvino` runs the model; `export.contract` checks its results.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from corral.errors import ModelError, require
from corral.export_forms import OPENVINO_MODEL, OpenVinoType
from corral.model import weight_rounding
from corral.model.config import read_config
from corral.model.folder import check_folder, model_identity, weight_files
from corral.storage import cache_root, file_lock, new_directory, remove_tree

if TYPE_CHECKING:
    from collections.abc import Generator

    from corral.template import Template

ov = require("openvino", "openvino")
op = require("openvino.opset15", "openvino")
variables = require("openvino.op.util", "openvino")

Precision: TypeAlias = OpenVinoType
MODEL_FILE = OPENVINO_MODEL

BYTES_PER_WEIGHT = {"f32": 4.0, "f16": 2.0, "int8": 1.01, "int4": 0.6}
"""Approximate bytes per weight on disk. int4 keeps the embeddings and the output head in int8: they lose the most."""

_CONVERSION = 2  # increase it when other bytes would be written for the same folder
_KEPT = 4
_TEXTS = (
    "The year 1984, 3.14159 and 1,000,000.",
    "Grüße, 東京! Ça va? 🙂",
    "def f(x):\n    return x  # two  spaces\n\n\ttab",
    " leading space, and trailing ",
)
_STATIC_ROPE = frozenset({"default", "llama3", "linear", "yarn"})
_NEVER = 2**63 - 1


def write_model(
    folder: Path, out: Path, precision: Precision, *, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write `openvino_model.xml` and `.bin` into an existing directory.

    Args:
        folder: the Hugging Face folder of a Llama model.
        out: the directory to write into.
        precision: type of the weights: `f32`, `f16`, `int8` (one scale per row) or `int4` (one scale per 32 weights; int8
            for embeddings, head, and rows whose length is not a multiple of 32). Norms stay f32.
        progress: called with (layers done, layers in total).

    Raises:
        ModelError: if a weight is missing, has the wrong shape, or has a value that is not finite or that `precision` cannot
            hold; if the rotary embedding changes with the length of the text; or if the activation is not SiLU.
    """
    check_folder(folder)
    with _weights(folder) as read:
        model = _Graph(folder, precision, read, progress or (lambda done, total: None)).model()
        ov.save_model(model, out / MODEL_FILE, compress_to_fp16=False)


def write_tokenizer(template: Template, out: Path) -> str | None:
    """Write `openvino_tokenizer.xml` and `openvino_detokenizer.xml` for OpenVINO's own programs.

    Both are compared with the template's tokenizer on sample texts. If the ids of a text differ, the files are deleted and
    that text is returned; otherwise None is returned.
    """
    tokenizers = require("openvino_tokenizers", "openvino")
    genai = require("openvino_genai", "openvino")
    encode, decode = tokenizers.convert_tokenizer(template.tokenizer, with_detokenizer=True)
    names = ("openvino_tokenizer", "openvino_detokenizer")
    for name, model in zip(names, (encode, decode), strict=True):
        ov.save_model(model, out / f"{name}.xml", compress_to_fp16=False)
    theirs = genai.Tokenizer(str(out))
    for text in _TEXTS:
        ids = theirs.encode(text, add_special_tokens=False).input_ids.data[0].tolist()
        if ids != template.tokenizer.encode(text, add_special_tokens=False):
            for name in names:
                for suffix in (".xml", ".bin"):
                    (out / f"{name}{suffix}").unlink(missing_ok=True)
            return text
    return None


def cached_form(folder: Path, precision: Precision) -> Path:
    """The OpenVINO form of a model folder, converted on first use. The cache keeps the four forms used last.

    Raises:
        ModelError: as for `write_model`.
        StorageError: if the cache cannot be written.
    """
    check_folder(folder)
    cache = cache_root() / "openvino"
    form = cache / f"{model_identity(folder)[:16]}-{precision}-{_CONVERSION}"
    with file_lock(cache / "lock"):
        if not (form / MODEL_FILE).is_file():
            size = sum(path.stat().st_size for path in weight_files(folder))
            with new_directory(form, needed=int(size * BYTES_PER_WEIGHT[precision] / 2)) as temporary:
                write_model(folder, temporary, precision)
                for name in ("config.json", "generation_config.json"):
                    if (folder / name).is_file():
                        shutil.copyfile(folder / name, temporary / name)
        os.utime(form)
        forms = [path for path in cache.iterdir() if path.is_dir()]
        abandoned = [path for path in forms if path.name.startswith(".")]  # by killed writers: we hold the lock
        kept = sorted(set(forms).difference(abandoned), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in (*abandoned, *kept[_KEPT:]):
            remove_tree(old)
    return form


def stored_weight(name: str, weight: Any, precision: Precision) -> Any:
    """Rounds a weight as `write_model` stores it, and converts it back to float32.

    Args:
        name: the weight's name in safetensors.
        weight: float32 array.
        precision: type of the model's weights, as for `write_model`.

    Returns: float32 array of the same shape.
    """
    kind = _kind(name, weight, precision)
    if kind == "int8":
        return weight_rounding.to_int8(weight).dequantise()
    if kind == "int4":
        return weight_rounding.to_int4(weight).dequantise()
    return weight.astype(np.float16).astype(np.float32) if kind == "f16" else weight


def _kind(name: str, weight: Any, precision: Precision) -> Precision:
    if weight.ndim < 2:  # norms
        return "f32"
    if precision == "int4" and (".layers." not in name or weight.shape[1] % weight_rounding.GROUP):
        return "int8"
    return precision


@contextmanager
def _weights(folder: Path) -> Generator[Callable[[str], Any]]:
    """Yields a function that reads one weight by name, as a float32 array."""
    files = [safe_open(path, "pt") for path in weight_files(folder)]
    file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118 (not a mapping)

    def read(name: str) -> Any:
        try:
            array = file_of[name].get_tensor(name).float().numpy()
        except (KeyError, SafetensorError) as error:
            raise ModelError(
                f"the weights lack {name!r}", where=str(folder), hint="fetch or merge the model again"
            ) from error
        if not np.isfinite(array).all():
            raise ModelError(f"weight {name!r} holds values that are not finite", where=str(folder))
        return array

    yield read


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each weight by name, computed by transformers from the config. OpenVINO accepts many wrong shapes."""
    with torch.device("meta"):
        return {name: tuple(weight.shape) for name, weight in LlamaForCausalLM(config).state_dict().items()}


class _Graph:
    """Builds one model. Weights have the names of transformers' Llama."""

    def __init__(
        self, folder: Path, precision: Precision, read: Callable[[str], Any], progress: Callable[[int, int], None]
    ) -> None:
        self.config = check_config(folder)
        self.folder = folder
        self.precision: Precision = precision
        self._read = read
        self._shapes = _shapes(self.config)
        self.progress = progress
        self.head_size: int = getattr(self.config, "head_dim", None) or (
            self.config.hidden_size // self.config.num_attention_heads
        )
        self.frequencies, self.amplitude = _rope(self.config)
        self.sinks: list[Any] = []

    def model(self) -> Any:
        """The whole model: ids, mask and positions → logits. Keys and values are state."""
        config = self.config
        inputs = {name: _parameter(name, [-1, -1], "i64") for name in ("input_ids", "attention_mask", "position_ids")}
        inputs["beam_idx"] = _parameter("beam_idx", [-1], "i32")
        ids = inputs["input_ids"]
        self.beam = inputs["beam_idx"]
        self.batch = op.gather(op.shape_of(ids), _const([0]), _const(0))
        embeddings = self.weight("model.embed_tokens.weight")
        x = op.gather(embeddings, ids, _const(0))
        cos, sin = self.rotation(inputs["position_ids"])
        mask = _causal_mask(ids, inputs["attention_mask"])
        for layer in range(config.num_hidden_layers):
            x = self.layer(layer, x, cos, sin, mask)
            self.progress(layer + 1, config.num_hidden_layers)
        x = self.norm(x, "model.norm.weight")
        head = embeddings if config.tie_word_embeddings else self.weight("lm_head.weight")
        logits = op.matmul(x, head, False, True)
        logits.output(0).set_names({"logits"})
        return ov.Model([op.result(logits, name="logits")], self.sinks, list(inputs.values()), "llama")

    def layer(self, layer: int, x: Any, cos: Any, sin: Any, mask: Any) -> Any:
        """One decoder layer: x [batch, length, hidden] → the same shape."""
        config, at = self.config, f"model.layers.{layer}."
        h = self.norm(x, f"{at}input_layernorm.weight")
        q, k, v = (self.linear(h, f"{at}self_attn.{name}_proj") for name in "qkv")
        q = self.rotated(self.heads(q, config.num_attention_heads), cos, sin)
        k = self.rotated(self.heads(k, config.num_key_value_heads), cos, sin)
        v = self.heads(v, config.num_key_value_heads)
        k, v = self.kept(k, layer, "key"), self.kept(v, layer, "value")
        a = op.scaled_dot_product_attention(q, self.repeated(k), self.repeated(v), mask, None, False)
        a = op.transpose(a, _const([0, 2, 1, 3], "i32"))
        a = op.reshape(a, _const([0, 0, config.num_attention_heads * self.head_size]), True)
        x = op.add(x, self.linear(a, f"{at}self_attn.o_proj"))
        h = self.norm(x, f"{at}post_attention_layernorm.weight")
        gate = op.swish(self.linear(h, f"{at}mlp.gate_proj"))
        return op.add(x, self.linear(op.multiply(gate, self.linear(h, f"{at}mlp.up_proj")), f"{at}mlp.down_proj"))

    def read(self, name: str) -> Any:
        """Reads a weight as a float32 array. Raises ModelError if its shape differs from the config's."""
        array = self._read(name)
        if array.shape != self._shapes[name]:
            raise ModelError(
                f"weight {name!r} has shape {list(array.shape)}, by the config it must be {list(self._shapes[name])}",
                where=str(self.folder),
                hint="fetch or merge the model again",
            )
        return array

    def linear(self, x: Any, name: str) -> Any:
        """x [..., in] → [..., out], with the bias if the config has one."""
        y = op.matmul(x, self.weight(f"{name}.weight"), False, True)
        biased = self.config.mlp_bias if ".mlp." in name else self.config.attention_bias
        return op.add(y, _const(self.read(f"{name}.bias").reshape(1, 1, -1), "f32")) if biased else y

    def norm(self, x: Any, name: str) -> Any:
        """RMSNorm, as a sequence of operations that OpenVINO fuses."""
        mean = op.reduce_mean(op.power(x, _const(2.0, "f32")), _const([-1], "i32"), keep_dims=True)
        root = op.sqrt(op.add(mean, _const(self.config.rms_norm_eps, "f32")))
        scaled = op.multiply(x, op.divide(_const(1.0, "f32"), root))
        return op.multiply(_const(self.read(name).reshape(1, 1, -1), "f32"), scaled)

    def rotation(self, positions: Any) -> tuple[Any, Any]:
        """Positions [batch, length] → cosines and sines [batch, 1, length, head size]."""
        at = op.convert(op.unsqueeze(positions, _const(1)), "f32")
        angles = op.matmul(_const(self.frequencies.reshape(1, -1, 1), "f32"), at, False, False)
        angles = op.transpose(angles, _const([0, 2, 1], "i32"))
        angles = op.concat([angles, angles], -1)

        def scaled(x: Any) -> Any:
            return x if self.amplitude == 1 else op.multiply(x, _const(self.amplitude, "f32"))

        return tuple(op.unsqueeze(scaled(f(angles)), _const(1)) for f in (op.cos, op.sin))  # pyright: ignore[reportReturnType]

    def rotated(self, x: Any, cos: Any, sin: Any) -> Any:
        """Rotary embedding of [batch, heads, length, head size]. As in transformers, the two halves of a head are paired."""
        half = self.head_size // 2
        second = op.slice(x, _const([half]), _const([_NEVER]), _const([1]), _const([3]))
        first = op.slice(x, _const([0]), _const([half]), _const([1]), _const([3]))
        turned = op.concat([op.multiply(second, _const(-1.0, "f32")), first], -1)
        return op.add(op.multiply(x, cos), op.multiply(turned, sin))

    def heads(self, x: Any, count: int) -> Any:
        """[batch, length, heads × size] → [batch, heads, length, size]."""
        return op.transpose(op.reshape(x, _const([0, 0, count, self.head_size]), True), _const([0, 2, 1, 3], "i32"))

    def kept(self, x: Any, layer: int, kind: str) -> Any:
        """Appends keys or values to the past ones, and stores the result as the model's state."""
        count = self.config.num_key_value_heads
        info = variables.VariableInfo()
        info.data_shape = ov.PartialShape([-1, count, -1, self.head_size])
        info.data_type = ov.Type.f32
        info.variable_id = f"past_key_values.{layer}.{kind}present.{layer}.{kind}"
        variable = variables.Variable(info)
        empty = op.concat([self.batch, _const([count, 0, self.head_size])], 0)
        past = op.gather(op.read_value(op.broadcast(_const(0.0, "f32"), empty), variable), self.beam, _const(0))
        whole = op.concat([past, x], -2)
        self.sinks.append(op.assign(whole, variable))
        return whole

    def repeated(self, x: Any) -> Any:
        """Repeats each key-value head once per query head that shares it."""
        queries, kept = self.config.num_attention_heads, self.config.num_key_value_heads
        if queries == kept:
            return x
        times = _const([1, 1, queries // kept, 1, 1])
        wide = op.broadcast(op.unsqueeze(x, _const(2)), times, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(wide, _const([0, queries, -1, self.head_size]), True)

    def weight(self, name: str) -> Any:
        """A matrix [out, in] in its stored type, followed by the operations that convert it to float32."""
        array = self.read(name)
        kind = _kind(name, array, self.precision)
        if kind == "f32":
            return _const(array, "f32")
        if np.abs(array).max() > np.finfo(np.float16).max:
            raise ModelError(f"weight {name!r} is too large for {self.precision}", hint="export it in f32")
        if kind == "f16":
            return op.convert(_const(array.astype(np.float16), "f16"), "f32")
        if kind == "int8":
            small = weight_rounding.to_int8(array)
            return op.convert(
                op.multiply(op.convert(_const(small.values, "i8"), "f16"), _const(small.scales, "f16")), "f32"
            )
        four = weight_rounding.to_int4(array)
        values, zeros = (op.convert(_four_bits(part), "f16") for part in (four.values, four.zeros))
        scaled = op.multiply(op.subtract(values, zeros), _const(four.scales, "f16"))
        return op.convert(op.reshape(scaled, _const(list(array.shape)), False), "f32")


def _four_bits(values: Any) -> Any:
    # A Tensor built from an array borrows its memory without keeping it alive, so OpenVINO must allocate the memory.
    tensor = ov.Tensor(ov.Type.u4, list(values.shape))
    tensor.data.reshape(-1)[:] = weight_rounding.pack_int4(values)
    return op.constant(tensor)


def _causal_mask(ids: Any, attention_mask: Any) -> Any:
    """[batch, 1, new, all]: 0 where a query may attend to a key, −65504 where the key is later or padding."""
    new, whole = (op.gather(op.shape_of(x), _const(1), _const(0)) for x in (ids, attention_mask))
    keys = op.range(_const(0), whole, _const(1), "i64")
    queries = op.range(op.subtract(whole, new), whole, _const(1), "i64")
    behind = op.less_equal(keys, op.unsqueeze(queries, _const(1)))
    real = op.not_equal(op.unsqueeze(attention_mask, _const([1, 2])), _const(0))
    return op.select(op.logical_and(behind, real), _const(0.0, "f32"), _const(-65504.0, "f32"))


def _parameter(name: str, shape: list[int], kind: str) -> Any:
    parameter = op.parameter(shape, getattr(ov.Type, kind), name=name)
    parameter.output(0).set_names({name})
    return parameter


def _const(value: Any, kind: str = "i64") -> Any:
    return op.constant(np.asarray(value), dtype=getattr(ov.Type, kind))


def _rope(config: Any) -> tuple[Any, float]:
    """Inverse frequencies [head size / 2] and the factor on cosine and sine, as transformers computes them."""
    rope = LlamaRotaryEmbedding(config)
    return rope.inv_freq.float().numpy(), float(rope.attention_scaling)


def check_config(folder: Path) -> Any:
    """The config of a model folder. Raises: ModelError (it says what OpenVINO's form cannot)."""
    config: Any = read_config(folder)
    fault = None
    if config.hidden_act not in ("silu", "swish"):
        fault = f"the activation is {config.hidden_act!r}; OpenVINO's form is written for Llama's own, 'silu'"
    if (kind := config.rope_parameters.get("rope_type", "default")) not in _STATIC_ROPE:
        fault = f"the rotary embedding is of type {kind!r}, whose frequencies change with the length of the text"
    if fault is not None:
        hint = 'evaluate and serve this model with engine = "transformers"'
        raise ModelError(fault, where=str(folder / "config.json"), hint=hint)
    return config
