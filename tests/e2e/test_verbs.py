"""The other verbs, as a user calls them; and every command that the README shows."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from corral.cli import parser
from tests.e2e.conftest import corral

ROOT = Path(__file__).parent.parent.parent
VERBS = (
    "init",
    "run",
    "plan",
    "inspect",
    "evaluate",
    "compare",
    "report",
    "export",
    "verify",
    "chat",
    "batch",
    "serve",
    "keys",
    "assets",
    "cache",
)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_with_an_example_that_parses(verb: str) -> None:
    done = corral(verb, "--help")
    assert done.returncode == 0
    example = re.search(r"example: corral (.*)", " ".join(done.stdout.split()))
    assert example
    assert parser().parse_args(shlex.split(example[1])).verb == verb


def commands_in(text: str) -> list[str]:
    """Commands in blocks, torchrun's too, and in running text where nothing in them stands for several."""
    blocks = re.findall(r"```\w*\n(.*?)```", text.replace("\\\n", " "), re.S)
    lines = [line.split("#")[0].removeprefix(".venv/bin/").strip() for block in blocks for line in block.splitlines()]
    lines = [re.sub(r"^.*torchrun .*? -m corral ", "corral ", line) for line in lines]
    running = re.findall(r"`(corral [a-z]+ [^`|]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return [command for command in (*lines, *(" ".join(c.split()) for c in running)) if command.startswith("corral ")]


PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))


@pytest.mark.parametrize("page", PAGES)
def test_every_corral_command_in_the_documentation_parses(page: str) -> None:
    for command in commands_in((ROOT / page).read_text("utf-8")):
        verb = parser().parse_args(shlex.split(command.removeprefix("corral "))).verb
        assert verb in VERBS


def test_commands_in_the_documentation_are_found() -> None:
    found = [len(commands_in((ROOT / page).read_text("utf-8"))) for page in PAGES]
    assert sum(found) >= 30
    assert found[PAGES.index("README.md")] >= 10


def test_every_make_command_in_the_readme_is_a_target() -> None:
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    makes = {line.split()[1] for block in blocks for line in block.splitlines() if line.startswith("make ")}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert makes == {"demo", "test"} <= targets


def test_init_writes_a_recipe_that_runs_on_the_users_rows(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    done = corral("init", "mine.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shutil.copy(finished / "rows.jsonl", tmp_path / "rows.jsonl")
    settings = (f"model.base={tiny_folder}", "train.0.epochs=0.1", "data.split.test=0.2", "data.split.validation=0.2")
    sets = [part for s in settings for part in ("--set", s)]
    assert corral("run", "mine.toml", *sets, cwd=tmp_path).returncode == 0
    assert (tmp_path / "runs/mine/report/index.html").is_file()
    again = corral("init", "mine.toml", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists" in again.stderr


def test_inspect_shows_rows_in_the_terminal_and_as_a_page(finished: Path, tmp_path: Path) -> None:
    page = tmp_path / "rows.html"
    done = corral("inspect", finished / "r.toml", "--rows", 1, "--html", page)
    assert done.returncode == 0, done.stderr
    assert "What is" in done.stdout
    assert "What is" in re.sub(r"<[^>]+>", "", page.read_text("utf-8"))


def test_a_plan_that_does_not_fit_names_what_to_change_and_has_exit_code_4(
    finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    large = tmp_path / "large"  # an 8B model's sizes, without its weights
    shutil.copytree(tiny_folder, large, ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = json.loads((large / "config.json").read_text()) | sizes | {"num_key_value_heads": 8, "head_dim": 128}
    (large / "config.json").write_text(json.dumps(config | {"vocab_size": 128256}))
    arguments = ("plan", finished / "r.toml", "--set", f"model.base={large}", "--device", "t4")
    refused = corral(*arguments, cwd=tmp_path)
    assert refused.returncode == 4, refused.stderr
    assert "--set train.0.quantization=nf4" in refused.stdout
    assert "does not fit" in refused.stderr
    assert "Traceback" not in refused.stderr
    done = corral(*arguments, "--set", "train.0.quantization=nf4", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "fits"
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
    unknown = corral("plan", finished / "r.toml", "--device", "abacus")
    assert unknown.returncode == 2
    assert "abacus" in unknown.stderr


def test_evaluate_again_with_other_settings(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    done = corral("evaluate", run, "--set", "evaluate.loss_rows=4", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["variants"]["tuned"]["metrics"]["loss"]["n"] == 4
    refused = corral("evaluate", run, "--set", "train.0.steps=1")
    assert refused.returncode == 2
    impossible = corral("evaluate", run, "--set", "answer.max_tokens=9000")
    assert impossible.returncode == 2, impossible.stderr
    assert "9000" in impossible.stderr
    (run / "merge/model/config.json").unlink()
    unfinished = corral("evaluate", run)
    assert unfinished.returncode == 2
    assert "'merge'" in unfinished.stderr


def test_a_package_that_is_not_installed_is_named_with_exit_code_3(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from corral import cli

    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["report", str(run)]) == 3
    assert "'matplotlib" in capsys.readouterr().err


def test_compare_sets_two_runs_side_by_side(finished: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(finished / "run", tmp_path / "other"))
    done = corral("compare", other, finished / "run", "--json")
    assert done.returncode == 0, done.stderr
    for comparison in json.loads(done.stdout)["comparisons"]:
        assert comparison["difference"] == 0
        assert comparison["p"] == 1
    assert corral("compare", other, finished / "run").stdout.count("Held-out loss") == 1


def test_report_is_written_again(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    assert corral("report", run).returncode == 0
    before = (run / "report/index.html").read_bytes()
    shutil.rmtree(run / "report")
    assert corral("report", run).returncode == 0
    assert (run / "report/index.html").read_bytes() == before


@pytest.mark.parametrize("end", ["exit\n", "QUIT\n", ""])
def test_chat_answers_keeps_the_conversation_and_ends(end: str, finished: Path) -> None:
    options = ("--max-tokens", 8, "--temperature", 0)
    once = corral("chat", finished / "run", *options, input=f"What is 3 plus 3?\n{end}")
    assert once.returncode == 0, once.stderr
    twice = corral("chat", finished / "run", *options, input=f"What is 3 plus 3?\n\nAnd again?\n{end}")
    first, second = twice.stdout.splitlines()[:2]
    assert first == once.stdout.splitlines()[0]
    alone = corral("chat", finished / "run", *options, input=f"And again?\n{end}")
    assert second != alone.stdout.splitlines()[0], "the second answer depends on the first turn"


def test_cache_and_assets_list_as_json() -> None:
    names = {a["name"] for a in json.loads(corral("assets", "--json").stdout)["assets"]}
    assert {"smollm2-135m-instruct", "wikibooks-recipes"} <= names
    assert "entries" in json.loads(corral("cache", "--json").stdout)
