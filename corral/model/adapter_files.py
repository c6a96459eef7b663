"""A PEFT LoRA adapter as files: what it changes, whether it fits a model, its base model and its template.

Reads its config and the header of its weights, never the weights. What PEFT computes in a way that corral does not, or cannot
compute again from the files, is refused with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.errors import ModelError
from corral.model.folder import ADAPTER_CONFIG, read_json, tensor_shapes, weight_files
from corral.model.hub import HUB_ID
from corral.model.loading import load_template, load_tokenizer, resolve_model
from corral.recipe import Lora
from corral.run.directory import is_run

if TYPE_CHECKING:
    from corral.model.loading import ModelSource
    from corral.template import Template, Variables

WEIGHTS_FILE = "adapter_model.safetensors"

_INITIALISED_ALONE = frozenset({None, True, False, "gaussian", "eva", "orthogonal", "mica"})
"""Ways to draw an adapter's first weights (`init_lora_weights`) that leave its base as it is."""
_INITIALISED_WITH_BASE = frozenset({"pissa", "olora"})
"""Those that take a part out of the base: PEFT takes the same part out again when it loads the adapter."""
_COMPUTED = {
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules",
    "exclude_modules", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "init_lora_weights",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "trainable_token_indices", "use_dora",
    "lora_bias", "target_parameters", "ensure_weight_tying",
}  # fmt: skip
"""Settings that PEFT computes here as where the adapter was trained."""
_WITHOUT_EFFECT = {
    "auto_mapping", "peft_version", "base_model_class", "parent_library", "revision", "inference_mode", "runtime_config",
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
"""Records, and details of settings that are checked themselves."""
_PART = re.compile(r"\.(?:base_layer|original_module|modules_to_save|token_adapter|lora_\w+|weight|bias)(?:\.|$)")
EMBEDDINGS = ("model.embed_tokens", "lm_head")
"""The modules with a row for each token of the vocabulary: the embedding and the output layer."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's config and the shapes of its tensors.

    Args:
        folder: that of `adapter_config.json`.
        config: its content.
        shapes: by (module of the model, part of the adapter there), such as
            `("model.layers.0.self_attn.q_proj", "lora_A.weight")` or `("lm_head", "weight")`.
    """

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[tuple[str, str], list[int]]

    @classmethod
    def read(cls, folder: Path) -> AdapterFiles:
        """Raises: ModelError (its config or its weights cannot be used, or corral does not compute what it changes)."""
        path = folder / ADAPTER_CONFIG
        config = read_json(path)
        _check_config(config, path)
        weights = folder / WEIGHTS_FILE
        if not weights.is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            raise ModelError(
                f"the adapter has no {WEIGHTS_FILE}, and corral reads no other weights"
                + (" (adapter_model.bin is a pickle file, which can run code)" if pickled else ""),
                where=str(folder),
                hint="load it with PEFT on a machine you can spare, and call save_pretrained"
                if pickled
                else "give a folder that PEFT or corral wrote",
            )
        shapes = {_split(key.removeprefix("base_model.model.")): s for key, s in tensor_shapes(weights).items()}
        return cls(folder, config, shapes)

    @property
    def base(self) -> str:
        """Its base model, as its config names it. Raises: ModelError (it names none)."""
        base = self.config.get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise ModelError(
                "the adapter does not say which model it belongs to (base_model_name_or_path)",
                where=str(self.folder / ADAPTER_CONFIG),
                hint="write the model's name or folder there",
            )
        return base

    @property
    def vocabulary_size(self) -> int | None:
        """Rows of the embedding that it brings or was trained on; None if it does not touch the embedding or the head.

        Raises: ModelError (its tensors disagree).
        """
        sizes: set[int] = set()
        for (module, part), shape in self.shapes.items():
            if module in EMBEDDINGS and len(shape) == 2:
                if part.endswith("lora_embedding_A"):
                    sizes.add(shape[1])
                elif part == "lora_B.weight" or (part.endswith("weight") and "lora_" not in part):
                    sizes.add(shape[0])
        if len(sizes) > 1:
            raise ModelError(
                f"the adapter's embedding and output layer have different numbers of rows: {sorted(sizes)}",
                where=str(self.folder),
                hint="save it again with the program that made it",
            )
        return sizes.pop() if sizes else None

    @property
    def lora(self) -> Lora:
        """Its rank, layers and kind, as far as `[train.lora]` can say them; the rank is the largest of its layers."""
        config = self.config
        ranks = [
            (module.rpartition(".")[2], s[0]) for (module, part), s in self.shapes.items() if part == "lora_A.weight"
        ]
        return Lora(
            rank=max((rank for _, rank in ranks), default=1),
            alpha=config.get("lora_alpha") or 8,
            dropout=config.get("lora_dropout") or 0.0,
            targets=tuple(sorted({layer for layer, _ in ranks})) or Lora().targets,
            rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
        )

    @property
    def trains_embedding(self) -> bool:
        """Whether it changes the input embedding."""
        return any(module == EMBEDDINGS[0] for module, _ in self.shapes)

    @property
    def shares_base(self) -> bool:
        """Whether its base model stays as it is beside it, so that other adapters may use the same weights.

        Biases, embeddings and whole modules are loaded into the model itself, not into layers that can be switched off.
        """
        config = self.config
        return (
            all(part.startswith("lora_") for _, part in self.shapes)
            and not config.get("target_parameters")
            and config.get("init_lora_weights") not in _INITIALISED_WITH_BASE
        )

    def check_fit(self, folder: Path) -> None:
        """Check that the modules it changes are in a model, with the sizes that it has for them.

        Without this, PEFT skips layers that the model lacks, and vLLM writes a small matrix into the corner of a large one.
        The embedding and the output layer may have another number of rows: then the vocabulary was resized, and new rows must
        be in the adapter.

        Raises:
            ModelError: it names the tensor.
        """
        weights = {name: shape for path in weight_files(folder) for name, shape in tensor_shapes(path).items()}
        tied = bool(read_json(folder / "config.json").get("tie_word_embeddings"))
        if tied and "model.embed_tokens.weight" in weights:
            weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
        rows = self.vocabulary_size
        for (module, part), shape in self.shapes.items():
            of_base = "bias" if part.endswith("bias") and "lora_" not in part else "weight"
            weight = weights.get(f"{module}.{of_base}")
            if weight is None:
                known = f"{module}.weight" in weights
                problem = (
                    f"its layer {module!r} has no bias in {folder}" if known else f"{folder} has no layer {module!r}"
                )
            elif _fits(part, shape, [rows, *weight[1:]] if rows and module in EMBEDDINGS else weight):
                continue
            else:
                problem = f"its {module}.{part} is {shape}, the model's weight {weight}"
            raise ModelError(
                f"the adapter does not fit the model: {problem}",
                where=str(self.folder),
                hint="name the model that it was trained on as base_model_name_or_path in its adapter_config.json",
            )
        self._check_new_rows(weights, tied)

    def _check_new_rows(self, weights: Mapping[str, list[int]], tied: bool) -> None:
        """Raises ModelError if it was trained on more rows than the model has, and a part of the new ones is lost.

        They were drawn at random where it was trained. One weight brings those of an embedding that is also the output layer.
        """
        after = self.vocabulary_size or 0
        before = weights.get("model.embed_tokens.weight", [after])[0]
        whole = {module for module, part in self.shapes if part.endswith("weight") and "lora_" not in part}
        missing = [module for module in EMBEDDINGS if module not in whole]
        if after > before and missing and not (tied and len(missing) == 1):
            raise ModelError(
                f"the adapter was trained on a vocabulary resized from {before} to {after} rows, and the new rows of "
                f"{' and '.join(missing)} are not in its folder",
                where=str(self.folder),
                hint="merge it where it was trained, and name the merged model",
            )

    def check_trained(self) -> None:
        """Raises ModelError if it leaves its base as it is: it is LoRA alone and every B is zero, as before training."""
        from safetensors import safe_open

        if any(part not in ("lora_A.weight", "lora_B.weight") for _, part in self.shapes):
            return
        with safe_open(self.folder / WEIGHTS_FILE, "pt") as file:
            if any(file.get_tensor(key).any() for key in file.keys() if ".lora_B." in key):  # noqa: SIM118 - not a dict
                return
        raise ModelError(
            "the adapter leaves its base model as it is: every B is zero, as before training",
            where=str(self.folder),
            hint=f"name its base model instead: {self.config.get('base_model_name_or_path')}",
        )

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder holds a tokenizer."""
        return any((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))

    def load_template(
        self, base: Path, spec: str = "tokenizer", variables: Variables | None = None, *, system: str | None = None
    ) -> Template:
        """A chat template on the adapter's tokenizer, or that of its base model if it has none.

        Args:
            base: folder of the base model.
            spec: as `model.template` of a recipe. `tokenizer` is the adapter's own template (`chat_template.jinja`, or in
                `tokenizer_config.json`), or that of its base model if it has none.
            variables: as `model.template_variables`.
            system: as `data.system_prompt`.

        Raises: ModelError, TemplateError, as `loading.load_template`.
        """
        own = self.has_tokenizer
        tokenizer = load_tokenizer(self.folder if own else base)
        if not own and (template := self._template_alone()) is not None:
            tokenizer.chat_template = template
        elif own and tokenizer.chat_template is None:
            tokenizer.chat_template = load_tokenizer(base).chat_template
        return load_template(
            base, spec, variables, system=system, tokenizer=tokenizer, embedding_rows=self.vocabulary_size
        )

    def _template_alone(self) -> Any:
        """The template in a folder without a tokenizer: a text, or texts by name."""
        if (path := self.folder / "chat_template.jinja").is_file():
            return path.read_text("utf-8")
        path = self.folder / "tokenizer_config.json"
        template: Any = read_json(path).get("chat_template") if path.is_file() else None
        return {each["name"]: each["template"] for each in template} if isinstance(template, list) else template


def find_base_model(adapter: AdapterFiles) -> ModelSource:
    """An adapter's base model: `asset:`, `hub:`, a folder or a hub id, as the adapter's config names it.

    If that folder is gone and the adapter lies in a run (which may have been moved), the folder of that name in the run.

    Raises:
        ModelError: the base model is not found or cannot be loaded.
        AssetError: an unknown, unreachable or damaged asset.
    """
    base, folder = adapter.base, adapter.folder
    if not base.startswith(("asset:", "hub:")) and not Path(base).expanduser().exists():
        run = folder.absolute().parent.parent
        merged = run.joinpath(*Path(base).parts[-2:])
        if is_run(run) and merged.is_dir():
            base = str(merged)
        elif HUB_ID.fullmatch(base):
            base = f"hub:{base}"
    try:
        return resolve_model(base)
    except ModelError as error:
        raise ModelError(
            f"the base model of the adapter: {error.what}",
            where=str(folder),
            hint=f"write another name of that model as base_model_name_or_path into {ADAPTER_CONFIG}, or merge the adapter: "
            f"corral merge {folder} --base MODEL --out FOLDER",
        ) from error


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raises ModelError for adapters that are not LoRA, are for another task, or have settings outside `_COMPUTED`."""
    problem, hint = None, "merge it with the program that made it, if that can, and name the merged model"
    unknown = sorted(key for key, value in config.items() if value and key not in _COMPUTED | _WITHOUT_EFFECT)
    initial = config.get("init_lora_weights", True)
    if config.get("peft_type") != "LORA":
        problem = f"the adapter's peft_type is {config.get('peft_type')!r}; corral loads LoRA adapters"
    elif config.get("task_type") not in (None, "CAUSAL_LM"):
        problem, hint = f"the adapter is for the task {config['task_type']!r}, not for text (CAUSAL_LM)", None
    elif unknown:
        problem = f"the adapter has {unknown[0]} = {config[unknown[0]]!r}, which corral does not compute"
    elif isinstance(initial, list | dict) or initial not in _INITIALISED_ALONE | _INITIALISED_WITH_BASE:
        problem = (
            f"the adapter's training began by changing its base (init_lora_weights = {initial!r}), and the changed weights "
            "are not in the folder"
        )
        hint = "save it as a plain LoRA adapter where it was trained (PEFT: path_initial_model_for_weight_conversion)"
    if problem:
        raise ModelError(problem, where=str(path), hint=hint)


def _split(key: str) -> tuple[str, str]:
    """(module of the model, part of the adapter there) of a tensor's name."""
    match = _PART.search(key)
    if match is None:
        return key, ""
    part = key[match.start() + 1 :]
    # Parameters of one module that are adapted each (`target_parameters`) are wrapped one around the other.
    return key[: match.start()], re.sub(r"^(base_layer\.)+(?=lora_)", "", part)


def _fits(part: str, shape: list[int], weight: list[int]) -> bool:
    """Whether a part of an adapter fits a weight [out, in], or an embedding [rows, size]."""
    sizes: dict[str, tuple[int, int, int]] = {
        # part: number of its dimensions, which of them, which one of the weight that must be equal
        "lora_A.weight": (2, 1, -1),
        "lora_B.weight": (2, 0, 0),
        "lora_embedding_A": (2, 1, 0),
        "lora_embedding_B": (2, 0, -1),
        "token_adapter.trainable_tokens_delta": (2, 1, -1),
    }
    if part in sizes:
        dimensions, own, other = sizes[part]
        return len(shape) == dimensions and 0 not in shape and shape[own] == weight[other]
    return part.endswith(("bias", "magnitude_vector")) or shape == weight
