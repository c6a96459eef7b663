"""A valid recipe reads back as itself; an invalid one is refused with key, value and next step."""

from __future__ import annotations

from pathlib import Path

import pytest

from corral import recipe
from corral.errors import RecipeError
from corral.recipe import reference
from corral.template.template import shipped_templates

ROOT = Path(__file__).parent.parent.parent
GOOD = """
name = "a"
[model]
base = "asset:smollm2-135m-instruct"
[[data.sources]]
path = "rows.jsonl"
[[train]]
steps = 3
"""


def test_every_recipe_that_ships_is_valid() -> None:
    paths = [*sorted((ROOT / "recipes").glob("*.toml")), ROOT / "corral" / "recipe" / "starter.toml"]
    assert len(paths) >= 2
    for path in paths:
        recipe.load(path)


def test_a_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(GOOD)
    loaded = recipe.load(tmp_path / "r.toml")
    assert recipe.parse(loaded.to_toml(), where="x") == loaded
    assert loaded.data.sources[0].path == str(tmp_path / "rows.jsonl")
    assert loaded.data.sources[0].label == "rows.jsonl"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("steps = 3", "stepz = 3"), "train.0.stepz (line 8): unknown key; did you mean 'steps'?"),
        (("steps = 3", 'steps = "many"'), "train.0.steps (line 8)"),
        (("steps = 3", "steps = 0"), "greater than 0"),
        (("steps = 3", "steps = 3\nepochs = 2"), "`epochs` = 2 and `steps` = 3 cannot both be given"),
        (("steps = 3", "steps = 3\npack_length = 100"), "`train.0.pack_length` = 100 is less than `data.max_length`"),
        (("[[train]]", "[data.split]\ntest = 0.6\nvalidation = 0.4\n[[train]]"), "nothing is left to train on"),
        (('base = "asset:smollm2-135m-instruct"', ""), "model.base: missing"),
        (('name = "a"', 'name = "a/b"'), "name (line 2)"),
        (("[[train]]\nsteps = 3", ""), "train: missing"),
        (('path = "rows.jsonl"', 'path = "r.jsonl"\n[[data.sources]]\npath = "r.jsonl"'), "two sources are called"),
        (
            ('path = "rows.jsonl"', 'path = "r.jsonl"\nweight = 2\n[[data.sources]]\npath = "s.jsonl"'),
            "'r.jsonl' has a `weight` and 's.jsonl' has none: give every source one, or remove it",
        ),
        (('path = "rows.jsonl"', 'path = "rows.jsonl"\nweight = 0'), "data.sources.0.weight (line 7)"),
        (("steps = 3", "steps = nan"), "train.0.steps"),
        (("[[data", '[data]\nsystem = " "\n[[data'), "the system message is blank: write one, or remove the setting"),
        (
            ("steps = 3", 'steps = 3\n[train.lora]\ntargets = "q_proj"'),
            'train.0.lora.targets (line 10): a list is needed here, in brackets: ["q_proj"]; or ',
        ),
        (("[[train]]", "[data.split]\ntest = 0\n[[train]]"), "`data.split.test` is 0"),
        (
            ("[[data", "template_variables = { bos_token = 'x' }\n[[data"),
            "model.template_variables (line 5): 'bos_token' is given to every template by corral itself",
        ),
        (("[[data", "template_variables = { level = [1] }\n[[data"), "model.template_variables.level"),
        (("[[data", "template_variables = { level = inf }\n[[data"), "model.template_variables.level"),
    ],
)
def test_each_fault_names_its_key_and_what_to_do(change: tuple[str, str], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.parse(GOOD.replace(*change), where="r.toml")
    assert expected in str(caught.value)
    assert "r.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [('method = "full"', '`train.0.method` is "full"'), ("[train.lora]\nrank = 4", "remove `train.0.lora`")],
)
def test_an_adapter_is_trained_further_as_it_is(stage: str, expected: str, tmp_path: Path) -> None:
    text = GOOD.replace("[[data", 'adapter = "mine"\n[[data')
    assert load_text(tmp_path, text).model.adapter == str(tmp_path / "mine")
    with pytest.raises(RecipeError) as caught:
        load_text(tmp_path, f"{text}{stage}\n")
    assert expected in str(caught.value)


def test_all_faults_are_listed_at_once() -> None:
    text = GOOD.replace("steps = 3", 'steps = "x"\nbatch_size = -1\nfoo = 1')
    with pytest.raises(RecipeError) as caught:
        recipe.parse(text, where="r.toml")
    assert str(caught.value).count("train.0.") == 3


def test_broken_toml_names_the_line() -> None:
    with pytest.raises(RecipeError, match="line 3"):
        recipe.parse('name = "a"\n[model]\nbase = \n', where="r.toml")


def test_a_missing_or_binary_recipe_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no recipe"):
        recipe.load(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        recipe.load(tmp_path / "binary.toml")


def test_a_recipe_written_on_windows_is_read(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert recipe.load(tmp_path / "r.toml").model_dump() == load_text(tmp_path, GOOD).model_dump()
    (tmp_path / "wide.toml").write_bytes(GOOD.encode("utf-16"))
    with pytest.raises(RecipeError, match="UTF-16") as caught:
        recipe.load(tmp_path / "wide.toml")
    assert "save it as UTF-8" in str(caught.value)


def load_text(folder: Path, text: str) -> recipe.Recipe:
    (folder / "plain.toml").write_text(text)
    return recipe.load(folder / "plain.toml")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (r"C:\models\tiny", "'C:\\models\\tiny'; or write it with /: \"C:/models/tiny\""),
        (r"C:\\models\data", "'C:\\models\\data'"),  # one backslash escaped, and the other not
        (r"C:\Users\me", "'C:\\Users\\me'"),
        (r"C:\temp\new", "model.base (line 4): 'C:\\temp\\new' holds a tab"),  # valid TOML: a tab and a line break
    ],
)
def test_a_path_with_backslashes_is_refused_with_the_way_to_write_it(path: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.parse(GOOD.replace("asset:smollm2-135m-instruct", path), where="r.toml")
    assert expected in str(caught.value)
    assert "single quotes" in str(caught.value)
    in_single_quotes = GOOD.replace('"asset:smollm2-135m-instruct"', f"'{path}'")
    assert recipe.parse(in_single_quotes, where="r.toml").model.base == path


def test_template_variables_keep_their_types_and_can_be_overridden() -> None:
    table = "template_variables = { thinking = true, level = 1, share = 1.0, style = '1' }\n[[data"
    loaded = recipe.parse(GOOD.replace("[[data", table), where="x", overrides=["model.template_variables.level=2"])
    assert repr(loaded.model.template_variables) == "{'thinking': True, 'level': 2, 'share': 1.0, 'style': '1'}"
    assert recipe.parse(loaded.to_toml(), where="x") == loaded


def test_a_recipe_to_look_at_needs_no_training_stage() -> None:
    loaded = recipe.parse(GOOD.replace("[[train]]\nsteps = 3", ""), where="x", stages_required=False)
    assert loaded.train == (recipe.Train(),)
    assert recipe.parse(GOOD, where="x", stages_required=False) == recipe.parse(GOOD, where="x")


def test_set_overrides_nested_settings_and_list_entries() -> None:
    loaded = recipe.parse(
        GOOD,
        where="x",
        overrides=["train.0.optimizer.lr=1e-5", "data.max_length=64", "name=b", "model.template=chatml"],
    )
    assert loaded.train[0].optimizer.lr == 1e-5
    assert (loaded.data.max_length, loaded.name, loaded.model.template) == (64, "b", "chatml")


@pytest.mark.parametrize("override", ["train.7.steps=1", "nonsense", "train.x.steps=1", "name.first=1", "=3"])
def test_an_override_of_no_setting_is_refused(override: str) -> None:
    with pytest.raises(RecipeError):
        recipe.parse(GOOD, where="x", overrides=[override])


def test_the_reference_in_docs_is_up_to_date_and_names_every_setting() -> None:
    written = (ROOT / "docs" / "recipe.md").read_text("utf-8")
    assert written == reference.reference(), "run `make docs`"
    assert "| – |  |" not in written, "a setting has no documentation"
    assert all(f"`{name}`" in (recipe.Model.model_fields["template"].description or "") for name in shipped_templates())
