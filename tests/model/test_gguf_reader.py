from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corral.assets import clear_cache, fetch, list_cache
from corral.errors import ModelError
from corral.model.gguf_reader import convert_to_folder, read_header
from corral.model.loading import load_model, load_tokenizer, quiet, resolve_model
from corral.storage import sha256_file, tree_hashes
from tests.conftest import make_tiny_model
from tests.model.gguf import TEXTS, add_byte_level_tokenizer, add_model, convert, write_gguf_file
from tests.template.real import small_llama_3_tokenizer


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Any) -> Any:
    return make_tiny_model(len(tiny_tokenizer), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def write_tiny(model: Any, tiny_tokenizer: Any) -> Callable[..., Path]:
    def write(
        path: Path, *more: Callable[[GGUFWriter], object], pre: str = "gpt-2", architecture: str = "llama"
    ) -> Path:
        def add_tokenizer(writer: GGUFWriter) -> None:
            add_byte_level_tokenizer(writer, tiny_tokenizer.backend_tokenizer, pre, 1, 2)
            writer.add_chat_template("{{ messages[0]['content'] }}")

        return write_gguf_file(path, lambda w: add_model(w, model), add_tokenizer, *more, architecture=architecture)

    return write


@pytest.fixture(scope="module")
def tiny_gguf(write_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


# ---- the header


def test_the_header_is_what_the_reference_reader_finds(tiny_gguf: Path) -> None:
    header, reference = read_header(tiny_gguf), GGUFReader(str(tiny_gguf))
    fields = {name: field for name, field in reference.fields.items() if not name.startswith("GGUF.")}
    assert header.version == 3
    assert header.metadata == {name: field.contents() for name, field in fields.items()}
    assert len(header.metadata) > 15
    tensors = [(t.name, t.shape, t.type, t.offset, t.size) for t in header.tensors]
    assert tensors == [
        (t.name, tuple(map(int, t.shape)), t.tensor_type.name, int(t.data_offset), int(t.n_bytes))
        for t in reference.tensors
    ]
    assert len(tensors) == 2 * 9 + 3


def test_a_file_cut_anywhere_is_refused_and_the_place_is_named(tiny_gguf: Path, tmp_path: Path) -> None:
    data = tiny_gguf.read_bytes()
    start = min(tensor.offset for tensor in read_header(tiny_gguf).tensors)
    cuts = [*range(0, start, 37), start, start + 100, len(data) - 1]
    assert len(cuts) > 100
    path = tmp_path / "cut.gguf"
    for cut in cuts:
        path.write_bytes(data[:cut])
        with pytest.raises(ModelError, match="not a valid GGUF file") as caught:
            read_header(path)
        assert f"of {cut}" in (caught.value.where or ""), cut


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1), value=st.binary(min_size=1, max_size=9))
def test_any_change_to_the_header_is_refused_or_stays_inside_the_file(
    tiny_gguf: Path, tmp_path: Path, position: float, value: bytes
) -> None:
    data = bytearray(tiny_gguf.read_bytes())
    start = min(tensor.offset for tensor in read_header(tiny_gguf).tensors)
    at = int(position * (start - len(value)))
    data[at : at + len(value)] = value
    path = tmp_path / "changed.gguf"
    path.write_bytes(data)
    try:
        header = read_header(path)
    except ModelError:
        return
    for tensor in header.tensors:
        assert 0 < tensor.offset < tensor.offset + tensor.size <= len(data)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def field(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    head = string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
    return head + struct.pack("<IQ", kind, offset)


def handmade(fields: list[bytes], tensors: list[bytes], *, data: int = 256, version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields)) + b"".join(fields) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


HUGE = 2**63
TEXT = field("general.name", 8, string("ok"))
BAD: dict[str, tuple[bytes, str]] = {
    "another magic number": (b"GGML" + bytes(60), "starts with b'GGML'"),
    "version 1, whose counts are shorter": (handmade([], [], version=1), "version 1 is not one of"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64), "big-endian"),
    "a huge tensor count": (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0) + bytes(64), f"tensor count is {HUGE}"),
    "a huge metadata count": (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE) + bytes(64), f"metadata count is {HUGE}"),
    "a huge string": (handmade([field("a", 8, struct.pack("<Q", HUGE))], []), f"length of a is {HUGE}"),
    "a huge array": (handmade([field("a", 9, struct.pack("<IQ", 4, HUGE))], []), f"length of a is {HUGE}"),
    "a nested array": (handmade([field("a", 9, struct.pack("<IQ", 9, 1))], []), "array of unknown type 9"),
    "an unknown value type": (handmade([field("a", 13, bytes(8))], []), "unknown type 13"),
    "a key twice": (handmade([TEXT, TEXT], []), "there twice"),
    "text that is not UTF-8": (handmade([field("a", 8, string(b"\xff"))], []), "not UTF-8"),
    "an alignment of zero": (handmade([field("general.alignment", 4, bytes(4))], []), "alignment is 0"),
    "no dimensions": (handmade([], [tensor("w", ())]), "0 dimensions"),
    "a million dimensions": (handmade([], [string("w") + struct.pack("<I", 10**6) + bytes(32)]), "1000000 dimensions"),
    "dimensions whose product overflows": (handmade([], [tensor("w", (2**33, 2**33))]), "truncated"),
    "an empty tensor": (handmade([], [tensor("w", (0, 4))]), "shape (0, 4)"),
    "part of a block": (handmade([], [tensor("w", (31,), kind=8)]), "type Q8_0 cannot have"),
    "an unknown tensor type": (handmade([], [tensor("w", (4,), kind=99)]), "unknown type 99"),
    "an offset outside the file": (handmade([], [tensor("w", (4,), offset=1024)]), "offset 1024"),
    "an offset that wraps around": (handmade([], [tensor("w", (4,), offset=2**64 - 32)]), "offset"),
    "an offset off the grid": (handmade([], [tensor("w", (4,), offset=8)]), "not aligned"),
    "tensors that overlap": (handmade([], [tensor("a", (32,)), tensor("b", (32,), offset=32)]), "overlap"),
    "a tensor twice": (handmade([], [tensor("a", (8,)), tensor("a", (8,), offset=32)]), "there twice"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_header_is_refused_for(fault: str, tmp_path: Path) -> None:
    data, words = BAD[fault]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert words in caught.value.what
    assert str(path) in (caught.value.where or "")
    assert "byte " in (caught.value.where or "")
    assert caught.value.hint


def test_a_handmade_header_without_a_fault_is_read(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(handmade([TEXT], [tensor("a", (8,)), tensor("b", (8,), offset=32)]))
    header = read_header(path)
    assert header.metadata == {"general.name": "ok"}
    assert [(t.name, t.size) for t in header.tensors] == [("a", 32), ("b", 32)]


def test_a_sparse_file_of_any_size_cannot_make_us_allocate_what_it_states(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    many, long = 2**34, 2**35
    heads = {
        "length of a is": field("a", 9, struct.pack("<IQ", 8, many)),
        "a has": field("a", 9, struct.pack("<IQ", 0, 2**25)),
        f"length of a is {long}": field("a", 8, struct.pack("<Q", long)),
    }
    tracemalloc.start()
    for words, part in heads.items():
        path.write_bytes(handmade([part], []))
        os.truncate(path, 2**38)
        with pytest.raises(ModelError, match=words) as caught:
            read_header(path)
        assert "more than any model has" in caught.value.what
    counts = struct.pack("<IQQ", 3, many, 0), struct.pack("<IQQ", 3, 0, many)
    for count in counts:
        path.write_bytes(b"GGUF" + count)
        os.truncate(path, 2**40)
        with pytest.raises(ModelError, match="more than any model has"):
            read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_a_missing_file_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read the GGUF file"):
        read_header(tmp_path / "none.gguf")


# ---- the conversion


def test_the_converted_model_computes_what_the_original_did(tiny_gguf: Path, model: Any) -> None:
    folder = convert(tiny_gguf)
    again = load_model(folder)
    assert {k: tuple(v.shape) for k, v in again.state_dict().items()} == {
        k: tuple(v.shape) for k, v in model.state_dict().items()
    }
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    ids = torch.arange(40)[None] % model.config.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert "_model_name_or_path" not in config
    generation = json.loads((folder / "generation_config.json").read_text("utf-8"))
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    assert (folder / "chat_template.jinja").read_text("utf-8") == "{{ messages[0]['content'] }}"


def test_the_converted_tokenizer_gives_the_same_ids(
    write_tiny: Callable[..., Path], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(convert(write_tiny(tmp_path / "tiny.gguf")))
    for text in [*TEXTS, "<|im_start|>user\nhi<|im_end|>\n"]:
        ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == len(tiny_tokenizer), "no token is invented beyond the embeddings"


def test_both_ends_of_an_answer_are_stop_ids(write_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = convert(write_tiny(tmp_path / "tiny.gguf", lambda w: w.add_eot_token_id(0)))
    assert json.loads((folder / "generation_config.json").read_text("utf-8"))["eos_token_id"] == [2, 0]


def test_a_llama_2_tokenizer_survives_conversion(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    original = Tokenizer.from_file(str(fetch("llama-2-tokenizer").files[0]))
    tokens = [token for token, _ in sorted(original.get_vocab().items(), key=lambda item: item[1])]
    spaces = [set(token) == {"▁"} for token in tokens]

    def sentencepiece(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)])
        # Meta's file: a piece's score is minus its rank, pieces of spaces alone come last.
        writer.add_token_scores([0.0 if i < 259 else -1e9 if spaces[i] else 259.0 - i for i in range(len(tokens))])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    tiny = make_tiny_model(len(tokens), hidden_size=16, num_hidden_layers=1)
    path = write_gguf_file(tmp_path / "l2.gguf", lambda w: add_model(w, tiny), sentencepiece)
    tokenizer = load_tokenizer(convert(path))
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == original.encode(text).ids, text


def test_a_llama_3_tokenizer_survives_conversion(tmp_path: Path) -> None:
    original = small_llama_3_tokenizer()
    tiny = make_tiny_model(8005, hidden_size=16, num_hidden_layers=1)
    path = write_gguf_file(
        tmp_path / "l3.gguf",
        lambda w: add_model(w, tiny),
        lambda w: add_byte_level_tokenizer(w, original.backend_tokenizer, "llama-bpe", 8000, 8001),
    )
    tokenizer = load_tokenizer(convert(path))
    assert len(tokenizer) == 8005
    assert json.loads(tokenizer.backend_tokenizer.to_str())["model"]["ignore_merges"], "as Meta's does"
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == original(text)["input_ids"], text


def test_smollm_files_cut_digits_one_by_one(write_tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "smollm.gguf", pre="smollm")
    rule = load_tokenizer(convert(path)).backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in rule.pre_tokenize_str("a \n12 g")] == ["a", "ĠĊ", "1", "2", "Ġg"]


def test_the_starter_model_has_the_ids_and_splits_of_its_publisher() -> None:
    tokenizer = load_tokenizer(resolve_model("asset:smollm2-135m-instruct").folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == 49152
    assert tokenizer.model_max_length == 8192
    assert (
        tokenizer("hi", add_special_tokens=True)["input_ids"] == tokenizer("hi", add_special_tokens=False)["input_ids"]
    )
    # Digits stand alone, so the space before one is a token with what precedes it, never with the digit.
    assert tokenizer.tokenize(" \n12 g") == ["ĠĊ", "1", "2", "Ġg"]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids).endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert ids[0] == 1


REFUSED: dict[str, tuple[Callable[[GGUFWriter], object], str]] = {
    "rope divisors that no rule of Llama 3.1 makes": (
        lambda w: w.add_tensor("rope_freqs.weight", np.linspace(1, 8, 8, dtype=np.float32)),
        "rope_freqs.weight (F32), and no rule",
    ),
    "rope divisors for another dimension": (
        lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, np.float32)),
        "rope_freqs.weight has shape (4,), not (8,)",
    ),
    "linear scaling without a factor": (
        lambda w: w.add_string("llama.rope.scaling.type", "linear"),
        "rope scaling by a factor of None",
    ),
    "more layers than tensors": (lambda w: w.add_block_count(2**31), "block_count is 2147483648, with 21 tensors"),
    "a vocabulary larger than its embeddings": (lambda w: w.add_vocab_size(2**31), "vocab_size is 2147483648"),
    "a width that is not the weights'": (lambda w: w.add_feed_forward_length(64), "(64, 64)"),
    "a count that is a text": (lambda w: w.add_string("llama.attention.head_count", "4"), "head_count is '4'"),
    "rope scaling": (lambda w: w.add_string("llama.rope.scaling.type", "yarn"), "rope.scaling.type is 'yarn'"),
    "a mixture of experts": (lambda w: w.add_expert_count(8), "expert_count is 8"),
    "a stop id outside the vocabulary": (lambda w: w.add_eot_token_id(10**6), "eot_token_id is 1000000"),
    "a tensor that no Llama has": (
        lambda w: w.add_tensor("blk.0.surprise.weight", np.ones(8, np.float32)),
        "no Llama has such a tensor",
    ),
    "a missing weight, for which random numbers would be taken": (
        lambda w: w.tensors[0].pop("blk.1.ffn_up.weight"),
        "it lacks blk.1.ffn_up.weight",
    ),
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1), value=st.binary(min_size=1, max_size=3), in_table=st.booleans())
def test_any_change_to_the_header_is_converted_or_a_model_error(
    tiny_gguf: Path, tmp_path: Path, position: float, value: bytes, in_table: bool
) -> None:
    data = bytearray(tiny_gguf.read_bytes())
    words = data.index(b"tokenizer.ggml.tokens")
    after = data.index(b"tokenizer.ggml.bos_token_id")
    start = min(tensor.offset for tensor in read_header(tiny_gguf).tensors)
    first, last = (after, start) if in_table else (0, words)
    at = first + int(position * (last - first - len(value)))
    data[at : at + len(value)] = value
    path = tmp_path / "changed.gguf"
    path.write_bytes(data)
    folder = tmp_path / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        with quiet():
            convert_to_folder(path, folder)
    except ModelError as error:
        assert str(path) in (error.where or "")  # noqa: PT017 - not raised is good too
    else:
        assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("fault", REFUSED)
def test_a_file_is_refused_that_would_convert_wrongly_because_of(
    fault: str, write_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    part, words = REFUSED[fault]
    with pytest.raises(ModelError) as caught:
        convert(write_tiny(tmp_path / "bad.gguf", part))
    assert words in caught.value.what
    assert str(tmp_path / "bad.gguf") in (caught.value.where or "")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"architecture": "qwen2"}, "architecture is 'qwen2'"),
        ({"pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2'"),
        ({"pre": "default"}, "tokenizer.ggml.pre is 'default'"),
    ],
)
def test_another_architecture_or_splitting_rule_is_refused(
    settings: dict[str, str], words: str, write_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words):
        convert(write_tiny(tmp_path / "other.gguf", **settings))


def test_files_that_lie_beside_the_gguf_file_play_no_part(
    write_tiny: Callable[..., Path], tiny_gguf: Path, tmp_path: Path
) -> None:
    path = write_tiny(tmp_path / "tiny.gguf")
    others = {"adapter_config.json": '{"peft_type": "LORA"}', "config.json": '{"model_type": "bert"}'}
    others |= {"chat_template.jinja": "another", "generation_config.json": '{"eos_token_id": 7}'}
    others |= {"tokenizer_config.json": '{"bos_token": "<|endoftext|>"}', "special_tokens_map.json": "{}"}
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    apart = tmp_path / "apart"
    apart.mkdir()
    alone = convert(Path(shutil.copy(path, apart)))
    assert tree_hashes(convert(path)) == tree_hashes(alone)


def test_a_local_gguf_file_is_converted_once_and_again_when_its_content_changes(
    write_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORRAL_CACHE", str(tmp_path / "cache"))
    path = write_tiny(tmp_path / "mine.gguf")
    messages: list[str] = []
    first = resolve_model(str(path), progress=messages.append)
    assert resolve_model(str(path), progress=messages.append) == first
    assert messages == ["converting mine.gguf to safetensors, once"]
    assert first.revision == sha256_file(path)
    assert [entry.name for entry in list_cache()] == ["mine"]
    path.unlink()
    write_tiny(path, lambda w: w.add_eot_token_id(0))
    second = resolve_model(str(path))
    assert second.folder != first.folder
    assert second.identity != first.identity
    weights = second.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelError, match="cut short") as caught:
        resolve_model(str(path))
    assert "corral cache clear" in (caught.value.hint or "")
    clear_cache(["mine"])
    assert resolve_model(str(path)).identity == second.identity


def test_a_conversion_that_fails_leaves_nothing_in_the_cache(
    write_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORRAL_CACHE", str(tmp_path / "cache"))
    path = write_tiny(tmp_path / "bad.gguf", lambda w: w.add_expert_count(8))
    with pytest.raises(ModelError, match="expert_count"):
        resolve_model(str(path))
    assert list_cache() == []
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()] == []
