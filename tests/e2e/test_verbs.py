"""The other commands of the command line, and every command that the documentation shows."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from corral.cli import main, parser
from tests.conftest import change_json
from tests.e2e.conftest import fail, succeed
from tests.forked import corral

ROOT = Path(__file__).parent.parent.parent
VERB_NAMES = "init run plan inspect evaluate compare report rows merge export verify chat batch serve keys assets cache"
VERBS = VERB_NAMES.split()


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_with_an_example_that_parses(verb: str) -> None:
    example = re.search(r"example: corral (.*)", " ".join(succeed(verb, "--help").stdout.split()))
    assert example
    assert parser().parse_args(shlex.split(example[1])).verb == verb


def commands_in(text: str) -> list[str]:
    """The corral commands in code blocks, also those under torchrun, and in running text unless they are patterns."""
    blocks = re.findall(r"```\w*\n(.*?)```", text.replace("\\\n", " "), re.S)
    lines = [line.split("#")[0].removeprefix(".venv/bin/").strip() for block in blocks for line in block.splitlines()]
    lines = [re.sub(r"^.*torchrun .*? -m corral ", "corral ", line) for line in lines]
    inline = re.findall(r"`(corral [a-z]+ [^`|]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return [command for command in (*lines, *(" ".join(c.split()) for c in inline)) if command.startswith("corral ")]


PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))


@pytest.mark.parametrize("page", PAGES)
def test_every_corral_command_in_the_documentation_parses(page: str) -> None:
    for command in commands_in((ROOT / page).read_text("utf-8")):
        verb = parser().parse_args(shlex.split(command.removeprefix("corral "))).verb
        assert verb in VERBS


def test_commands_in_the_documentation_are_found() -> None:
    counts = [len(commands_in((ROOT / page).read_text("utf-8"))) for page in PAGES]
    assert sum(counts) >= 30
    assert counts[PAGES.index("README.md")] >= 10


def test_every_make_command_in_the_readme_is_a_target() -> None:
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    makes = {line.split()[1] for block in blocks for line in block.splitlines() if line.startswith("make ")}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert makes == {"demo", "test"} <= targets


def test_init_writes_a_recipe_that_runs_on_the_users_rows(workspace: Path, tiny_folder: Path) -> None:
    succeed("init", "mine.toml", cwd=workspace)
    settings = (f"model.base={tiny_folder}", "train.0.epochs=0.1", "data.split.test=0.2", "data.split.validation=0.2")
    settings = (*settings, "data.max_length=256")
    sets = [part for s in settings for part in ("--set", s)]
    succeed("run", "mine.toml", *sets, cwd=workspace)
    assert (workspace / "runs/mine/report/index.html").is_file()
    fail(2, ["exists"], "init", "mine.toml", cwd=workspace)


def test_rows_are_written_from_documents_and_what_gives_none_is_reported(tmp_path: Path) -> None:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies/leave.md").write_text("# Leave\n\n## May I rest?\n\nTen days.\n\n## Contact\n\nAsk.\n")
    (tmp_path / "policies/broken.pdf").write_bytes(b"%PDF-1.7\nnothing")
    printed = succeed("rows", "policies", "--out", "rows.jsonl", cwd=tmp_path).stdout
    assert "1 × its heading is no question: leave.md › Contact" in printed
    assert "broken.pdf" in printed
    row = json.loads((tmp_path / "rows.jsonl").read_text("utf-8"))
    assert (row["question"], row["answer"], row["chapter"]) == ("May I rest?", "Ten days.", "Leave")
    assert row["passages"][0]["document"] == "leave.md"


def test_documents_without_a_question_are_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Only text.")
    fail(2, ["no question", "a.txt", "question mark"], "rows", "a.txt", "--out", "rows.jsonl", cwd=tmp_path)
    fail(2, ["no file or folder 'b.txt'", "did you mean 'a.txt'"], "rows", "b.txt", "--out", "r.jsonl", cwd=tmp_path)
    fail(2, ["'.png' is no kind of document"], "rows", picture(tmp_path), "--out", "r.jsonl", cwd=tmp_path)
    assert not list(tmp_path.glob("*.jsonl"))


def picture(folder: Path) -> str:
    (folder / "a.png").write_bytes(b"PNG")
    return "a.png"


def test_inspect_shows_rows_in_the_terminal_and_as_a_page(workspace: Path) -> None:
    page = workspace / "rows.html"
    assert "What is" in succeed("inspect", workspace / "r.toml", "--rows", 1, "--html", page).stdout
    assert "What is" in re.sub(r"<[^>]+>", "", page.read_text("utf-8"))


def test_inspect_needs_no_training_stage_and_run_does(workspace: Path) -> None:
    before, _, rest = (workspace / "r.toml").read_text().partition("[[train]]")
    (workspace / "r.toml").write_text(before + rest[rest.index("[evaluate]") :])
    done = succeed("inspect", workspace / "r.toml", "--json")
    assert json.loads(done.stdout)["ledger"]["fates"]["kept"] == 80
    fail(2, ["train: missing"], "run", workspace / "r.toml", "--out", workspace / "run")


def test_a_plan_that_does_not_fit_names_what_to_change_and_has_exit_code_4(
    workspace: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    large = tmp_path / "large"  # an 8B model's sizes, without its weights
    shutil.copytree(tiny_folder, large, ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    change_json(large / "config.json", **sizes, num_key_value_heads=8, head_dim=128, vocab_size=128256)
    arguments = ("plan", workspace / "r.toml", "--set", f"model.base={large}", "--device", "t4")
    (elsewhere := tmp_path / "elsewhere").mkdir()
    refused = fail(4, ["does not fit"], *arguments, cwd=elsewhere)
    assert "--set train.0.quantization=nf4" in refused.stdout
    done = succeed(*arguments, "--set", "train.0.quantization=nf4", "--json", cwd=elsewhere)
    assert json.loads(done.stdout)["verdict"] == "fits"
    assert not list(elsewhere.iterdir())
    fail(2, ["abacus"], "plan", workspace / "r.toml", "--device", "abacus")


def test_evaluate_repeats_with_other_settings_of_evaluation_only(run_copy: Path) -> None:
    done = succeed("evaluate", run_copy, "--set", "evaluate.loss_rows=4", "--json")
    assert json.loads(done.stdout)["variants"]["tuned"]["metrics"]["loss"]["n"] == 4
    fail(2, [], "evaluate", run_copy, "--set", "train.0.steps=1")
    fail(2, ["9,000"], "evaluate", run_copy, "--set", "answer.max_tokens=9000")
    (run_copy / "train-1-sft/merged/config.json").unlink()
    fail(2, ["'train-1-sft' of this run is not finished"], "evaluate", run_copy)


def test_a_package_that_is_not_installed_is_named_with_exit_code_3(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(run_copy)]) == 3
    assert "'matplotlib" in capsys.readouterr().err


def test_compare_shows_two_runs_side_by_side(finished_run: Path, run_copy: Path) -> None:
    done = succeed("compare", run_copy, finished_run, "--json")
    for comparison in json.loads(done.stdout)["comparisons"]:
        assert comparison["difference"] == 0
        assert comparison["p"] == 1
    assert corral("compare", run_copy, finished_run).stdout.count("Held-out loss ↓") == 1


def test_the_report_is_the_same_when_it_is_written_again(run_copy: Path) -> None:
    succeed("report", run_copy)
    before = (run_copy / "report/index.html").read_bytes()
    shutil.rmtree(run_copy / "report")
    succeed("report", run_copy)
    assert (run_copy / "report/index.html").read_bytes() == before


@pytest.mark.parametrize("end", ["exit\n", "QUIT\n", ""])
def test_chat_answers_keeps_the_conversation_and_ends(end: str, finished_run: Path) -> None:
    options = ("--max-tokens", 8, "--temperature", 0)
    once, twice, alone = (
        succeed("chat", finished_run, *options, input=f"{questions}\n{end}").stdout.splitlines()
        for questions in ("What is 3 plus 3?", "What is 3 plus 3?\n\nAnd again?", "And again?")
    )
    assert twice[0] == once[0]
    assert twice[1] != alone[0], "the second answer depends on the first question"


def test_cache_and_assets_list_as_json() -> None:
    names = {a["name"] for a in json.loads(corral("assets", "--json").stdout)["assets"]}
    assert {"smollm2-135m-instruct", "wikibooks-recipes"} <= names
    assert "entries" in json.loads(corral("cache", "--json").stdout)
