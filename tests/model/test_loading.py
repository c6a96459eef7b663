from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from corral.assets import fetch
from corral.errors import AssetError, ModelError
from corral.model.config import read_config
from corral.model.folder import model_identity
from corral.model.loading import (
    load_model,
    load_template,
    load_tokenizer,
    quiet,
    resolve_model,
    untrained_special_tokens,
)
from corral.model.merging import save_model
from corral.storage import hashes
from tests.conftest import Request, change_json, make_tiny_model, run_python, web_server


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny model that a test may damage, and an empty cache."""
    monkeypatch.setenv("CORRAL_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


# ---- where a model comes from


def test_the_starter_model_is_converted_once_and_knows_its_licence_and_identity() -> None:
    messages: list[str] = []
    resolve_model("asset:smollm2-135m-instruct")
    source = resolve_model("asset:smollm2-135m-instruct", progress=messages.append)
    assert messages == [], "the second time nothing is downloaded or converted"
    config = json.loads((source.folder / "config.json").read_text("utf-8"))
    shape = [config[key] for key in ("num_hidden_layers", "hidden_size", "num_key_value_heads", "vocab_size")]
    assert shape == [30, 576, 3, 49152]
    assert config["tie_word_embeddings"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e5, "for transformers 4 and 5"
    assert (source.folder / "chat_template.jinja").is_file()
    assert any("Apache License" in path.read_text("utf-8") for path in source.licence_files)
    assert len(source.identity) == 64
    assert source.revision == fetch("smollm2-135m-instruct").sha256["SmolLM2-135M-Instruct.Q4_1.gguf"]


def test_the_starter_model_speaks_and_its_chat_tokens_are_trained() -> None:
    source = resolve_model("asset:smollm2-135m-instruct")
    model, tokenizer = load_model(source), load_tokenizer(source.folder)
    assert not model.training
    assert model.dtype == torch.float32
    assert untrained_special_tokens(model, [0, 1, 2]) == []
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


def test_a_folder_is_itself_and_its_licences_are_found(folder: Path) -> None:
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md"):
        (folder / name).write_text(name)
    source = resolve_model(str(folder))
    assert source.folder == folder
    assert source.revision == ""
    assert [path.name for path in source.licence_files] == ["LICENSE", "NOTICE.txt", "USE_POLICY.md"]


def test_equal_content_has_one_identity_wherever_it_lies_and_any_change_another(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    (copy / "README.md").write_text("not part of the model")
    first = model_identity(folder)
    assert model_identity(copy) == first == model_identity(folder)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        old = (copy / name).read_text("utf-8")
        (copy / name).write_text(old + "\n")
        assert model_identity(copy) != first, name
        (copy / name).write_text(old)
        assert model_identity(copy) == first
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert model_identity(copy) != first
    assert model_identity(folder) == first


def test_the_second_identity_reads_no_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model_identity(folder)
    monkeypatch.delattr(hashes, "sha256_file")
    assert model_identity(folder) == first


def test_weights_changed_with_their_time_set_back_have_another_identity(folder: Path) -> None:
    first = model_identity(folder)
    path = folder / "model.safetensors"
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert model_identity(folder) != first


def test_an_asset_that_is_no_model_is_refused() -> None:
    with pytest.raises(ModelError, match="asset:wikibooks-recipes is data, not a model") as caught:
        resolve_model("asset:wikibooks-recipes")
    assert "asset:smollm2-135m-instruct" in (caught.value.hint or "")
    with pytest.raises(AssetError, match="no asset 'nope'"):
        resolve_model("asset:nope")


def test_a_model_that_is_nowhere_is_answered_with_what_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    hints = {
        "smollm2-135m-instruct": "write asset:smollm2-135m-instruct",
        "meta-llama/Llama-3.2-3B": "write hub:meta-llama/Llama-3.2-3B",
        "./nowhere/at/all": "write asset:NAME, hub:OWNER/NAME",
        "notes.txt": "write asset:NAME, hub:OWNER/NAME",
        "hub:no-owner": "write hub:OWNER/NAME",
    }
    for spec, hint in hints.items():
        with pytest.raises(ModelError) as caught:
            resolve_model(spec)
        assert hint in (caught.value.hint or ""), spec
        assert repr(spec) in caught.value.what


# ---- what is refused before anything is loaded


def refusal(folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        resolve_model(str(folder))
    with pytest.raises(ModelError) as again:
        load_model(folder)
    assert str(caught.value) == str(again.value)
    assert str(folder) in (caught.value.where or "")
    return caught.value


def put_pickle_in_place(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")


def save_weights_beside(folder: Path, name: str) -> None:
    """Put other weights of the same names beside the model's."""
    weights = load_file(folder / "model.safetensors")
    save_file({key: torch.randn_like(value) for key, value in weights.items()}, folder / name)


def leave_stale_index(folder: Path, *, parts: bool = True) -> None:
    name = "model-00001-of-00001.safetensors"
    save_weights_beside(folder, name)
    with safe_open(folder / name, "pt") as file:
        index = {"weight_map": dict.fromkeys(file.keys(), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if not parts:
        (folder / name).unlink()


def state_rope(**values: Any) -> Callable[[Path], None]:
    """Replaces the rotary embedding in config.json."""

    def change(folder: Path) -> None:
        change_json(folder / "config.json", lambda config: config.pop("rope_parameters"), **values)

    return change


LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CODE = {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}
GPTQ = {"quantization_config": {"quant_method": "gptq"}}
REFUSED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "pickled weights": (put_pickle_in_place, ["pickle files (pytorch_model.bin)", "save_pretrained"]),
    "code for the tokenizer": (lambda f: change_json(f / "tokenizer_config.json", **CODE), ["auto_map"]),
    "code for the model": (lambda f: change_json(f / "config.json", **CODE), ["auto_map", "/config.json\n"]),
    "another family": (lambda f: change_json(f / "config.json", model_type="qwen2"), ["model_type is 'qwen2'"]),
    "weights that are quantised already": (lambda f: change_json(f / "config.json", **GPTQ), ["quantised (gptq)"]),
    "an adapter, which would not be loaded": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        ["holds an adapter"],
    ),
    "a file beside the index of its parts": (
        leave_stale_index,
        ["is in model-00001-of-00001.safetensors and in model.s"],
    ),
    "a file beside an index without parts": (
        lambda f: leave_stale_index(f, parts=False),
        ["which is not there", "delete the index"],
    ),
    "weights of another name, which vLLM reads too": (
        lambda f: save_weights_beside(f, "old.safetensors"),
        ["is in model.safetensors and in old.safetensors"],
    ),
    "rotary scaling that is no object": (state_rope(rope_scaling="linear"), ["rope_scaling is 'linear'"]),
    "rotary scaling without a type": (
        state_rope(rope_scaling={"factor": 2.0}),
        ["names no rope_type", '{"factor": 2.0}'],
    ),
    "a type of null": (state_rope(rope_scaling={"type": None, "factor": 2.0}), ["names no rope_type"]),
    "an unknown type": (state_rope(rope_scaling={"type": "su", "factor": 2.0}), ["the rope_type is 'su'"]),
    "two types": (
        state_rope(rope_scaling={"type": "dynamic", **LINEAR}),
        ["states rope_type twice, as 'dynamic' and as 'linear'"],
    ),
    "two bases of the frequencies": (
        state_rope(rope_theta=1e4, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        ["states rope_theta twice, as 10000.0 and as 500000.0"],
    ),
    "two scalings": (
        state_rope(rope_parameters=LINEAR, rope_scaling=LINEAR | {"factor": 4.0}),
        ["states factor twice, as 2.0 and as 4.0"],
    ),
    "two original lengths": (
        state_rope(rope_scaling=YARN, original_max_position_embeddings=128),
        ["states original_max_position_embeddings twice, as 128 and as 64"],
    ),
    "a list of types": (state_rope(rope_scaling=LINEAR | {"rope_type": ["linear"]}), ["the rope_type is ['linear']"]),
    "a type that older programs read as null": (
        state_rope(rope_scaling=LINEAR | {"type": None}),
        ["states rope_type twice, as 'linear' and as None"],
    ),
    "a base of the frequencies in words": (
        state_rope(rope_theta="1e4"),
        ["rope_theta is '1e4'", "compare config.json"],
    ),
    "no base of the frequencies": (state_rope(rope_theta=None), ["rope_theta is None, where a positive number"]),
    "a base of the frequencies of null where transformers reads it": (
        state_rope(rope_theta=1e4, rope_parameters={"rope_type": "default", "rope_theta": None}),
        ["rope_theta is None"],
    ),
    "a negative base of the frequencies": (state_rope(rope_theta=-1e4), ["rope_theta is -10000.0"]),
    "heads that are rotated in part": (state_rope(partial_rotary_factor=0.5), ["a Llama rotates whole heads"]),
    "a broken config": (lambda f: (f / "config.json").write_text("{"), ["config.json cannot be read"]),
    "a config of another shape": (lambda f: (f / "config.json").write_text("[]"), ["no JSON object"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["there is no config.json"]),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_folder_is_refused_for(fault: str, folder: Path) -> None:
    change, words = REFUSED[fault]
    change(folder)
    error = str(refusal(folder))
    assert all(part in error for part in words)


def test_a_setting_of_null_is_one_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    expected = read_config(folder).rope_parameters
    change_json(folder / "config.json", quantization_config=None, rope_theta=None, rope_scaling=None)
    model, template = load_model(folder), load_template(folder)
    assert model.config.rope_parameters == expected
    (tmp_path / "written").mkdir()
    save_model(model, template, tmp_path / "written", licences=())
    assert read_config(resolve_model(str(tmp_path / "written")).folder).rope_parameters == expected


def test_a_weight_file_cut_anywhere_is_refused_before_it_is_loaded(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for cut in (0, 5, 8, 100, header - 1, header, header + 1, len(data) - 1):
        path.write_bytes(data[:cut])
        assert "cut short or damaged" in refusal(folder).what, cut
    path.write_bytes(data + b"\0")
    assert "cut short or damaged" in refusal(folder).what
    path.write_bytes(data)
    assert resolve_model(str(folder)).folder == folder


def test_a_weight_header_that_lies_about_its_tensors_is_refused(folder: Path) -> None:
    whole = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    wrong: list[Any] = [whole | {"shape": [4]}, {"dtype": "F32"}, 7, {"dtype": "X"}]
    for header in (*({"w": entry} for entry in wrong), {"w": whole, "overlaps": whole | {"data_offsets": [4, 12]}}):
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        assert "cut short or damaged" in refusal(folder).what, header


def test_a_missing_part_of_a_split_model_is_named(folder: Path) -> None:
    model = load_model(folder)
    (folder / "model.safetensors").unlink()
    with quiet():
        model.save_pretrained(folder, max_shard_size="100KB")
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) > 2
    again = load_model(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    parts[1].unlink()
    assert repr(parts[1].name) in refusal(folder).what
    change_json(folder / "model.safetensors.index.json", weight_map={"w": "../../outside.safetensors"})
    assert "'../../outside.safetensors', which is not there" in refusal(folder).what


# ---- loading


def test_a_loaded_model_is_the_saved_one_in_the_dtype_asked_for(folder: Path, tiny_tokenizer: Any) -> None:
    original = make_tiny_model(len(tiny_tokenizer))
    model = load_model(resolve_model(str(folder)))
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), model.parameters(), strict=True))
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    half = load_model(folder, dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, r"missing \(model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"unexpected \(model\.layers\.1"),
        ({"intermediate_size": 64}, "do not fit"),
        ({"hidden_size": "many"}, "config.json cannot be read"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused_where_random_ones_would_take_their_place(
    changes: dict[str, Any], words: str, folder: Path
) -> None:
    change_json(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=words):
        load_model(folder)


def test_nothing_is_printed_while_loading(folder: Path) -> None:
    code = "import sys; from pathlib import Path; from corral.model.loading import *\n"
    code += "f = Path(sys.argv[1]); s = resolve_model(str(f)); load_model(s); load_tokenizer(f)"
    environment = {**os.environ, "CORRAL_CACHE": str(folder.parent / "cache")}
    done = run_python("-c", code, folder, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_tokenizer_is_the_one_its_file_states_whatever_class_is_named(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    path = fetch("llama-2-tokenizer").files[0]
    shutil.copy(path, tmp_path / "tokenizer.json")
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    original, tokenizer = Tokenizer.from_file(str(path)), load_tokenizer(tmp_path)
    for text in ("hello", "  lead", "<s>[INST] hi [/INST] ok</s>next", "\n\n1"):
        assert tokenizer(text)["input_ids"] == original.encode(text).ids, text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_a_missing_or_broken_tokenizer_is_a_model_error(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ModelError, match="tokenizer cannot be read"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(folder)


def test_untrained_tokens_are_those_with_zero_small_repeated_or_no_embeddings() -> None:
    model = make_tiny_model(100)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[10] = 0
        weight[11] *= 0.05
        weight[12] *= 0.5
        weight[13] = weight[14]
        weight[15] = -weight[16]
    ids = [16, 15, 14, 13, 12, 11, 10, 9, 99, 100]
    assert untrained_special_tokens(model, ids) == [14, 13, 11, 10, 100]
    assert untrained_special_tokens(model.to(torch.bfloat16), ids) == [14, 13, 11, 10, 100]


def test_a_template_of_tokens_that_the_embedding_lacks_is_refused(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|ask|>", "<|done|>"]})
    tokenizer.save_pretrained(folder)
    rows = len(tokenizer) - 2
    assert load_template(folder, "chatml").name == "chatml"  # tokens that are there and not used do no harm
    (folder / "asking.jinja").write_text(
        "{% for m in messages %}{{ '<|ask|>' + m.content if m.role == 'user' else m.content + '<|done|>' }}{% endfor %}"
    )
    with pytest.raises(ModelError, match=rf"the token '<\|ask\|>' with id {rows}, .* has {rows} rows"):
        load_template(folder, str(folder / "asking.jinja"))
    change_json(folder / "config.json", vocab_size=rows + 2)
    load_template(folder, str(folder / "asking.jinja"))


# What generation_config.json and config.json name, None for a file without it, and the ids that end an answer; 2 is the end
# token of the template and the tokenizer.
ENDS: dict[str, tuple[Any, Any, list[int]]] = {
    "a list": ([0, 2, 198], 2, [0, 2, 198]),
    "another than the template's": (0, 0, [0, 2]),
    "the generation config before the config": (0, 5, [0, 2]),
    "only the config": (None, [5, 6], [2, 5, 6]),
    "neither": (None, None, [2]),
    "ids that no token has": ([0, -1, 400, 128009], 2, [0, 2]),
}


@pytest.mark.parametrize("name", ENDS)
def test_answers_end_at_every_token_that_template_tokenizer_or_config_names(name: str, folder: Path) -> None:
    generation, config, expected = ENDS[name]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    change_json(folder / "config.json", eos_token_id=config)
    template = load_template(folder)
    assert list(template.stop_ids) == expected
    assert template.special_ids == (1, 2), "an end token that training never writes need not be trained"


@pytest.mark.parametrize("stated", ["2", True, [2, None], {"id": 2}])
def test_an_end_token_that_is_no_id_is_refused(stated: Any, folder: Path) -> None:
    change_json(folder / "generation_config.json", eos_token_id=stated)
    with pytest.raises(ModelError, match="eos_token_id is") as caught:
        load_template(folder)
    assert caught.value.where == str(folder / "generation_config.json")


# ---- the model hub, played by a server on this machine

COMMIT = hashlib.sha1(b"a commit").hexdigest()


@pytest.fixture
def hub(tiny_folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves the tiny model as `good/model`, and refusals by name. Yields its address and the files it was asked for."""
    extra = {"pytorch_model.bin": b"pickle", "original/consolidated.00.pth": b"pickle", "LICENSE": b"terms"}
    extra |= {"additional_chat_templates/rag.jinja": b"{{ 1 }}", "original/params.json": b"{}", "onnx/LICENSE": b""}
    files = {path.name: path.read_bytes() for path in tiny_folder.iterdir()} | extra
    requests: list[str] = []
    refusals = {
        "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}),
        "unknown": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
        "secret": (401, {"X-Error-Message": "Invalid username or password."}),
        "broken": (503, {}),
    }

    class Hub(Request):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            owner = path.removeprefix("/api/models").split("/")[1]
            if owner in refusals:
                status, headers = refusals[owner]
                return self.answer(status, headers)
            kind = {"Content-Type": "application/json"}
            if path == "/api/models/good/model/revision/main":
                siblings = [{"rfilename": name} for name in files]
                info = {"id": "good/model", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
                return self.answer(200, kind, json.dumps(info).encode())
            if path.startswith("/api/models/good/model/revision/"):
                return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            if path == f"/api/models/good/model/tree/{COMMIT}":
                tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()]
                return self.answer(200, kind, json.dumps(tree).encode())
            name = path.removeprefix(f"/good/model/resolve/{COMMIT}/")
            if name not in files:
                return self.answer(404, {"X-Error-Code": "EntryNotFound"}, b"")
            requests.append(name)
            etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
            return self.answer(200, {"ETag": etag, "X-Repo-Commit": COMMIT}, files[name])

        do_HEAD = do_GET

    with web_server(Hub) as address:
        yield address, requests


def resolve_with_hub(endpoint: str, folder: Path, *specs: str, offline: bool = False) -> list[dict[str, Any]]:
    """What `resolve_model` answers to each, in a process with its own hub settings and caches."""
    code = """
import json, sys
from corral.errors import CorralError
from corral.model.loading import resolve_model
for spec in sys.argv[1:]:
    try:
        source = resolve_model(spec)
        answer = {"folder": str(source.folder), "revision": source.revision, "identity": source.identity}
        answer["licences"] = [path.name for path in source.licence_files]
    except CorralError as error:
        answer = {"kind": type(error).__name__, "what": error.what, "where": error.where, "hint": error.hint}
    print(json.dumps(answer))
"""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HOME": str(folder / "hf"),
    }
    environment |= {"CORRAL_CACHE": str(folder / "cache"), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    done = run_python("-c", code, *specs, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_hub_model_is_fetched_without_pickles_and_found_again_offline(
    hub: tuple[str, list[str]], tiny_folder: Path, tmp_path: Path
) -> None:
    endpoint, requests = hub
    (answer,) = resolve_with_hub(endpoint, tmp_path, "hub:good/model")
    assert answer["revision"] == COMMIT
    assert answer["licences"] == ["LICENSE"]
    assert "model.safetensors" in requests
    assert {name for name in requests if "/" in name} == {"additional_chat_templates/rag.jinja"}
    assert "pytorch_model.bin" not in requests
    assert answer["identity"] == model_identity(tiny_folder), "the same content as on this disk"
    before = len(requests)
    again = resolve_with_hub(endpoint, tmp_path, f"hub:good/model@{COMMIT}", offline=True)
    assert again == [answer]
    assert len(requests) == before


def test_each_refusal_of_the_hub_says_what_to_do(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, _ = hub
    expected = {
        "hub:gated/model": [
            "is gated: its licence must be accepted",
            f"{endpoint}/gated/model",
            "HF_TOKEN",
            "hf auth login",
        ],
        "hub:unknown/model": ["knows no model 'unknown/model'"],
        "hub:secret/model": ["HTTP 401", "HF_TOKEN"],
        "hub:broken/model": ["HTTP 503"],
        "hub:good/model@nope": ["no revision 'nope'"],
    }
    for answer, words in zip(resolve_with_hub(endpoint, tmp_path, *expected), expected.values(), strict=True):
        assert answer["kind"] == "ModelError"
        assert answer["where"].startswith(endpoint)
        assert "\n" not in answer["what"]
        assert all(word in f"{answer['what']} {answer['hint']}" for word in words), answer


def test_a_hub_that_cannot_be_reached_is_said_to_be_so(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    (answer,) = resolve_with_hub(endpoint, tmp_path, "hub:good/model")
    assert "cannot be reached" in answer["what"]
    assert answer["where"] == endpoint
    (answer,) = resolve_with_hub(endpoint, tmp_path, "hub:good/model", offline=True)
    assert "not in the local cache" in answer["what"]
