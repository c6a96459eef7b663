"""Models that a user names are opened as Answerers with a name and an identity."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from corral.answering.open_model import OpenedModel, open_model
from corral.engines.base import Engine, Sampling
from corral.engines.registry import LocalEngine
from corral.errors import InputError, ModelError
from corral.messages import Conversation
from corral.model.loading import load_model, load_tokenizer
from corral.model.naming import find_adapter_to_train, find_model_files
from tests.engines.tiny import write_adapter
from tests.model.tiny import write_by_peft

ASKED = Conversation.from_turns(("user", "Hello"))
RECIPE = """
name = "mine"
[model]
base = "{base}"
template = "chatml"
[[data.sources]]
path = "rows.jsonl"
[[train]]
[[train]]
quantization = "{quantization}"
"""


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model, on every layer, that plainly changes it."""
    return write_adapter(tiny_folder, tmp_path_factory.mktemp("adapter"))


def changed(adapter: Path, to: Path, **changes: Any) -> Path:
    """A copy of an adapter with another config."""
    copy = Path(shutil.copytree(adapter, to))
    config = copy / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return copy


def run_with(adapter: Path, base: Path, folder: Path, quantization: str = "none") -> Path:
    """A run whose second stage trained the adapter on what the first one merged, and was moved since."""
    folder.mkdir()
    (folder / "recipe.toml").write_text(RECIPE.format(base=base, quantization=quantization))
    shutil.copytree(base, folder / "train-1-sft" / "merged")
    moved = folder / "train-2-sft" / "adapter"
    changed(adapter, moved, base_model_name_or_path="/gone/train-1-sft/merged")
    return moved


def opened(folder: Path) -> OpenedModel:
    model = open_model(str(folder), "transformers")
    asyncio.run(model.answerer.engine.close())
    return model


async def answered(engine: Engine, ids: list[int]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Greedy ids and their log-probabilities."""
    async with engine:
        (done,) = await engine.submit(ids, Sampling(max_tokens=24, logprobs=True)).completions()
        return done.ids, done.logprobs or ()


async def test_a_folder_is_opened_under_its_name_and_answers(tiny_folder: Path) -> None:
    model = open_model(f"{tiny_folder}/", "transformers")
    async with model.answerer.engine:
        assert model.name == tiny_folder.name
        assert len((await model.answerer.answer(ASKED, Sampling(max_tokens=4))).completions[0].ids) <= 4


@pytest.mark.parametrize("engine", ["transformers", "openvino"])
async def test_an_answer_ends_at_each_token_that_the_generation_config_names(
    engine: LocalEngine, tiny_folder: Path, tmp_path: Path
) -> None:
    async def answer(folder: Path) -> Any:
        model = open_model(str(folder), engine)
        async with model.answerer.engine:
            return (await model.answerer.answer(ASKED, Sampling(max_tokens=6))).completions[0]

    whole = await answer(tiny_folder)
    end = whole.ids[3]
    copy = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    short = await answer(copy)
    assert (whole.finish, short.finish) == ("length", "stop")
    assert short.ids == whole.ids[: whole.ids.index(end)]


def test_the_identity_follows_weights_and_template_and_nothing_else(tiny_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    assert opened(copy).identity == opened(tiny_folder).identity
    template = copy / "chat_template.jinja"
    template.write_text("{# another #}" + template.read_text())
    assert opened(copy).identity.digest != opened(tiny_folder).identity.digest
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    assert opened(other).identity.digest != opened(tiny_folder).identity.digest


def test_a_missing_model_is_an_error() -> None:
    with pytest.raises(ModelError, match="nowhere"):
        open_model("nowhere")


def test_an_adapter_is_opened_on_its_base_and_answers_as_the_merged_model(adapter: Path, tiny_folder: Path) -> None:
    from corral.engines.transformers import TransformersEngine
    from corral.model import adapters, merging

    model = open_model(str(adapter))
    assert model.name == adapter.name
    assert model.answerer.engine.name == "transformers", "openvino, the default here, computes no adapters"
    ids = model.answerer.template.prompt(ASKED)
    unmerged = asyncio.run(answered(model.answerer.engine, ids))
    merged = merging.merge_adapter(adapters.load(load_model(tiny_folder), adapter))
    expected = asyncio.run(answered(TransformersEngine(merged), ids))
    assert unmerged[0] == expected[0]
    assert unmerged[1] == pytest.approx(expected[1], abs=1e-3)
    assert asyncio.run(answered(TransformersEngine(load_model(tiny_folder)), ids))[0] != expected[0]


def test_the_identity_of_an_adapter_follows_its_weights_and_settings(
    adapter: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    data = bytearray((adapter / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    other = changed(adapter, tmp_path / "other")
    (other / "adapter_model.safetensors").write_bytes(data)
    folders = (tiny_folder, adapter, other, changed(adapter, tmp_path / "stronger", lora_alpha=64))
    assert len({opened(folder).identity.digest for folder in folders}) == len(folders)
    assert opened(Path(shutil.copytree(adapter, tmp_path / "copy"))).identity.digest == opened(adapter).identity.digest


def test_an_adapter_in_a_run_that_was_moved_finds_the_runs_model_and_template(
    adapter: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    moved = run_with(adapter, tiny_folder, tmp_path / "run")
    (tmp_path / "run" / "train-1-sft" / "merged" / "chat_template.jinja").unlink()  # so it must be the recipe's
    files = find_model_files(str(moved))
    assert files.folder == tmp_path / "run" / "train-1-sft" / "merged"
    model = opened(moved)
    assert model.name == "mine-train-2-sft"
    assert model.answerer.template.name == "chatml"


def test_a_model_without_the_tokens_of_its_template_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    template = (folder / "chat_template.jinja").read_text("utf-8").replace("<|im_end|>", "<|done|>")
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|done|>"]})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"'<\|done\|>' with id 400, and the model's embedding has 400 rows"):
        opened(folder)


def test_an_adapter_in_a_run_has_the_template_variables_of_its_recipe(
    adapter: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    made = run_with(adapter, tiny_folder, tmp_path / "run")
    source = (tiny_folder / "chat_template.jinja").read_text("utf-8")
    (tmp_path / "run" / "polite.jinja").write_text("{{ opening }}" + source)
    text = (tmp_path / "run" / "recipe.toml").read_text()
    settings = f'template = "{tmp_path / "run" / "polite.jinja"}"\ntemplate_variables = {{ opening = "Please." }}'
    (tmp_path / "run" / "recipe.toml").write_text(text.replace('template = "chatml"', settings))
    template = opened(made).answerer.template
    assert template.decode(template.prompt(ASKED)).startswith("Please.user")


def test_an_adapter_trained_on_quantised_weights_is_refused(adapter: Path, tiny_folder: Path, tmp_path: Path) -> None:
    moved = run_with(adapter, tiny_folder, tmp_path / "run", quantization="nf4")
    with pytest.raises(ModelError, match="nf4") as caught:
        find_model_files(str(moved))
    assert str(moved.parent / "merged") in (caught.value.hint or "")


def test_an_adapter_is_trained_further_only_as_it_was_and_on_its_own_vocabulary(
    adapter: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    of_nf4 = str(run_with(adapter, tiny_folder, tmp_path / "run", quantization="nf4"))
    assert find_adapter_to_train(of_nf4, tiny_folder, "nf4").lora.rank == 16
    with pytest.raises(ModelError, match="nf4") as caught:
        find_adapter_to_train(of_nf4, tiny_folder, "none")
    assert (caught.value.where, caught.value.hint) == ("train.0.quantization", 'set it to "nf4"')
    resized = tmp_path / "resized"
    write_by_peft(resized, tiny_folder, load_model(tiny_folder), ids=[5, 6], resize=403)
    with pytest.raises(ModelError, match="vocabulary of 403, and its base has 400") as caught:
        find_adapter_to_train(str(resized), tiny_folder, "none")
    assert "corral merge" in (caught.value.hint or "")
    with pytest.raises(ModelError, match="is no adapter"):
        find_adapter_to_train(str(tiny_folder), tiny_folder, "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path"),
        ({"base_model_name_or_path": "/gone/base"}, "base model of the adapter: .*/gone/base"),
        ({"base_model_name_or_path": "nobody/nothing"}, "base model of the adapter: .*nobody/nothing"),
    ],
    ids=["kind", "no base", "base is gone", "base on the hub"],
)
def test_an_adapter_that_cannot_be_used_is_refused(
    adapter: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        find_model_files(str(changed(adapter, tmp_path / "adapter", **changes)))


def test_an_adapter_without_safe_weights_is_refused(adapter: Path, tmp_path: Path) -> None:
    copy = changed(adapter, tmp_path / "adapter")
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelError, match="cut short"):
        find_model_files(str(copy))
    weights.rename(copy / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        find_model_files(str(copy))


@pytest.mark.parametrize(("engine", "urls"), [("remote", ()), ("transformers", ("http://127.0.0.1:1/v1",))])
def test_only_the_remote_engine_takes_urls(tiny_folder: Path, engine: Any, urls: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=engine):
        open_model(str(tiny_folder), engine, urls=urls)


async def test_an_endpoint_computes_for_a_local_template_and_vocabulary(tiny_folder: Path) -> None:
    from corral.serving.models import ServedModel
    from tests.serving.conftest import serve_in_thread

    local = open_model(str(tiny_folder), "transformers")
    with serve_in_thread(ServedModel(local.answerer, "tiny")) as url:
        remote = open_model(str(tiny_folder), urls=[f"{url}/v1"])
        async with remote.answerer.engine:
            assert remote.answerer.engine.name == "remote"
            expected = await local.answerer.answer(ASKED, Sampling(max_tokens=8))
            assert (await remote.answerer.answer(ASKED, Sampling(max_tokens=8))).completions == expected.completions
        await local.answerer.engine.close()
    assert remote.identity.digest != local.identity.digest
