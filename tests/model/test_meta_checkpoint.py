from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from corral.errors import ModelError
from corral.model import meta_checkpoint
from corral.model.loading import load_model, load_tokenizer, resolve_model
from corral.model.meta_checkpoint import convert, is_meta_checkpoint
from tests.conftest import run_python, write_rows
from tests.forked import corral
from tests.model.meta import (
    LLAMA_2,
    LLAMA_3,
    LLAMA_3_1,
    WORDS,
    Params,
    llama_2_pieces,
    logits,
    random_weights,
    sentencepiece,
    tiny_tokenizer,
    write,
)

ROWS = {-1: 259 + len(WORDS), 530: 530}
# Far apart, so that slow frequencies matter too.
POSITIONS = torch.arange(24) * 170


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRAL_CACHE", str(tmp_path / "cache"))


def weights_for(params: Params, *, tied: bool = False) -> dict[str, torch.Tensor]:
    return random_weights(params, ROWS[params["vocab_size"]], tied=tied)


def convert_beside(source: Path, messages: list[str] | None = None) -> Path:
    folder = source.with_name(f"{source.name}-converted")
    folder.mkdir()
    convert(source, folder, (messages if messages is not None else []).append)
    return folder


def model_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        # The mask keeps transformers from taking gaps between positions for packed texts.
        return model(ids[None], position_ids=POSITIONS[None], attention_mask=torch.ones_like(ids)[None]).logits[0]


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text("utf-8"))


# ---- equal logits

# params, tied, by what Meta's frequencies are scaled
MODELS: dict[str, tuple[Params, bool, float | None]] = {
    "Llama 2": (LLAMA_2, False, None),
    "Llama 3": (LLAMA_3, False, None),
    "Llama 3.1": (LLAMA_3_1, False, 8.0),
    "Llama 3.2": (LLAMA_3_1, True, 32.0),
    "a stated factor": (LLAMA_3_1 | {"rope_scaling_factor": 16.0, "n_kv_heads": None}, False, 16.0),
}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_metas_formulas(name: str, parts: int, tmp_path: Path) -> None:
    params, tied, factor = MODELS[name]
    shape = {key: value for key, value in params.items() if value is not None}
    weights = weights_for(shape, tied=tied)
    model: Any = load_model(resolve_model(str(write(tmp_path / "meta", params, weights, parts=parts))))
    ids = torch.randint(0, len(weights["tok_embeddings.weight"]), (24,), generator=torch.Generator().manual_seed(1))
    expected = logits(shape, weights, ids, POSITIONS, scaled_by=factor)
    ours = model_logits(model, ids)
    assert (ours - expected).abs().max() < 1e-4
    assert expected.abs().max() > 1
    # Planted faults, which the figures above must be able to see.
    for other in (8.0, 32.0):
        if factor is not None and other != factor:
            assert (ours - logits(shape, weights, ids, POSITIONS, scaled_by=other)).abs().max() > 0.01
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.q_proj.weight.copy_(weights[f"layers.{i}.attention.wq.weight"])
            layer.self_attn.k_proj.weight.copy_(weights[f"layers.{i}.attention.wk.weight"])
    assert (model_logits(model, ids) - expected).abs().max() > 0.5, "without the permutation"


def test_one_file_or_four_give_the_same_model_bit_for_bit(tmp_path: Path) -> None:
    weights = weights_for(LLAMA_2)
    one, four = (resolve_model(str(write(tmp_path / f"{n}", LLAMA_2, weights, parts=n))) for n in (1, 4))
    assert one.identity == four.identity
    assert one.revision != four.revision


# ---- what the folder says


def test_weights_keep_their_type_and_their_bits(tmp_path: Path) -> None:
    weights = weights_for(LLAMA_2)
    folder = convert_beside(write(tmp_path / "meta", LLAMA_2, weights, dtype=torch.bfloat16))
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert read_config(folder)["dtype"] == "bfloat16"
    down = stored["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(down, weights["layers.1.feed_forward.w2.weight"].bfloat16())
    assert sum(tensor.numel() for tensor in stored.values()) == sum(tensor.numel() for tensor in weights.values())


def test_large_models_are_written_in_several_files_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "meta", LLAMA_3, weights_for(LLAMA_3), parts=2)
    whole = load_file(convert_beside(source) / "model.safetensors")
    shutil.rmtree(tmp_path / "meta-converted")
    monkeypatch.setattr(meta_checkpoint, "_FILE_BYTES", 40_000)
    folder = resolve_model(str(source)).folder
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    parts = {file.name: load_file(file) for file in files}
    assert all(torch.equal(parts[index["weight_map"][name]][name], tensor) for name, tensor in whole.items())
    assert all(sum(tensor.nbytes for tensor in part.values()) <= 40_000 or len(part) == 1 for part in parts.values())
    assert torch.equal(load_model(folder).get_input_embeddings().weight, whole["model.embed_tokens.weight"])  # type: ignore[operator]


ROPE: dict[str, tuple[Params, bool, dict[str, Any], int, str]] = {
    "Llama 2": (LLAMA_2, False, {"rope_type": "default", "rope_theta": 10000.0}, 4096, ""),
    "Code Llama": (LLAMA_2 | {"rope_theta": 1e6}, False, {"rope_type": "default", "rope_theta": 1e6}, 16384, ""),
    "Llama 3": (LLAMA_3, False, {"rope_type": "default", "rope_theta": 500000.0}, 8192, ""),
    "Llama 3.1": (LLAMA_3_1, False, {"rope_type": "llama3", "factor": 8.0}, 131072, "scaled by 8, as in Llama 3.1"),
    "Llama 3.2": (LLAMA_3_1, True, {"factor": 32.0, "high_freq_factor": 4.0}, 131072, "scaled by 32, as in Llama 3.2"),
    "stated": (
        LLAMA_3_1 | {"rope_scaling_factor": 16, "rope_high_freq_factor": 2.0},
        True,
        {"factor": 16, "low_freq_factor": 1.0, "high_freq_factor": 2.0, "original_max_position_embeddings": 8192},
        131072,
        "",
    ),
}


@pytest.mark.parametrize("name", ROPE)
def test_positions_are_those_of_the_version_and_what_was_not_stated_is_reported(name: str, tmp_path: Path) -> None:
    params, tied, rope, context, words = ROPE[name]
    messages: list[str] = []
    config = read_config(convert_beside(write(tmp_path / "meta", params, weights_for(params, tied=tied)), messages))
    assert rope.items() <= config["rope_parameters"].items()
    assert config["max_position_embeddings"] == context
    assert (words in messages[0]) if words else messages == []


def test_an_output_layer_that_repeats_the_embedding_is_tied(tmp_path: Path) -> None:
    weights = weights_for(LLAMA_3_1, tied=True)
    left_out = convert_beside(write(tmp_path / "out", LLAMA_3_1, weights))
    again = weights | {"output.weight": weights["tok_embeddings.weight"]}
    for parts in (1, 2):
        repeated = convert_beside(write(tmp_path / f"again{parts}", LLAMA_3_1, again, parts=parts))
        assert read_config(repeated) == read_config(left_out)
        assert "lm_head.weight" not in load_file(repeated / "model.safetensors")
    other = convert_beside(write(tmp_path / "other", LLAMA_3_1, weights_for(LLAMA_3_1)))
    assert not read_config(other)["tie_word_embeddings"]
    assert "lm_head.weight" in load_file(other / "model.safetensors")


@pytest.mark.parametrize(("params", "stops"), [(LLAMA_2, [2]), (LLAMA_3, [275, 283]), (LLAMA_3_1, [275, 282, 283])])
def test_generation_stops_where_metas_does(params: Params, stops: list[int], tmp_path: Path) -> None:
    folder = convert_beside(write(tmp_path / "meta", params, weights_for(params)))
    generation = json.loads((folder / "generation_config.json").read_text("utf-8"))
    stated = generation["eos_token_id"]
    assert ([stated] if isinstance(stated, int) else stated) == stops
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_id == stops[0]
    assert generation["bos_token_id"] == tokenizer.bos_token_id == tokenizer("the world")["input_ids"][0]


# ---- as a model's base


def test_a_folder_is_converted_once_and_again_when_its_files_change(tmp_path: Path) -> None:
    source = write(tmp_path / "llama-tiny", LLAMA_2, weights_for(LLAMA_2))
    messages: list[str] = []
    first = resolve_model(str(source), progress=messages.append)
    assert messages == ["converting llama-tiny to safetensors, once"]
    assert resolve_model(str(source), progress=messages.append) == first
    assert len(messages) == 1
    assert first.folder.parent == tmp_path / "cache" / "models"
    moved = Path(shutil.move(source, tmp_path / "moved"))
    assert resolve_model(str(moved)).identity == first.identity
    write(moved, LLAMA_2 | {"norm_eps": 1e-6}, weights_for(LLAMA_2))
    changed = resolve_model(str(moved))
    assert changed.revision != first.revision
    assert read_config(changed.folder)["rms_norm_eps"] == 1e-6


def test_a_folder_in_both_layouts_is_used_as_it_is(tmp_path: Path) -> None:
    source = write(tmp_path / "meta", LLAMA_2, weights_for(LLAMA_2))
    folder = convert_beside(source)
    assert is_meta_checkpoint(source)
    assert not is_meta_checkpoint(folder)
    for path in source.iterdir():
        shutil.copy(path, folder)
    assert not is_meta_checkpoint(folder)
    assert resolve_model(str(folder)).folder == folder


def test_licences_travel_and_the_tokenizer_may_lie_above_as_the_download_leaves_it(tmp_path: Path) -> None:
    source = write(tmp_path / "llama" / "llama-2-7b", LLAMA_2, weights_for(LLAMA_2))
    shutil.move(source / "tokenizer.model", source.parent)
    (source.parent / "LICENSE").write_text("terms")
    (source.parent / "USE_POLICY.md").write_text("uses")
    resolved = resolve_model(str(source))
    assert [(path.name, path.parent) for path in resolved.licence_files] == [
        ("LICENSE", resolved.folder),
        ("USE_POLICY.md", resolved.folder),
    ]
    assert load_tokenizer(resolved.folder).convert_ids_to_tokens([259]) == ["▁t"]


def test_a_recipe_with_such_a_base_runs_to_the_end(tmp_path: Path) -> None:
    write(tmp_path / "llama", LLAMA_3_1, weights_for(LLAMA_3_1, tied=True), parts=2, dtype=torch.bfloat16)
    write_rows(tmp_path / "rows.jsonl", 12)
    (tmp_path / "r.toml").write_text(
        'name = "tiny"\n[model]\nbase = "llama"\ntemplate = "llama-3.1"\n[data]\nmax_length = 256\n'
        '[[data.sources]]\npath = "rows.jsonl"\n[data.split]\nvalidation = 0.2\ntest = 0.2\n'
        "[[train]]\nsteps = 2\nbatch_size = 2\n[train.lora]\nrank = 2\n"
        "[evaluate]\nloss_rows = 2\nanswer_rows = 1\n[answer]\nmax_tokens = 2\n"
    )
    done = corral("run", tmp_path / "r.toml", "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["stages"].values()) == {"done"}
    merged = read_config(tmp_path / "run/train-1-sft/merged")
    assert merged["tie_word_embeddings"]
    assert merged["rope_parameters"]["factor"] == 32.0


# ---- what is refused


def change(folder: Path, name: str, edit: Callable[[dict[str, Any]], object]) -> None:
    table = torch.load(folder / name, weights_only=True)
    edit(table)
    torch.save(table, folder / name)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def state(**params: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "params.json").write_text(json.dumps(LLAMA_3 | params))


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran-code"),)


def evil(folder: Path) -> None:
    with open(folder / "consolidated.00.pth", "wb") as file:
        torch.save({"layers": _Evil()}, file)


def bare_pickle(folder: Path) -> None:
    (folder / "consolidated.00.pth").write_bytes(pickle.dumps({"tok_embeddings.weight": _Evil()}))


FIRST, SECOND = "consolidated.00.pth", "consolidated.01.pth"
WQ, WK = "layers.0.attention.wq.weight", "layers.1.attention.wk.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut in half": (lambda f: cut(f / SECOND, 20_000), "part is cut short or damaged"),
    "empty": (lambda f: cut(f / FIRST, 0), "part is cut short or damaged"),
    "its last byte lost": (lambda f: cut(f / FIRST, (f / FIRST).stat().st_size - 1), "part is cut short or damaged"),
    "the last part missing": (
        lambda f: (f / SECOND).unlink(),
        "part consolidated.01.pth is missing: consolidated.00.pth is",
    ),
    "the first part missing": (lambda f: (f / FIRST).unlink(), "part consolidated.00.pth is missing"),
    "no part": (lambda f: [(f / name).unlink() for name in (FIRST, SECOND)], "part consolidated.00.pth is missing"),
    "code": (evil, "holds code or objects besides tensors, which corral does not run"),
    "code in a bare pickle": (bare_pickle, "part is"),
    "a list": (lambda f: torch.save([torch.ones(2)], f / FIRST), "no table of tensors: there are none"),
    "a number": (lambda f: change(f, FIRST, lambda t: t.update(x=3)), "no table of tensors: 'x' is none"),
    "no params.json": (lambda f: (f / "params.json").unlink(), "no params.json"),
    "nonsense in params.json": (lambda f: (f / "params.json").write_text("{}"), "does not say dim"),
    "experts": (state(moe_args={"top_k": 1}), "says moe_args"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "no tokenizer.model"),
    "a broken tokenizer": (lambda f: cut(f / "tokenizer.model", 100), "tokenizer.model cannot be used"),
    "a smaller tokenizer": (
        lambda f: (f / "tokenizer.model").write_bytes(tiny_tokenizer(LLAMA_3).partition(b"d29ybGQ= ")[0]),
        "vocab_size is 530 in params.json, and the tokenizer has 526 tokens",
    ),
    "another model's tokenizer": (
        lambda f: (f / "tokenizer.model").write_bytes(sentencepiece(llama_2_pieces(WORDS))),
        "vocab_size is 530",
    ),
    "a tensor lost": (lambda f: change(f, SECOND, lambda t: t.pop(WK)), f"lacks {WK}"),
    "the output lost": (
        lambda f: [change(f, name, lambda t: t.pop("output.weight")) for name in (FIRST, SECOND)],
        "lacks output.weight",
    ),
    "the embedding lost": (
        lambda f: change(f, FIRST, lambda t: t.pop("tok_embeddings.weight")),
        "lacks tok_embeddings",
    ),
    "a tensor too many": (
        lambda f: change(f, FIRST, lambda t: t.update(bias=torch.ones(1))),
        "does not ask for (bias)",
    ),
    "fewer layers stated": (state(n_layers=1), "9 tensors that params.json does not ask for (layers.1"),
    "more layers stated": (state(n_layers=2**31), "lacks layers.2.attention_norm.weight"),
    "another width": (
        state(ffn_dim_multiplier=2),
        "layers.0.feed_forward.w1.weight has shape [56, 32], and params.json asks for [176, 32] in 2 parts",
    ),
    "other heads": (
        state(n_kv_heads=4),
        "layers.0.attention.wk.weight has shape [8, 32], and params.json asks for [32, 32]",
    ),
    "quantised": (
        lambda f: change(f, FIRST, lambda t: t.update({WQ: t[WQ].to(torch.int8)})),
        f"quantised ({WQ} as int8)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_or_foreign_checkpoint_is_refused_with_one_clear_error(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "meta", LLAMA_3, weights_for(LLAMA_3), parts=2)
    damage, message = FAULTS[fault]
    damage(source)
    with pytest.raises(ModelError) as caught:
        resolve_model(str(source))
    assert message in caught.value.what
    assert "\n" not in caught.value.what
    assert str(source) in (caught.value.where or "")
    assert caught.value.hint
    assert not Path("ran-code").exists(), "code was run"
    left = [path for path in (tmp_path / "cache" / "models").glob("*") if path.suffix != ".lock"]
    assert left == [], "nothing half-made is kept"


def test_memory_stays_flat_however_large_the_checkpoint(tmp_path: Path) -> None:
    params = LLAMA_3 | {"dim": 1024, "n_layers": 6, "n_heads": 8, "multiple_of": 256}
    one = weights_for(params | {"n_layers": 1})
    weights = {name: tensor.bfloat16() for name, tensor in one.items()}
    for i in range(1, params["n_layers"]):
        weights |= {n.replace("layers.0", f"layers.{i}"): t for n, t in weights.items() if n.startswith("layers.0.")}
    source = tmp_path / "meta"
    source.mkdir()
    (source / "params.json").write_text(json.dumps(params))
    (source / "tokenizer.model").write_bytes(tiny_tokenizer(params))
    torch.save({name: tensor.clone() for name, tensor in weights.items()}, source / "consolidated.00.pth")
    size = (source / "consolidated.00.pth").stat().st_size
    code = (
        "import resource, sys; from pathlib import Path; from corral.model import meta_checkpoint as m\n"
        "import torch, transformers, safetensors.torch; from transformers import LlamaConfig, PreTrainedTokenizerFast\n"
        "def peak(): return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "m._FILE_BYTES = 2**24; before = peak()\n"
        "m.convert(Path(sys.argv[1]), Path(sys.argv[2]), print); print(peak() - before)"
    )
    (tmp_path / "out").mkdir()
    done = run_python("-c", code, source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert size > 150 * 2**20
    assert int(done.stdout) < 4 * 2**24, "a few times one file, whatever the size of all"
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert written > 0.99 * size
