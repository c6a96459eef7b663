from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from corral import storage
from corral.assets import fetch
from corral.errors import AssetError, ModelError
from corral.model.folder import model_identity
from corral.model.loading import (
    load_model,
    load_template,
    load_tokenizer,
    quiet,
    resolve_model,
    untrained_special_tokens,
)
from tests.conftest import Request, make_tiny_model, web_server


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny model that a test may damage, and an empty cache."""
    monkeypatch.setenv("CORRAL_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def change_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**value, **changes}))


# ---- where a model comes from


def test_the_starter_model_is_converted_once_and_knows_its_licence_and_identity() -> None:
    told: list[str] = []
    resolve_model("asset:smollm2-135m-instruct")
    source = resolve_model("asset:smollm2-135m-instruct", progress=told.append)
    assert told == [], "the second time nothing is downloaded or converted"
    config = json.loads((source.folder / "config.json").read_text("utf-8"))
    shape = [config[key] for key in ("num_hidden_layers", "hidden_size", "num_key_value_heads", "vocab_size")]
    assert shape == [30, 576, 3, 49152]
    assert config["tie_word_embeddings"]
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
    monkeypatch.delattr(storage, "sha256_file")
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


def test_what_is_nowhere_is_answered_with_what_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_pickled_weights_are_never_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    error = refusal(folder)
    assert "pickle files (pytorch_model.bin)" in error.what
    assert "save_pretrained" in (error.hint or "")


def test_code_that_comes_with_a_model_is_refused(folder: Path) -> None:
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": "evil.Tokenizer"})
    assert "auto_map" in refusal(folder).what
    change_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    error = refusal(folder)
    assert "auto_map" in error.what
    assert (error.where or "").endswith("config.json")


def test_other_families_are_refused_by_name(folder: Path) -> None:
    change_json(folder / "config.json", model_type="qwen2")
    assert "model_type is 'qwen2'" in refusal(folder).what


def test_weights_that_are_quantised_already_are_refused(folder: Path) -> None:
    change_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
    assert "quantised (gptq)" in refusal(folder).what


def test_an_adapter_in_the_folder_is_not_loaded_unseen(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refusal(folder).what


def test_a_missing_or_broken_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(folder).what
    (folder / "config.json").write_text("[]")
    assert "no JSON object" in refusal(folder).what
    (folder / "config.json").unlink()
    assert "there is no config.json" in refusal(folder).what


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
    half = load_model(folder, dtype="bfloat16", attention="eager")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.config._attn_implementation == "eager"


def test_weights_that_do_not_fit_the_config_are_refused_where_random_ones_would_take_their_place(
    folder: Path, tiny_tokenizer: Any
) -> None:
    change_json(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"missing \(model\.layers\.2"):
        load_model(folder)
    change_json(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"unexpected \(model\.layers\.1"):
        load_model(folder)
    change_json(folder / "config.json", num_hidden_layers=2, intermediate_size=64)
    with pytest.raises(ModelError, match="do not fit"):
        load_model(folder)
    change_json(folder / "config.json", intermediate_size=128, hidden_size="many")
    with pytest.raises(ModelError, match="cannot load"):
        load_model(folder)


def test_nothing_is_printed_while_loading(folder: Path) -> None:
    code = "import sys; from pathlib import Path; from corral.model.loading import *\n"
    code += "f = Path(sys.argv[1]); s = resolve_model(str(f)); load_model(s); load_tokenizer(f)"
    environment = {**os.environ, "CORRAL_CACHE": str(folder.parent / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False, env=environment
    )
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


def test_a_template_of_tokens_that_the_embedding_lacks_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
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
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": rows + 2}))
    load_template(folder, str(folder / "asking.jinja"))


# ---- the model hub, played by a server on this machine

COMMIT = hashlib.sha1(b"a commit").hexdigest()


@pytest.fixture
def hub(tiny_folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serves the tiny model as `good/model`, and refusals by name. Yields its address and the files it was asked for."""
    extra = {"pytorch_model.bin": b"pickle", "original/consolidated.00.pth": b"pickle", "LICENSE": b"terms"}
    extra |= {"additional_chat_templates/rag.jinja": b"{{ 1 }}", "original/params.json": b"{}", "onnx/LICENSE": b""}
    files = {path.name: path.read_bytes() for path in tiny_folder.iterdir()} | extra
    given: list[str] = []
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
            given.append(name)
            etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
            return self.answer(200, {"ETag": etag, "X-Repo-Commit": COMMIT}, files[name])

        do_HEAD = do_GET

    with web_server(Hub) as address:
        yield address, given


def ask_hub(endpoint: str, place: Path, *specs: str, offline: bool = False) -> list[dict[str, Any]]:
    """What `resolve_model` answers to each, in a process with its own hub settings and caches."""
    code = """
import json, sys
from corral.errors import CorralError
from corral.model.loading import resolve_model
for spec in sys.argv[2:]:
    try:
        source = resolve_model(spec, offline=sys.argv[1] == "True")
        answer = {"folder": str(source.folder), "revision": source.revision, "identity": source.identity}
        answer["licences"] = [path.name for path in source.licence_files]
    except CorralError as error:
        answer = {"kind": type(error).__name__, "what": error.what, "where": error.where, "hint": error.hint}
    print(json.dumps(answer))
"""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(place / "hf")}
    environment |= {"CORRAL_CACHE": str(place / "cache"), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(offline), *specs], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_hub_model_is_fetched_without_pickles_and_found_again_offline(
    hub: tuple[str, list[str]], tiny_folder: Path, tmp_path: Path
) -> None:
    endpoint, given = hub
    (answer,) = ask_hub(endpoint, tmp_path, "hub:good/model")
    assert answer["revision"] == COMMIT
    assert answer["licences"] == ["LICENSE"]
    assert "model.safetensors" in given
    assert {name for name in given if "/" in name} == {"additional_chat_templates/rag.jinja"}
    assert "pytorch_model.bin" not in given
    assert answer["identity"] == model_identity(tiny_folder), "the same content as on this disk"
    asked = len(given)
    again = ask_hub(endpoint, tmp_path, f"hub:good/model@{COMMIT}", offline=True)
    assert again == [answer]
    assert len(given) == asked


def test_each_refusal_of_the_hub_says_what_to_do(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, _ = hub
    specs = ["hub:gated/model", "hub:unknown/model", "hub:secret/model", "hub:broken/model", "hub:good/model@nope"]
    gated, unknown, secret, broken, revision = ask_hub(endpoint, tmp_path, *specs)
    for answer in (gated, unknown, secret, broken, revision):
        assert answer["kind"] == "ModelError"
        assert answer["where"].startswith(endpoint)
        assert "\n" not in answer["what"]
    assert "is gated: its licence must be accepted" in gated["what"]
    assert f"{endpoint}/gated/model" in gated["hint"]
    assert "HF_TOKEN" in gated["hint"]
    assert "hf auth login" in gated["hint"]
    assert "knows no model 'unknown/model'" in unknown["what"]
    assert "HF_TOKEN" in secret["hint"]
    assert "HTTP 401" in secret["what"]
    assert "HTTP 503" in broken["what"]
    assert "no revision 'nope'" in revision["what"]


def test_a_hub_that_cannot_be_reached_is_said_to_be_so(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    (answer,) = ask_hub(endpoint, tmp_path, "hub:good/model")
    assert "cannot be reached" in answer["what"]
    assert answer["where"] == endpoint
    (answer,) = ask_hub(endpoint, tmp_path, "hub:good/model", offline=True)
    assert "not in the local cache" in answer["what"]
