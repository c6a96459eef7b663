from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import openvino as ov
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from corral.engines.base import Completion, Sampling
from corral.engines.openvino import OpenVinoEngine
from corral.errors import ModelError
from corral.model import openvino_graph as writer
from corral.model.openvino_graph import MODEL_FILE, Precision, cached_form, stored_weight, write_model
from tests.conftest import change_json, run_python

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
CONTEXT = 512
ORIGINAL = 64
"""Length at which the scaled rotary embeddings were trained, far below that of TEXT."""
TOLERANCE = 2e-4
"""Nats, at most, between OpenVINO and transformers with equal weights; the largest seen is 1.5e-5."""
PLAIN = 0.1
"""What every planted fault exceeds; the mildest, another epsilon, is seen at 0.4."""
TEXT = torch.randint(0, 256, (230,), generator=torch.Generator().manual_seed(0)).tolist()
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 5e5}
LLAMA3 = PLAIN_ROPE | {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}


@dataclass(frozen=True)
class Family:
    """A kind of Llama. `unscaled`: its rotary parameters as a program that ignores the scaling would read them."""

    config: dict[str, Any]
    unscaled: dict[str, Any] | None = None


GQA = {"num_key_value_heads": 2}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3_2 = {"num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True}
FAMILIES = {
    "Llama 2": Family({"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "Llama 3": Family(GQA | {"rope_parameters": PLAIN_ROPE}),
    "Llama 3.1": Family(GQA | {"rope_parameters": LLAMA3 | {"factor": 8.0}}, PLAIN_ROPE),
    "Llama 3.2": Family(LLAMA3_2 | {"rope_parameters": LLAMA3 | {"factor": 32.0}}, PLAIN_ROPE),
    "linear": Family(GQA | {"rope_parameters": LINEAR}, PLAIN_ROPE | {"rope_theta": 1e4}),
    "YaRN": Family(GQA | {"rope_parameters": YARN}, PLAIN_ROPE | {"rope_theta": 1e4}),
    "biases": Family(GQA | {"attention_bias": True, "mlp_bias": True}),
    # 80 is no multiple of 32, 128 is: int4 for some matrices of a layer, int8 for the others.
    "odd width": Family({"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 1}),
}
FORMS = [
    *((name, precision) for name in ("Llama 2", "Llama 3", "Llama 3.1", "Llama 3.2") for precision in PRECISIONS),
    *((name, precision) for name in ("linear", "YaRN", "biases", "odd width") for precision in ("f32", "int4")),
]
SCALED = [name for name, family in FAMILIES.items() if family.unscaled]


def random_llama(name: str, **changes: Any) -> LlamaForCausalLM:
    """With weights of which each leaves its mark on the log-probabilities, norms and biases too."""
    settings: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(settings | FAMILIES[name].config | changes))).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        if not model.config.tie_word_embeddings:
            model.get_input_embeddings().weight.mul_(0.1)  # as small as trained ones, so that the norms' epsilon counts
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of each family, made once."""

    @cache
    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp("llama")
        random_llama(name).save_pretrained(path)
        return path

    return folder


def write(folder: Path, out: Path, precision: Precision) -> Path:
    out.mkdir(exist_ok=True)
    write_model(folder, out, precision)
    shutil.copyfile(folder / "config.json", out / "config.json")
    return out


def reference(name: str, precision: Precision, **changes: Any) -> LlamaForCausalLM:
    """transformers' model with the weights that the form is said to hold."""
    model = random_llama(name, **changes)
    weights = {key: torch.from_numpy(stored_weight(key, w.numpy(), precision)) for key, w in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model


def all_logprobs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """[length − 1, vocabulary]: row i is what follows the first i + 1 ids."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


def scores(model: Any, ids: Sequence[int]) -> list[float]:
    return all_logprobs(model, ids).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1).tolist()


def gap(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest difference; NaN where there is any."""
    return float(np.abs(np.subtract(a, b)).max())


def score_and_complete(
    form: Path, text: Sequence[int], sampling: Sampling | None = None
) -> tuple[list[float], Completion | None]:
    """Scores of a text, and a completion of its first 50 ids, by the engine."""

    async def work() -> tuple[list[float], Completion | None]:
        async with OpenVinoEngine(form, exact=True) as engine:
            scored = await engine.score(text)
            completions = await engine.submit(text[:50], sampling).completions() if sampling else [None]
            return scored, completions[0]

    return asyncio.run(work())


# ---- the form computes what transformers computes with the same weights


@pytest.mark.parametrize(("name", "precision"), FORMS)
def test_scores_and_greedy_completions_are_those_of_transformers(
    folders: Callable[[str], Path], tmp_path: Path, name: str, precision: Precision
) -> None:
    form = write(folders(name), tmp_path / "form", precision)
    scored, completion = score_and_complete(form, TEXT, Sampling(max_tokens=100, logprobs=True))
    model = reference(name, precision)
    expected = scores(model, TEXT)
    assert np.std(expected) > 1, "a model that prefers nothing proves nothing"
    assert gap(scored, expected) < TOLERANCE
    assert completion is not None
    assert completion.logprobs is not None
    table = all_logprobs(model, [*TEXT[:50], *completion.ids])[49:]
    chosen = table.gather(1, torch.tensor(completion.ids).unsqueeze(1)).squeeze(1)
    assert len(completion.ids) == 100
    assert gap(completion.logprobs, chosen.tolist()) < TOLERANCE
    assert gap(chosen.tolist(), table.max(1).values.tolist()) < TOLERANCE, "each id is the most likely one"


@pytest.mark.parametrize("name", SCALED)
def test_a_model_whose_scaling_is_ignored_is_plainly_another(name: str) -> None:
    unscaled = scores(reference(name, "f32", rope_parameters=FAMILIES[name].unscaled), TEXT)
    assert gap(scores(reference(name, "f32"), TEXT), unscaled) > 1


BATCH = [TEXT[:90], TEXT[100:150]]


def pad_on_the_left(texts: Sequence[list[int]]) -> tuple[Any, Any]:
    """[texts, longest] each: their ids, and a mask that is 0 for what was added."""
    pads = [max(map(len, texts)) - len(text) for text in texts]
    ids = np.array([[0] * pad + text for text, pad in zip(texts, pads, strict=True)])
    return ids, np.array([[0] * pad + [1] * len(text) for text, pad in zip(texts, pads, strict=True)])


@pytest.mark.parametrize("name", ["Llama 2", "Llama 3.1", "Llama 3.2"])
@pytest.mark.parametrize("precision", ["f32", "int4"])
def test_a_padded_batch_gives_each_text_the_logits_it_has_alone(
    folders: Callable[[str], Path], tmp_path: Path, name: str, precision: Precision
) -> None:
    """The graph as it is written, with keys and values as its state: no paged attention, which takes no mask."""
    form = write(folders(name), tmp_path / "form", precision)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    request = ov.Core().compile_model(form / MODEL_FILE, "CPU", exact).create_infer_request()
    model = reference(name, precision)
    expected = [all_logprobs(model, text) for text in BATCH]
    whole, mask = pad_on_the_left(BATCH)
    done = 0
    for new in (70, 1, 1, 17):  # a prompt, two ids that follow it, and several at once
        span = slice(done, done + new)
        done += new
        inputs = {
            "input_ids": whole[:, span],
            "attention_mask": mask[:, :done],
            "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, span],
            "beam_idx": np.arange(2, dtype=np.int32),
        }
        logits = torch.from_numpy(np.array(request.infer(inputs)["logits"])).log_softmax(-1)
        for row, (pad, alone) in enumerate(zip((0, 40), expected, strict=True)):
            first = max(span.start, pad)
            ours = logits[row, first - span.start :]
            assert (ours - alone[first - pad : done - pad]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["Llama 3.1", "Llama 3.2"])
def test_openvinos_own_pipeline_without_paged_attention_answers_a_padded_batch_as_transformers(
    folders: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    import openvino_genai

    form = write(folders(name), tmp_path / "form", "f32")
    exact = {"ATTENTION_BACKEND": "SDPA", "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    pipeline: Any = openvino_genai.LLMPipeline(str(form), "CPU", **exact)
    config: Any = openvino_genai.GenerationConfig(max_new_tokens=60, ignore_eos=True)
    config.set_eos_token_id(0)
    inputs = openvino_genai.TokenizedInputs(*map(ov.Tensor, pad_on_the_left(BATCH)))
    for text, answer in zip(BATCH, pipeline.generate(inputs, config).tokens, strict=True):
        assert len(answer) == 60
        table = all_logprobs(reference(name, "f32"), [*text, *answer])[len(text) - 1 :]
        chosen = table.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        assert gap(chosen.tolist(), table.max(1).values.tolist()) < TOLERANCE


# ---- planted faults


@contextmanager
def read_as(monkeypatch: pytest.MonkeyPatch, change: Callable[[Callable[[str], Any], str], Any]) -> Generator[None]:
    """Weights reach the graph as `change(read, name)` gives them."""
    original = writer._weights

    @contextmanager
    def changed(folder: Path) -> Generator[Callable[[str], Any]]:
        with original(folder) as read:
            yield lambda name: change(read, name)

    with monkeypatch.context() as patched:
        patched.setattr(writer, "_weights", changed)
        yield


def permuted(read: Callable[[str], Any], name: str) -> Any:
    """Rows of queries and keys as a GGUF file has them: pairs that turn together side by side."""
    weight = read(name)
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    return weight.reshape(-1, 2, 8, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def swapped(read: Callable[[str], Any], name: str) -> Any:
    other = {"k_proj": "v_proj", "v_proj": "k_proj"}
    return read(".".join(other.get(part, part) for part in name.split(".")))


def without_a_norm(read: Callable[[str], Any], name: str) -> Any:
    weight = read(name)
    return np.ones_like(weight) if name == "model.layers.1.post_attention_layernorm.weight" else weight


@pytest.mark.parametrize("change", [permuted, swapped, without_a_norm], ids=lambda change: change.__name__)
def test_weights_in_wrong_places_show_in_the_scores(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    with read_as(monkeypatch, change):
        form = write(folders("Llama 3.1"), tmp_path / "form", "f32")
    scored, _ = score_and_complete(form, TEXT)
    assert gap(scored, scores(reference("Llama 3.1", "f32"), TEXT)) > PLAIN


def test_a_rope_without_its_scaling_shows_in_the_scores(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = 5e5 ** -(np.arange(0, 16, 2, dtype=np.float32) / 16)
    monkeypatch.setattr(writer, "_rope", lambda config: (plain, 1.0))
    scored, _ = score_and_complete(write(folders("Llama 3.1"), tmp_path / "form", "f32"), TEXT)
    assert gap(scored, scores(reference("Llama 3.1", "f32"), TEXT)) > PLAIN
    unscaled = reference("Llama 3.1", "f32", rope_parameters=FAMILIES["Llama 3.1"].unscaled)
    assert gap(scored, scores(unscaled, TEXT)) < TOLERANCE, "it is this fault and no other"


def test_another_epsilon_of_the_norms_shows_in_the_scores(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders("Llama 2"), tmp_path / "llama"))
    change_json(folder / "config.json", rms_norm_eps=1e-6)
    scored, _ = score_and_complete(write(folder, tmp_path / "form", "f32"), TEXT)
    assert gap(scored, scores(reference("Llama 2", "f32"), TEXT)) > PLAIN


# ---- refusals


@pytest.fixture
def folder(folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a model that a test may damage, and an empty cache."""
    monkeypatch.setenv("CORRAL_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(folders("Llama 3"), tmp_path / "model"))


def change_weight(folder: Path, name: str, change: Callable[[Any], Any] | None) -> None:
    """Replace a weight, or drop it."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weight = weights.pop(name)
    save_file(weights | ({name: change(weight)} if change else {}), path, {"format": "pt"})


def put_into(weight: Any, value: float) -> Any:
    weight[3, 4] = value
    return weight


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
UP, KEYS = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"
OTHER_ENGINE = ["where: {folder}/config.json\n", 'engine = "transformers"']
# A change, precisions in which it is refused, parts of the error.
REFUSED: dict[str, tuple[Callable[[Path], None], Sequence[Precision], list[str]]] = {
    "frequencies that change with the length": (
        lambda f: change_json(f / "config.json", rope_parameters=DYNAMIC),
        ["f32"],
        ["'dynamic'", *OTHER_ENGINE],
    ),
    "another activation": (
        lambda f: change_json(f / "config.json", hidden_act="gelu"),
        ["f32"],
        ["'gelu'", *OTHER_ENGINE],
    ),
    "a missing weight": (lambda f: change_weight(f, UP, None), ["f32"], [UP, "where: {folder}\n"]),
    "a weight of another shape than the config says": (
        lambda f: change_weight(f, KEYS, lambda weight: weight[:16].clone()),
        PRECISIONS,
        [KEYS, "where: {folder}\n"],
    ),
    **{
        f"a weight that the form cannot hold, {value}": (
            lambda f, value=value: change_weight(f, KEYS, lambda weight: put_into(weight, value)),
            ["f16", "int8", "int4"],
            [KEYS],
        )
        for value in (float("nan"), float("inf"), 1e30)
    },
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_model_is_refused_for(fault: str, folder: Path, tmp_path: Path) -> None:
    change, precisions, words = REFUSED[fault]
    change(folder)
    for precision in precisions:
        with pytest.raises(ModelError) as caught:
            write_model(folder, tmp_path, precision)
        assert all(part.format(folder=folder) in f"{caught.value}\n" for part in words)


# ---- the cache


def count_writes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    written: list[Path] = []
    original = writer.write_model

    def counted(folder: Path, out: Path, precision: Precision) -> None:
        written.append(folder)
        original(folder, out, precision)

    monkeypatch.setattr(writer, "write_model", counted)
    return written


def test_a_folder_is_converted_once_and_equal_content_shares_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = count_writes(monkeypatch)
    form = cached_form(folder, "f32")
    assert cached_form(folder, "f32") == form
    twin = Path(shutil.copytree(folder, tmp_path / "twin"))
    assert cached_form(twin, "f32") == form
    assert written == [folder]
    assert cached_form(folder, "f16") != form
    change_json(twin / "config.json", rms_norm_eps=1e-3)
    assert cached_form(twin, "f32") != form
    assert written == [folder, folder, twin]
    assert {path.name for path in form.iterdir()} >= {MODEL_FILE, "openvino_model.bin", "config.json"}


def test_the_four_forms_used_last_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = count_writes(monkeypatch)
    forms: list[Path] = []
    for i, epsilon in enumerate((1e-3, 1e-4, 1e-5, 1e-6)):
        change_json(folder / "config.json", rms_norm_eps=epsilon)
        forms.append(cached_form(folder, "f16"))
        os.utime(forms[-1], (i, i))
    change_json(folder / "config.json", rms_norm_eps=1e-3)
    assert cached_form(folder, "f16") == forms[0], "used again, and so no longer the oldest"
    change_json(folder / "config.json", rms_norm_eps=1e-7)
    fifth = cached_form(folder, "f16")
    assert len(written) == 5
    kept = {path for path in fifth.parent.iterdir() if path.is_dir()}
    assert kept == {forms[0], forms[2], forms[3], fifth}


def test_a_killed_conversion_leaves_nothing_that_is_taken_for_whole(folder: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from corral.model import openvino_graph

def killed(model, path, **options):
    save(model, path, **options)
    os.kill(os.getpid(), signal.SIGKILL)

save, openvino_graph.ov.save_model = openvino_graph.ov.save_model, killed
openvino_graph.cached_form(Path(sys.argv[1]), "f32")
"""
    killed = run_python("-c", program, folder)
    assert killed.returncode == -signal.SIGKILL
    forms = Path(os.environ["CORRAL_CACHE"]) / "openvino"
    left = [path for path in forms.iterdir() if path.is_dir()]
    assert len(left) == 1
    assert (left[0] / MODEL_FILE).is_file(), "it was killed late enough to leave a whole model under another name"
    change_json(folder / "config.json", rms_norm_eps=1e-3)
    other = cached_form(folder, "f32")
    assert [path for path in forms.iterdir() if path.is_dir()] == [other], "what was left is cleared by the next"
    scored, _ = score_and_complete(other, TEXT[:40])
    assert len(scored) == 39
