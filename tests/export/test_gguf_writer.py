from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from corral.errors import CorralError, ModelError, StorageError
from corral.export import contract, gguf_writer
from corral.export.gguf_writer import write_gguf
from corral.export_forms import EXPORT_TYPES
from corral.messages import Conversation
from corral.model.gguf_reader import read_header
from corral.model.loading import load_model, load_tokenizer, resolve_model
from corral.template import Template
from tests.conftest import change_json, file_size_limit, make_tiny_model
from tests.llama_cpp import Llama
from tests.model.gguf import TEXTS, convert
from tests.template.real import small_llama_3_tokenizer, tokenizer

CHATS = [
    Conversation.from_turns(("user", "What is 2 + 2?")),
    Conversation.from_turns(
        ("user", "Grüße,  東京!\n\n\tHi"), ("assistant", "```py\nx = 1\n```"), ("user", "and 12345?")
    ),
]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "Llama 2": {"num_key_value_heads": 4},
    "Llama 2 with grouped queries": {},
    "Llama 3": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "Llama 3.1": {"rope_parameters": LLAMA3, "head_dim": 32},
    "Llama 3.2, tied": {"rope_parameters": LLAMA3 | {"factor": 32.0}, "head_dim": 32, "tie_word_embeddings": True},
    "linear scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "wide heads": {"head_dim": 48},
}


def save_model(folder: Path, tokenizer: Any, source: str = "chatml", **changes: Any) -> Path:
    """A merged folder as corral writes it: a random model, a tokenizer, a template, every stop id."""
    rows = changes.pop("vocab_size", len(tokenizer))
    template = Template.load(tokenizer, source)
    model = make_tiny_model(rows, **changes)
    model.generation_config.eos_token_id = list(template.stop_ids)
    model.save_pretrained(folder)
    template.save(folder)
    return folder


def export(folder: Path, path: Path, kind: Any = "f16", stop_ids: Sequence[int] = (2,)) -> Path:
    write_gguf(folder, path, kind, stop_ids=stop_ids)
    return path


@pytest.fixture(scope="module")
def tiny_export(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_folder, tmp_path_factory.mktemp("export") / "model-f16.gguf")


@pytest.fixture(params=["chatml", "smollm2", "llama-2", "llama-3"])
def any_template(request: pytest.FixtureRequest, tiny_tokenizer: Any) -> Template:
    """A template of each family on a tokenizer of its kind."""
    name = request.param
    small = {"chatml": lambda: tiny_tokenizer, "llama-3": small_llama_3_tokenizer}
    return Template.load(small[name]() if name in small else tokenizer(name), name)


# ---- llama.cpp


def next_logprobs(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1).numpy()


def largest_gap(model: Any, run: Llama, length: int) -> float:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (length,), generator=generator).tolist()
    theirs = np.array(run.logprobs(ids, model.config.vocab_size))
    assert np.isfinite(theirs).all()
    return float(np.max(np.abs(theirs - next_logprobs(model, ids))))


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_what_transformers_does(
    kind: str, tiny_tokenizer: Any, tmp_path: Path, llama: Callable[..., Llama]
) -> None:
    folder = save_model(tmp_path / "model", tiny_tokenizer, **KINDS[kind])
    run = llama(export(folder, tmp_path / "model.gguf"))
    model = load_model(folder)
    for length in (5, 300):
        assert largest_gap(model, run, length) < 0.05, length  # rounding to float16; a wrong permutation gives 5


def test_without_rope_freqs_llama_cpp_gives_plainly_other_numbers(
    tiny_tokenizer: Any, tmp_path: Path, llama: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model", tiny_tokenizer, **KINDS["Llama 3.1"])
    monkeypatch.setattr(gguf_writer, "llama3_divisors", lambda config: np.ones(config.head_dim // 2, np.float32))
    run = llama(export(folder, tmp_path / "model.gguf"))
    assert largest_gap(load_model(folder), run, 300) > 0.5


@pytest.mark.parametrize(("kind", "limit"), [("q8_0", 0.3), ("q4_0", 0.3)])
def test_llama_cpp_computes_with_the_quantised_weights_that_were_written(
    kind: str, limit: float, tiny_tokenizer: Any, tmp_path: Path, llama: Callable[..., Llama]
) -> None:
    folder = save_model(tmp_path / "model", tiny_tokenizer)
    path = export(folder, tmp_path / "model.gguf", kind)
    # llama.cpp also quantises what the weights are multiplied with, hence the wider limits.
    assert largest_gap(load_model(convert(path)), llama(path), 60) < limit


def test_llama_cpp_gives_the_ids_that_corral_does(
    any_template: Template, tmp_path: Path, llama: Callable[..., Llama]
) -> None:
    words: Any = any_template.tokenizer
    small = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": len(words) + 7}
    folder = save_model(tmp_path / "model", words, any_template.name, **small)
    run = llama(export(folder, tmp_path / "model.gguf"))
    specials = [token.content for token in words.added_tokens_decoder.values()]
    texts = [*TEXTS, *(f"one{special}two {special} " for special in specials[:6]), "".join(specials[:4])]
    for text in texts:
        assert run.ids(text, bos=False) == words(text, add_special_tokens=False)["input_ids"], text
        assert run.ids(text) == words(text)["input_ids"], text
    for chat in CHATS:
        assert run.chat_ids(chat) == any_template.prompt(chat)


def test_smollm2_answers_as_it_does_in_transformers(tmp_path: Path, llama: Callable[..., Llama]) -> None:
    source = resolve_model("asset:smollm2-135m-instruct")
    model, template = load_model(source), Template.load(load_tokenizer(source.folder))
    prompt = template.prompt(Conversation.from_turns(("user", "What is the capital of France?")))
    with torch.no_grad():
        whole: Any = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False)  # type: ignore[operator]
    run = llama(export(source.folder, tmp_path / "smol.gguf"))
    assert run.chat_ids(Conversation.from_turns(("user", "What is the capital of France?"))) == prompt
    answer = run.greedy(prompt, 10)
    assert answer == whole[0, len(prompt) :].tolist()[: len(answer)]
    assert len(answer) >= 8
    assert "Paris" in template.decode(answer)


# ---- reading it back


@pytest.mark.parametrize("kind", KINDS)
def test_a_float16_file_read_back_is_the_model_rounded_to_float16(
    kind: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", tiny_tokenizer, **KINDS[kind])
    back = convert(export(folder, tmp_path / "back.gguf"))
    ours, theirs = load_model(folder), load_model(back)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, weight in ours.state_dict().items():
        expected = weight if "norm" in name else weight.half().float()
        assert torch.equal(theirs.state_dict()[name], expected), name
    frequencies = [m.get_submodule("model.rotary_emb").inv_freq for m in (ours, theirs)]  # type: ignore[union-attr]
    torch.testing.assert_close(*frequencies, rtol=2e-6, atol=0)
    assert theirs.config.tie_word_embeddings == ours.config.tie_word_embeddings


@pytest.mark.parametrize("kind", EXPORT_TYPES["gguf"])
def test_types_are_those_of_llama_cpp_and_errors_those_of_their_step(
    kind: str, tiny_folder: Path, tmp_path: Path
) -> None:
    path = export(tiny_folder, tmp_path / "m.gguf", kind)
    weights = load_model(tiny_folder).state_dict()
    reader = GGUFReader(str(path))
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    matrix = kind.upper()
    assert {types[f"blk.0.{n}.weight"] for n in ("attn_q", "attn_output", "ffn_down")} == {matrix}
    assert {types[f"blk.1.{n}.weight"] for n in ("attn_norm", "ffn_norm")} | {types["output_norm.weight"]} == {"F32"}
    assert types["output.weight"] == {"f16": "F16", "q8_0": "Q8_0", "q4_0": "Q8_0"}[kind]
    assert types["token_embd.weight"] == matrix
    step = {"f16": 2**-11, "q8_0": 0.5 / 127 + 2**-11, "q4_0": 0.13}[kind]  # of the largest in a block
    for tensor in reader.tensors:
        if tensor.name == "blk.0.ffn_up.weight":
            ours = weights["model.layers.0.mlp.up_proj.weight"].numpy()
            error = np.abs(dequantize(tensor.data, tensor.tensor_type).reshape(ours.shape) - ours)
            block = np.abs(ours).reshape(-1, 32).max(1, keepdims=True)
            assert (error.reshape(-1, 32) <= step * block + 1e-6).all()
            assert error.max() > 0


def test_tied_embeddings_are_written_once_and_rows_that_do_not_fit_blocks_stay_float16(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "m", tiny_tokenizer, hidden_size=64, intermediate_size=80, tie_word_embeddings=True)
    types = {t.name: t.type for t in read_header(export(folder, tmp_path / "m.gguf", "q4_0")).tensors}
    assert "output.weight" not in types
    assert types["token_embd.weight"] == "Q8_0"
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("F16", "Q4_0")


# Reading a large vocabulary back takes ten seconds; tests/model/test_gguf_reader.py reads one of each kind.
@pytest.mark.parametrize(
    "any_template",
    ["chatml", "llama-3", *(pytest.param(name, marks=pytest.mark.full) for name in ("smollm2", "llama-2"))],
    indirect=True,
)
def test_a_read_back_tokenizer_gives_the_same_ids_and_template(any_template: Template, tmp_path: Path) -> None:
    words = any_template.tokenizer
    folder = save_model(tmp_path / "model", words, any_template.name, hidden_size=32, num_hidden_layers=1)
    back = convert(export(folder, tmp_path / "back.gguf", stop_ids=any_template.stop_ids))
    checks = [contract.check_token_ids(any_template, back), contract.check_stop_ids(any_template, back)]
    assert [check.detail for check in checks if not check.passed] == []
    ours, theirs = load_tokenizer(folder), load_tokenizer(back)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours(text)["input_ids"], text


def test_tokens_that_are_matched_in_text_survive_in_llama_cpp_and_back(
    tiny_folder: Path, tmp_path: Path, llama: Callable[..., Llama]
) -> None:
    from tokenizers import AddedToken

    tokenizer: Any = load_tokenizer(tiny_folder)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<tool>", "foo bar")])
    folder = save_model(tmp_path / "model", tokenizer, "chatml")
    path = export(folder, tmp_path / "model.gguf")
    run, back = llama(path), load_tokenizer(convert(path))
    for text in ("a <tool> b", "xfoo barz", "<tool><tool>foo  bar"):
        ids = tokenizer(text)["input_ids"]
        assert run.ids(text) == back(text)["input_ids"] == ids, text
    assert 401 in tokenizer("xfoo barz")["input_ids"]


# ---- what the file says


def test_the_metadata_is_complete(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "fruit")
    (tmp_path / "fruit" / "LICENSE").write_text("\n      Apache License\n   Version 2.0, January 2004\n")
    metadata = read_header(export(tmp_path / "fruit", tmp_path / "m.gguf", "q8_0")).metadata
    stated = {key: value for key, value in metadata.items() if not isinstance(value, list)}
    template = stated.pop("tokenizer.chat_template")
    assert template == (tiny_folder / "chat_template.jinja").read_text("utf-8")
    assert "generation %}" not in template
    assert stated == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "fruit",
        "general.license": "apache-2.0",
        "general.license.name": "Apache License 2.0",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.vocab_size": 400,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert metadata["tokenizer.ggml.token_type"] == [3, 3, 3, *[1] * 397]


def test_rows_without_a_token_are_unused_ones(tiny_tokenizer: Any, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", tiny_tokenizer, vocab_size=403)
    metadata = read_header(export(folder, tmp_path / "m.gguf")).metadata
    assert metadata["tokenizer.ggml.tokens"][-3:] == ["[PAD400]", "[PAD401]", "[PAD402]"]
    assert metadata["tokenizer.ggml.token_type"][-3:] == [5, 5, 5]


def test_up_to_three_stop_ids_survive_and_a_fourth_is_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", tiny_tokenizer)
    path = export(folder, tmp_path / "three.gguf", stop_ids=(0, 1, 2))
    metadata = read_header(path).metadata
    assert [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [2, 0, 1]
    back = json.loads((convert(path) / "generation_config.json").read_text("utf-8"))
    assert sorted(back["eos_token_id"]) == [0, 1, 2]
    with pytest.raises(ModelError, match="has 4 tokens that end an answer"):
        export(folder, tmp_path / "four.gguf", stop_ids=(0, 1, 2, 7))


def test_weights_in_parts_and_in_bfloat16_are_read_as_they_are(tiny_tokenizer: Any, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "whole", tiny_tokenizer)
    model = load_model(folder).to(torch.bfloat16)  # type: ignore[call-overload]
    for name, size in (("one", "1GB"), ("many", "50KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        Template.load(tiny_tokenizer, "chatml").save(tmp_path / name)
        (tmp_path / name / "generation_config.json").write_bytes((folder / "generation_config.json").read_bytes())
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    seen: list[tuple[int, int]] = []
    write_gguf(
        tmp_path / "many",
        tmp_path / "b.gguf",
        "q8_0",
        stop_ids=(2,),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0
    one, many = (
        GGUFReader(str(p)) for p in (export(tmp_path / "one", tmp_path / "a.gguf", "q8_0"), tmp_path / "b.gguf")
    )
    assert all(
        (a.name, a.data.tobytes()) == (b.name, b.data.tobytes()) for a, b in zip(one.tensors, many.tensors, strict=True)
    )
    assert len(one.tensors) == 21


def test_pieces_of_any_size_make_the_same_file(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export(tiny_folder, tmp_path / "whole.gguf", "q4_0").read_bytes()
    monkeypatch.setattr(gguf_writer, "_CHUNK", 1)
    assert export(tiny_folder, tmp_path / "pieces.gguf", "q4_0").read_bytes() == whole


# ---- refusals


def edit(
    name: str, change: Callable[[dict[str, Any]], object] = lambda _: None, **values: Any
) -> Callable[[Path], None]:
    """Returns a function that changes a JSON file of a folder."""
    return lambda folder: change_json(folder / name, change, **values)


def scale_rope_by(kind: str) -> Callable[[Path], None]:
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    return edit("config.json", rope_parameters=parameters)


def add_token(state: dict[str, Any]) -> None:
    state["added_tokens"].append({**state["added_tokens"][0], "id": 400, "content": "<|new|>"})


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "yarn": (scale_rope_by("yarn"), "rope_type is 'yarn'"),
    "dynamic scaling": (scale_rope_by("dynamic"), "rope_type is 'dynamic'"),
    "another activation": (edit("config.json", hidden_act="gelu"), "hidden_act is 'gelu'"),
    "white-space splitting": (edit("tokenizer.json", pre_tokenizer={"type": "Whitespace"}), "it splits text by"),
    "a space before text": (edit("tokenizer.json", pre_tokenizer=BYTE_LEVEL), "it splits text by"),
    "a normalizer": (edit("tokenizer.json", normalizer={"type": "NFC"}), "it changes the text first"),
    "greedy added tokens": (
        edit("tokenizer.json", lambda t: t["added_tokens"][0].update(lstrip=True)),
        "'<|endoftext|>' is matched with lstrip",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no safetensors weights"),
    "half the layers": (
        edit("config.json", num_hidden_layers=3),
        "lacks model.layers.2.input_layernorm.weight and 8 more",
    ),
    "layers too many": (edit("config.json", num_hidden_layers=1), "has unknown model.layers.1"),
    "another width": (
        edit("config.json", intermediate_size=96),
        "in another shape model.layers.0.mlp.gate_proj.weight",
    ),
    "a tokenizer larger than the embedding": (
        edit("tokenizer.json", add_token),
        "the tokenizer has an id 400, the embedding 400 rows",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_folder_is_refused_for(fault: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", tiny_tokenizer)
    change, words = REFUSED[fault]
    change(folder)
    with pytest.raises(ModelError) as caught:
        write_gguf(folder, tmp_path / "out" / "m.gguf", "f16", stop_ids=(2,))
    assert words in caught.value.what
    assert caught.value.where
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorralError, match=r"no config\.json"):
        write_gguf(tmp_path, tmp_path / "m.gguf", "f16", stop_ids=(2,))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, 1e6])
def test_weights_that_float16_cannot_hold_are_refused_and_the_old_file_stays(
    value: float, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "m", tiny_tokenizer)
    model = load_model(folder)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight[3, 5] = value  # type: ignore[index, operator]
    model.save_pretrained(folder)
    out = tmp_path / "out"
    out.mkdir()
    (out / "m.gguf").write_text("old")
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_down\.weight holds"):
        write_gguf(folder, out / "m.gguf", "q8_0", stop_ids=(2,))
    assert [p.name for p in out.iterdir()] == ["m.gguf"]
    assert (out / "m.gguf").read_text() == "old"


def test_a_full_disk_while_writing_leaves_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def full(done: int, total: int) -> None:
        calls.append(done)
        if done > total / 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="the disk is full") as caught:
        write_gguf(tiny_folder, tmp_path / "m.gguf", "f16", stop_ids=(2,), progress=full)
    assert len(calls) > 2
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_real_limit_on_file_size_is_reported_and_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    with file_size_limit(100_000), pytest.raises(StorageError, match="larger than this disk or user may write"):
        write_gguf(tiny_folder, tmp_path / "m.gguf", "f16", stop_ids=(2,))
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_a_storage_error(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError) as caught:
        write_gguf(tiny_folder, tmp_path / "file" / "m.gguf", "f16", stop_ids=(2,))
    assert str(tmp_path / "file") in (caught.value.where or "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError):
        write_gguf(tiny_folder, tmp_path / "folder", "f16", stop_ids=(2,))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_what_a_killed_writer_left_is_written_over(tiny_folder: Path, tmp_path: Path, tiny_export: Path) -> None:
    (tmp_path / ".corral-tmp-m.gguf").write_bytes(b"half" * 100)
    export(tiny_folder, tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == tiny_export.read_bytes()
