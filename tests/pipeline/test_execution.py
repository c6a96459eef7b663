"""A recipe's stages, taken in order: what is redone and what is not, here and in a run that was carried elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from corral import recipe as recipes
from corral.cli import main
from corral.data.prepare import Prepared
from corral.errors import (
    CorralError,
    DataError,
    GateError,
    InputError,
    MissingExtraError,
    ModelError,
    RunError,
    StorageError,
)
from corral.messages import Conversation
from corral.model.folder import model_identity
from corral.pipeline import execution
from corral.pipeline.train_stage import TrainStage
from corral.progress import Progress
from corral.report.write import write_report
from corral.run.directory import Run
from corral.run.promotion import read_promotion
from corral.run.stage_record import StageFolder
from tests.conftest import change_json, write_rows, write_workspace

pytestmark = pytest.mark.usefixtures("unrendered")


class Said(Progress):
    """Progress that keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def said() -> Said:
    return Said()


def execute(run: Path, *settings: str, said: Progress | None = None, **options: Any) -> list[str]:
    """The stages that were run for the recipe beside a run directory, with other settings."""
    recipe = recipes.load(run.parent / "r.toml", settings)
    outcome = execution.execute(recipe, run, said or Progress(), **options)
    return [name for name, what in outcome.items() if what == "done"]


def add_to_recipe(run: Path, text: str) -> None:
    path = run.parent / "r.toml"
    path.write_text(path.read_text() + text)


SHORT = '\n[[train]]\nname = "{name}"\n{settings}\nsteps = 2\nbatch_size = 4\n[train.lora]\nrank = 2\n'


def test_a_run_without_its_raw_rows_and_base_is_evaluated_exported_and_not_trained_again(
    run_copy: Path, tiny_folder: Path, said: Said
) -> None:
    (run_copy.parent / "rows.jsonl").unlink()
    model = shutil.copytree(tiny_folder, run_copy.parent / "models" / tiny_folder.name)
    gone = [f'model.base="{model}"']
    assert execute(run_copy, *gone, said=said) == [], "an equal base elsewhere is no other base"
    assert any("rows.jsonl cannot be read here" in line for line in said.lines)
    shutil.rmtree(model)
    assert execute(run_copy, *gone) == [], "the base is known by what the run recorded"
    with pytest.raises(DataError, match="there is no file"):
        execute(run_copy, *gone, redo=["prepare"])
    assert execute(run_copy, *gone) == [], "what cannot be made again is left as it is"
    recipe = Run(run_copy).recipe.with_export("gguf", "f16")
    execution.execute(recipe, run_copy, Progress(), allowed=("export", "report"))
    assert (run_copy / "export" / "model-f16.gguf").is_file()


def test_moved_and_renamed_rows_train_nothing_again_and_other_rows_do(run_copy: Path) -> None:
    rows = run_copy.parent / "rows.jsonl"
    rows.rename(run_copy.parent / "elsewhere.jsonl")
    moved = ['data.sources=[{path="elsewhere.jsonl", name="sums"}]']
    assert execute(run_copy, *moved) == []
    write_rows(run_copy.parent / "elsewhere.jsonl", 81)
    assert execute(run_copy, *moved) == ["prepare", "train-1-sft", "evaluate", "report"]


def test_rows_that_are_prepared_again_and_come_out_the_same_train_nothing_again(run_copy: Path) -> None:
    trained = (run_copy / "train-1-sft" / "stage.json").read_bytes()
    assert execute(run_copy, "data.max_loss=0.9") == ["prepare", "report"], "the same rows came out"
    assert (run_copy / "train-1-sft" / "stage.json").read_bytes() == trained


def test_another_system_prompt_or_template_file_trains_again_also_if_no_row_shows_it(run_copy: Path) -> None:
    rows = [json.loads(line) for line in (run_copy.parent / "rows.jsonl").read_text().splitlines()]
    own = {"role": "system", "content": "Mine."}
    lines = [json.dumps({"messages": [own, *row["messages"]]}) + "\n" for row in rows]
    (run_copy.parent / "rows.jsonl").write_text("".join(lines))
    execute(run_copy, "data.system=One")
    before = Prepared.open(run_copy / "prepare").digest("train")
    assert "train-1-sft" in execute(run_copy, "data.system=Two")
    assert Prepared.open(run_copy / "prepare").digest("train") == before
    assert "Two" in (Run(run_copy).model / "chat_template.jinja").read_text()


def test_another_version_trains_nothing_again_and_says_how_to(run_copy: Path, said: Said) -> None:
    for stage in ("prepare", "train-1-sft", "evaluate", "report"):
        change_json(run_copy / stage / "stage.json", corral="0.0.1")
    assert execute(run_copy, said=said) == []
    assert any("train-1-sft was made by corral 0.0.1 and stays" in line for line in said.lines)


def test_a_setting_that_is_new_in_this_version_changes_nothing_until_it_is_given(run_copy: Path) -> None:
    def forget(record: dict[str, Any]) -> None:
        del record["inputs"]["train"]["early_stopping"]

    change_json(run_copy / "train-1-sft" / "stage.json", forget)
    assert execute(run_copy) == []
    assert "train-1-sft" in execute(run_copy, "train.0.early_stopping=2")


def test_a_run_of_an_older_format_keeps_its_training_and_its_model_and_is_evaluated_again(run_copy: Path) -> None:
    for stage in ("prepare", "train-1-sft", "evaluate", "report"):
        change_json(run_copy / stage / "stage.json", lambda record: record.pop("format"))
    (run_copy / "merge").mkdir()
    shutil.copytree(run_copy / "train-1-sft" / "merged", run_copy / "merge" / "model")
    (run_copy / "train-1-sft" / "merged" / "contract.json").unlink()
    (run_copy / "model").unlink()
    change_json(run_copy / "train-1-sft" / "stage.json", sizes={})
    assert execute(run_copy, "seed=9", "evaluate.loss_rows=5") == ["evaluate", "report"]
    card = json.loads((run_copy / "evaluate" / "scorecard.json").read_text())
    assert card["variants"]["tuned"]["metrics"]["loss"]["n"] == 5
    assert Run(run_copy).model == run_copy / "merge" / "model"


def test_redo_runs_a_stage_and_what_depends_on_it_and_nothing_else(run_copy: Path) -> None:
    before = {stage: (run_copy / stage / "stage.json").read_text() for stage in ("prepare", "train-1-sft")}
    assert execute(run_copy, redo=["train-1-sft"]) == ["train-1-sft", "evaluate", "report"]
    assert (run_copy / "prepare" / "stage.json").read_text() == before["prepare"]
    again = json.loads((run_copy / "train-1-sft" / "stage.json").read_text())
    assert again["attempt"] == 2
    assert again["fingerprint"] != json.loads(before["train-1-sft"])["fingerprint"], (
        "its rows are not taken for the new ones"
    )
    assert execute(run_copy) == []
    measured = (run_copy / "evaluate" / "seconds.jsonl").read_text()
    assert execute(run_copy, redo=["evaluate"]) == ["evaluate", "report"]
    assert (run_copy / "evaluate" / "seconds.jsonl").read_text() != measured, "nothing is taken over"
    with pytest.raises(InputError, match="the recipe has no stage 'merge'"):
        execute(run_copy, redo=["merge"])


def test_the_run_stands_for_the_old_model_until_the_new_one_is_finished(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = model_identity(Run(run_copy).model)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("corral.export.contract.certify_merged", stop)
        with pytest.raises(KeyboardInterrupt):
            execute(run_copy, "train.0.optimizer.lr=1e-3")
    assert Run(run_copy).model.parent.parent == run_copy / "superseded"
    assert model_identity(Run(run_copy).model) == old
    page = write_report(run_copy).read_text("utf-8")
    assert "evaluate is not shown: it was made from an earlier train-1-sft" in page
    assert "still answer with the earlier model" in page
    assert "Held-out loss" not in page
    assert main(["compare", str(run_copy), f"{run_copy}:base"]) == 0
    assert "are not of its run's present state" in capsys.readouterr().out.replace("’", "'")
    execute(run_copy, "train.0.optimizer.lr=1e-3")
    assert Run(run_copy).model == run_copy / "train-1-sft" / "merged"
    assert model_identity(Run(run_copy).model) != old
    execute(run_copy)
    assert model_identity(Run(run_copy).model) == old, "with the old settings the old model is back"
    promotion = read_promotion(run_copy)
    assert promotion is not None
    assert promotion.reason


def test_stages_start_side_by_side_from_the_base_and_each_can_be_a_variant(run_copy: Path) -> None:
    add_to_recipe(run_copy, SHORT.format(name="low", settings='from = "base"\nseed = 5'))
    add_to_recipe(run_copy, SHORT.format(name="again", settings='from = "low"'))
    add_to_recipe(run_copy, '[[evaluate.variants]]\nname = "first"\nmodel = "train-1-sft"\n')
    add_to_recipe(run_copy, '[[evaluate.variants]]\nname = "second"\nmodel = "low"\nagainst = "first"\n')
    assert execute(run_copy) == ["train-2-low", "train-3-again", "evaluate", "report"]
    stages = {n: json.loads((run_copy / n / "stage.json").read_text()) for n in ("train-2-low", "train-3-again")}
    assert stages["train-2-low"]["inputs"]["base"]
    assert list(stages["train-3-again"]["inputs"]["stages"]) == ["train-2-low"]
    assert Run(run_copy).model == run_copy / "train-3-again" / "merged"
    card = json.loads((run_copy / "evaluate" / "scorecard.json").read_text())
    losses = {name: variant["metrics"]["loss"]["mean"] for name, variant in card["variants"].items()}
    assert len(set(losses.values())) == len(losses) == 4
    pairs = {(c["a"], c["b"]) for c in card["comparisons"] if c["metric"] == "loss"}
    assert {("tuned", "base"), ("first", "tuned"), ("second", "first")} <= pairs
    assert execute(run_copy, "train.1.seed=6") == ["train-2-low", "train-3-again", "evaluate", "report"]


def test_a_stage_that_fails_its_gate_holds_up_those_that_start_from_it_and_no_sibling(
    run_copy: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_second(stage: TrainStage, folder: StageFolder) -> GateError | None:
        # What makes a gate fail is tested with real preferences in tests/e2e/test_alignment.py.
        return GateError(f"{folder.name} is blocked") if stage.number == 2 else None

    monkeypatch.setattr(TrainStage, "gate_error", fail_second)
    add_to_recipe(run_copy, SHORT.format(name="low", settings='from = "train-1-sft"'))
    with pytest.raises(GateError, match="train-2-low is blocked"):
        execute(run_copy, said=said)
    promotion = read_promotion(run_copy)
    assert promotion is not None
    assert (promotion.stage, promotion.instead_of) == ("train-1-sft", "train-2-low")
    assert any("the run stands for the model of train-1-sft, which train-2-low started from" in s for s in said.lines)
    add_to_recipe(run_copy, SHORT.format(name="next", settings='from = "train-1-sft"'))
    with pytest.raises(GateError, match="train-2-low is blocked"):
        execute(run_copy, 'train.2.from="low"')
    assert execute(run_copy, said=said) == ["train-3-next", "evaluate", "report"]
    assert "train-2-low is blocked; no other stage starts from it" in said.lines
    assert Run(run_copy).model == run_copy / "train-3-next" / "merged"


def test_a_run_is_evaluated_on_a_file_of_the_users_own_as_it_is(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run_copy.parent / "mine.csv"
    trained = Prepared.open(run_copy / "prepare").train[0].record
    assert isinstance(trained, Conversation)
    question, answer = (message.content for message in trained.messages)
    rows.write_text(
        f"question,answer\nWhat is the sum of 1 and 1?,2\nWhat is the sum of 1 and 1?,2\n{question},{answer}\n"
    )
    assert main(["evaluate", str(run_copy), "--test", str(rows)]) == 0
    assert "1 test row shares passages with rows that were trained on" in capsys.readouterr().err
    card = json.loads((run_copy / "evaluate" / "scorecard.json").read_text())
    assert card["variants"]["tuned"]["metrics"]["loss"]["n"] == 2, "copies are measured once"
    assert any("that were trained on" in caution for caution in card["cautions"])
    rows.unlink()
    assert main(["evaluate", str(run_copy)]) == 0, "what was measured stays without the file"
    assert main(["evaluate", str(run_copy), "--set", "evaluate.loss_rows=1"]) == 2
    assert "there is no file" in capsys.readouterr().err


def needs_of(run: Path, *settings: str) -> None:
    """Ask for what a new run needs; nothing may have begun when it fails."""
    write = run.parent / "new"
    execute_in = recipes.load(run.parent / "r.toml", settings)
    try:
        execution.execute(execute_in, write, Progress())
    finally:
        assert not (write / "prepare" / "rows").exists()


def test_what_is_missing_is_said_before_anything_begins(tmp_path: Path, tiny_folder: Path) -> None:
    write_workspace(tmp_path, tiny_folder)
    run = tmp_path / "run"
    with pytest.raises(InputError, match=r"4,096 tokens do not fit into the model's context of [\d,]+") as caught:
        needs_of(run, "data.max_length=4096")
    assert caught.value.where == "data.max_length"
    with pytest.raises(MissingExtraError, match="wandb"):
        needs_of(run, 'trackers=["wandb"]')
    with pytest.raises(MissingExtraError, match="vllm"):
        needs_of(run, 'evaluate.engine="vllm"')
    biased = shutil.copytree(tiny_folder, tmp_path / "biased")
    change_json(biased / "config.json", attention_bias=True)
    with pytest.raises(ModelError, match="attention_bias is True; a GGUF file"):
        needs_of(run, f'model.base="{biased}"', 'export.gguf=["f16"]')


def test_a_disk_that_is_too_small_is_said_before_anything_begins(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_workspace(tmp_path, tiny_folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 10**6))  # pyright: ignore
    with pytest.raises(StorageError, match=r"the disk has 1.00 MB free, and this run needs about"):
        needs_of(tmp_path / "run")


def test_a_removed_stage_and_a_removed_setting_are_changes(run_copy: Path) -> None:
    add_to_recipe(run_copy, SHORT.format(name="more", settings=""))
    variants = 'evaluate.variants=[{name="first", model="train-1-sft", answer={max_tokens=3}}]'
    execute(run_copy, variants)
    assert execute(run_copy, variants.replace("answer={max_tokens=3}", "answer={}")) == ["evaluate", "report"]

    def loss(variant: str) -> float:
        card = json.loads((run_copy / "evaluate" / "scorecard.json").read_text())
        return card["variants"][variant]["metrics"]["loss"]["mean"]

    first = loss("first")
    assert loss("tuned") != first
    write_workspace(run_copy.parent, Path(Run(run_copy).recipe.model.base))
    assert "evaluate" in execute(run_copy, variants)
    assert loss("tuned") == first, "the first stage is the last one now"


def test_another_file_or_base_that_is_not_there_is_an_error_and_changes_nothing(run_copy: Path) -> None:
    before = (run_copy / "recipe.toml").read_text()
    with pytest.raises(DataError, match=r"typo.jsonl"):
        execute(run_copy, 'data.sources=[{path="typo.jsonl"}]')
    with pytest.raises(ModelError, match="other"):
        execute(run_copy, 'model.base="/nowhere/other"')
    assert (run_copy / "recipe.toml").read_text() == before
    with pytest.raises(DataError, match=r"missing.jsonl"):
        execute(run_copy, 'evaluate.test={path="missing.jsonl"}', "train.0.optimizer.lr=1e-4")
    with pytest.raises(MissingExtraError, match="vllm"):
        execute(run_copy, "train.0.optimizer.lr=1e-4", 'evaluate.engine="vllm"')
    with pytest.raises(InputError, match="tokens do not fit"):
        execute(run_copy, "data.max_length=4096")
    assert (run_copy / "recipe.toml").read_text() == before
    assert execute(run_copy) == []


def test_a_broken_template_is_an_error_and_not_taken_for_a_missing_base(run_copy: Path) -> None:
    with pytest.raises(CorralError, match="chatmll"):
        execute(run_copy, 'model.template="chatmll"')
    assert execute(run_copy) == []


def test_superseded_stages_come_back_without_being_asked_for_what_they_need(
    run_copy: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(run_copy, "train.0.optimizer.lr=1e-3")
    monkeypatch.setattr(TrainStage, "needs", lambda _: pytest.fail("it is finished"))
    assert execute(run_copy, said=said) == []
    assert any("train-1-sft is brought back" in line for line in said.lines)


def test_exports_need_no_evaluation(run_copy: Path) -> None:
    shutil.rmtree(run_copy / "evaluate")
    recipe = Run(run_copy).recipe.with_export("gguf", "f16")
    outcome = execution.execute(recipe, run_copy, Progress(), allowed=("export", "report"))
    assert outcome == {"prepare": "skipped", "train-1-sft": "skipped", "export": "done", "report": "done"}


def test_a_stage_made_again_twice_has_three_fingerprints(run_copy: Path) -> None:
    def fingerprint() -> str:
        return json.loads((run_copy / "evaluate" / "stage.json").read_text())["fingerprint"]

    seen = [fingerprint()]
    execute(run_copy, redo=["evaluate"])
    seen.append(fingerprint())
    execute(run_copy, "evaluate.loss_rows=5")
    execute(run_copy, redo=["evaluate"])
    seen.append(fingerprint())
    assert len(set(seen)) == 3


def test_a_damaged_pointer_is_written_again(run_copy: Path) -> None:
    (run_copy / "model").write_text("{")
    assert execute(run_copy) == []
    assert Run(run_copy).model == run_copy / "train-1-sft" / "merged"


def test_a_stage_that_may_not_run_now_must_be_finished(run_copy: Path) -> None:
    (run_copy / "train-1-sft" / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match="the stage 'train-1-sft' of this run is not finished"):
        execute(run_copy, allowed=("evaluate", "report"))


def names(stages: Sequence[execution.Stage]) -> list[str]:
    return [stage.name for stage in stages]


def test_exports_come_before_the_evaluation_only_if_it_measures_them(finished_run: Path) -> None:
    from corral.interrupts import Interrupts
    from corral.pipeline.context import RunContext

    def order(*settings: str) -> list[str]:
        recipe = recipes.load(finished_run.parent / "r.toml", settings)
        return names(execution.stages(RunContext(Run(finished_run), recipe, Progress(), Interrupts())))

    variant = 'evaluate.variants=[{name="small", model="gguf-f16"}]'
    assert order('export.gguf=["f16"]') == ["prepare", "train-1-sft", "evaluate", "export", "report"]
    assert order(variant) == ["prepare", "train-1-sft", "export", "evaluate", "report"]
