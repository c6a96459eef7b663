"""Served ≡ trained with a system prompt: the ids of prompts, wherever the model goes, are those that were trained."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from corral.answering.open_model import open_model
from corral.cli import main
from corral.data.prepare import Prepared
from corral.engines.transformers import TransformersEngine
from corral.export.export import export_form
from corral.export_forms import ExportForm
from corral.messages import Conversation
from corral.model.naming import ModelFiles, find_model_files
from corral.progress import Progress
from corral.recipe import parse
from corral.run.directory import Run
from corral.serving.models import ServedModel
from tests.conftest import RECIPE, build_once
from tests.export.modelfile import read_modelfile
from tests.forked import corral
from tests.serving.conftest import CHAT, call, serve_in_thread

SYSTEM = 'You are "Ada".\nAnswer {{ briefly }} — 東京 🙂'
OWN = "You are somebody else."


@pytest.fixture(scope="module")
def run(tiny_folder: Path, shared_folder: Path) -> Path:
    """A finished run with a system prompt, of rows of which every fourth has its own."""

    def build(folder: Path) -> None:
        rows = [
            {
                "messages": [
                    *([{"role": "system", "content": OWN}] if i % 4 == 0 else []),
                    {"role": "user", "content": f"What is {i} plus {i}?"},
                    {"role": "assistant", "content": f"{2 * i}."},
                ]
            }
            for i in range(60)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = RECIPE.format(model=tiny_folder).replace(
            "[data]", f"[data]\nsystem = {json.dumps(SYSTEM, ensure_ascii=False)}"
        )
        (folder / "r.toml").write_text(recipe.replace("steps = 8", "steps = 2").replace("_rows = 12", "_rows = 4"))
        done = corral("run", folder / "r.toml", "--out", folder / "run")
        assert done.returncode == 0, done.stderr

    return build_once(shared_folder / "with-system", build) / "run"


@pytest.fixture(scope="module")
def trained(run: Path) -> list[tuple[Conversation, list[int]]]:
    """(the prompt as its row has it, the ids of it that were trained) of two training rows: without and with a system
    message of its own."""
    found: dict[str, tuple[Conversation, list[int]]] = {}
    train = Prepared.open(run / "prepare").train
    for example in (train[i] for i in range(len(train))):
        (sequence,) = example.sequences
        assert isinstance(example.record, Conversation)
        prompt, _ = example.record.split_answer()
        found.setdefault(prompt.messages[0].role, (prompt, list(sequence.ids[: sequence.trained.index(True)])))
    return [found["user"], found["system"]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids of every prompt that an engine is given."""
    prompts: list[list[int]] = []
    submit = TransformersEngine.submit

    def record(engine: TransformersEngine, ids: Sequence[int], sampling: Any) -> Any:
        prompts.append(list(ids))
        return submit(engine, ids, sampling)

    monkeypatch.setattr(TransformersEngine, "submit", record)
    return prompts


def test_training_rows_have_it_or_their_own(run: Path, trained: list[Any]) -> None:
    decode = find_model_files(str(run)).load_template().tokenizer.decode
    (_, without), (_, with_own) = trained
    assert decode(without).startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nWhat is ")
    assert decode(with_own).startswith(f"<|im_start|>system\n{OWN}<|im_end|>\n<|im_start|>user\nWhat is ")


def test_the_server_asks_as_was_trained(run: Path, trained: list[Any], asked: list[list[int]]) -> None:
    opened = open_model(str(run), "transformers")
    with serve_in_thread(ServedModel(opened.answerer, "ada")) as url:
        for prompt, ids in trained:
            body = {"model": "ada", **prompt.to_json(), "max_tokens": 2}
            status, answer, _ = call(url, "POST", CHAT, body)
            assert (status, asked.pop(), answer["usage"]["prompt_tokens"]) == (200, ids, len(ids))


def test_a_batch_asks_as_was_trained(run: Path, trained: list[Any], asked: list[list[int]], tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p.to_json()) + "\n" for p, _ in trained))
    command = ("batch", run, tmp_path / "prompts.jsonl", "--out", tmp_path / "a.jsonl", "--engine", "transformers")
    assert main([*map(str, command)]) == 0
    assert sorted(asked) == sorted(ids for _, ids in trained)


def test_a_chat_asks_as_was_trained(
    run: Path, trained: list[Any], asked: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt, ids), (_, with_own) = trained
    for options in ([], ["--system", OWN]):
        monkeypatch.setattr("sys.stdin", io.StringIO(prompt.messages[-1].content + "\n"))
        assert main(["chat", str(run), "--engine", "transformers", *options]) == 0
    assert asked[0] == ids
    assert asked[1] != ids
    assert asked[1][:20] == with_own[:20]


def test_an_evaluation_asks_all_variants_as_was_trained(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "evaluate/completions.jsonl").read_text().splitlines()]
    test = Prepared.open(run / "prepare").test
    lengths = {e.key: e.sequences[0].trained.index(True) for e in (test[i] for i in range(len(test)))}
    assert {row["variant"] for row in rows} == {"base", "tuned"}
    for row in rows:
        assert row["prompt_tokens"] == lengths[row["id"]]


@pytest.mark.parametrize("moved", [False, True])
def test_an_adapter_carries_it(moved: bool, run: Path, trained: list[Any], tmp_path: Path) -> None:
    adapter = run / "train-1-sft" / "adapter"
    if moved:
        adapter = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    template = find_model_files(str(adapter)).load_template()
    assert [template.prompt(prompt) for prompt, _ in trained] == [ids for _, ids in trained]
    assert main(["merge", str(adapter), "--out", str(tmp_path / "merged")]) == 0
    merged = find_model_files(str(tmp_path / "merged")).load_template()
    assert merged.digest == template.digest


def test_plain_transformers_asks_as_was_trained(run: Path, trained: list[Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for folder in (Run(run).model, run / "train-1-sft" / "adapter"):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        for prompt, ids in trained:
            messages = prompt.to_json()["messages"]
            assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids


def test_llama_cpp_and_ollama_ask_as_was_trained(
    run: Path, trained: list[Any], tmp_path: Path, llama: Callable[..., Any]
) -> None:
    path = export_form(Run(run).model, tmp_path, ExportForm("gguf", "f16"), Progress())
    program = llama(path)
    assert [program.chat_ids(prompt) for prompt, _ in trained] == [ids for _, ids in trained]
    commands = read_modelfile((tmp_path / "Modelfile-f16").read_text("utf-8"))
    assert ("system", SYSTEM) in commands
    (template,) = (value for name, value in commands if name == "template")
    assert "Ada" not in template, "Ollama puts the message of SYSTEM before the others itself"


def test_openvino_asks_as_was_trained(run: Path, trained: list[Any], tmp_path: Path) -> None:
    genai: Any = pytest.importorskip("openvino_genai")
    folder = export_form(Run(run).model, tmp_path, ExportForm("openvino", "f32"), Progress())
    tokenizer = genai.Tokenizer(folder)
    for prompt, ids in trained:
        text = tokenizer.apply_chat_template(prompt.to_json()["messages"], add_generation_prompt=True)
        assert tokenizer.encode(text, add_special_tokens=False).input_ids.data[0].tolist() == ids


@pytest.mark.parametrize("given", [None, "Another."])
def test_a_recipe_on_the_model_keeps_its_system_message_or_replaces_it(given: str | None, run: Path) -> None:
    text = RECIPE.format(model=Run(run).model)
    recipe = parse(text.replace("[data]", f"[data]\nsystem = {json.dumps(given)}") if given else text, where="r.toml")
    template = ModelFiles(Run(run).model, None, recipe).load_template()
    text = template.tokenizer.decode(template.prompt(Conversation.from_turns(("user", "a"))))
    assert text.startswith(f"<|im_start|>system\n{given or SYSTEM}<|im_end|>\n<|im_start|>user\na")
