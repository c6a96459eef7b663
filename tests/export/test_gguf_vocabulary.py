from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.assets import fetch
from corral.errors import ModelError
from corral.export.gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, read_vocabulary
from corral.template import Template
from corral.template.template import shipped_templates
from tests.conftest import change_json

STOPS = (2,)
LLAMA2 = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def save_llama_2(folder: Path, change: Callable[[dict[str, Any]], object] = lambda state: None, **config: Any) -> Path:
    """Meta's tokenizer of Llama 2, changed."""
    folder.mkdir()
    shutil.copy(fetch("llama-2-tokenizer").files[0], folder / "tokenizer.json")
    change_json(folder / "tokenizer.json", change)
    (folder / "tokenizer_config.json").write_text(json.dumps(LLAMA2 | config), "utf-8")
    return folder


def save_byte_level(
    folder: Path, tokenizer: Any, change: Callable[[dict[str, Any]], object] = lambda state: None
) -> Path:
    tokenizer.save_pretrained(folder)
    change_json(folder / "tokenizer.json", change)
    return folder


def move_first_merge_of_several(state: dict[str, Any]) -> None:
    """Move the first merge of a token that has several to the end."""
    merges = state["model"]["merges"]
    tokens = [m.replace(" ", "") for m in merges]
    merges.append(merges.pop(next(i for i in range(len(tokens)) if tokens[i] == tokens[i + 1])))


def metaspace(scheme: str) -> Callable[[dict[str, Any]], None]:
    rule = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return lambda state: state.update(normalizer=None, pre_tokenizer=rule)


def test_llama_2_has_scores_and_types_as_in_sentencepiece(tmp_path: Path) -> None:
    words = read_vocabulary(save_llama_2(tmp_path / "t"), 32000, STOPS)
    assert (words.model, words.pre, words.add_space_prefix, words.add_bos, words.add_eos) == (
        "llama",
        "default",
        True,
        True,
        False,
    )
    assert words.types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert words.types[258:260] == [BYTE, NORMAL]
    assert words.scores[260:263] == [0.0, -1.0, -2.0]
    assert words.merges == []
    assert words.ids == {"bos": 1, "eos": 2, "unknown": 0}


@pytest.mark.parametrize(
    ("scheme", "template", "prefix"),
    [("never", None, False), ("first", "{{ bos_token }}{{ messages[0]['content'] }}", False)],
)
def test_metaspace_is_written_where_a_chat_has_the_same_ids(
    scheme: str, template: str | None, prefix: bool, tmp_path: Path
) -> None:
    more = {"chat_template": template} if template else {}
    assert (
        read_vocabulary(save_llama_2(tmp_path / "t", metaspace(scheme), **more), 32000, STOPS).add_space_prefix
        is prefix
    )


SENTENCEPIECE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a space before the first text only": (metaspace("first"), "it prepares text by"),
    "a space unless there is one": (metaspace("always"), "it prepares text by"),
    "lower case": (lambda s: s.update(normalizer={"type": "Lowercase"}), "it prepares text by"),
    "a byte without a token": (
        lambda s: s["model"]["vocab"].pop("<0x0A>"),
        "no token for the byte <0x0A>",
    ),
    "a merge that is missing": (
        lambda s: s["model"]["merges"].remove("▁ t"),
        "'▁t' could be made from '▁' and 't'",
    ),
    "merges in a mixed order": (move_first_merge_of_several, "do not follow one another"),
    "two texts of one token": (
        lambda s: s["model"]["vocab"].update({"[PAD32001]": 32002}),
        "'[PAD32001]' is there under two ids",
    ),
}


@pytest.mark.parametrize("fault", SENTENCEPIECE)
def test_a_sentencepiece_tokenizer_is_refused_for(fault: str, tmp_path: Path) -> None:
    change, words = SENTENCEPIECE[fault]
    with pytest.raises(ModelError) as caught:
        read_vocabulary(save_llama_2(tmp_path / "t", change), 32003, STOPS)
    assert words in caught.value.what
    assert caught.value.where
    assert caught.value.hint


def test_added_tokens_that_are_not_special_are_user_defined(tiny_tokenizer: Any, tmp_path: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        state["added_tokens"].append({**state["added_tokens"][0], "id": 400, "content": "<tool>", "special": False})

    words = read_vocabulary(save_byte_level(tmp_path / "t", tiny_tokenizer, change), 401, STOPS)
    assert (words.tokens[400], words.types[400]) == ("<tool>", USER_DEFINED)
    assert words.types[:4] == [CONTROL] * 3 + [NORMAL]


def test_ignored_merges_are_written_only_where_they_change_nothing(tiny_tokenizer: Any, tmp_path: Path) -> None:
    ignoring = save_byte_level(tmp_path / "a", tiny_tokenizer, lambda s: s["model"].update(ignore_merges=True))
    assert read_vocabulary(ignoring, 400, STOPS).pre == "gpt-2"

    def unreachable(state: dict[str, Any]) -> None:
        state["model"]["ignore_merges"] = True
        state["model"]["merges"].pop()

    with pytest.raises(ModelError, match="ignore_merges is True"):
        read_vocabulary(save_byte_level(tmp_path / "b", tiny_tokenizer, unreachable), 400, STOPS)


def test_of_several_chat_templates_the_default_one_is_written(tmp_path: Path) -> None:
    several = [{"name": "rag", "template": "{{ 1 }}"}, {"name": "default", "template": "{{ messages[0]['content'] }}"}]
    assert (
        read_vocabulary(save_llama_2(tmp_path / "a", chat_template=several), 32000, STOPS).chat_template
        == several[1]["template"]
    )
    with pytest.raises(ModelError, match="several chat templates, rag, and none is called default"):
        read_vocabulary(save_llama_2(tmp_path / "b", chat_template=several[:1]), 32000, STOPS)


def test_a_bos_token_is_added_only_where_the_template_writes_one(tmp_path: Path) -> None:
    with_it = save_llama_2(tmp_path / "a", chat_template="{{ bos_token }}{{ messages[0]['content'] }}")
    without = save_llama_2(tmp_path / "b", chat_template="{{ messages[0]['content'] }}")
    assert read_vocabulary(with_it, 32000, STOPS).add_bos
    assert not read_vocabulary(without, 32000, STOPS).add_bos


def test_generation_markers_are_taken_out_of_the_template(tiny_tokenizer: Any, tmp_path: Path) -> None:
    template = Template.load(tiny_tokenizer, "chatml")
    folder = save_byte_level(tmp_path / "t", tiny_tokenizer)
    (folder / "chat_template.jinja").write_text(shipped_templates()["chatml"], "utf-8")
    assert "{% generation %}" in (folder / "chat_template.jinja").read_text("utf-8")
    assert read_vocabulary(folder, 400, STOPS).chat_template == template.source


def test_a_template_that_cannot_be_rendered_is_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    folder = save_byte_level(tmp_path / "t", tiny_tokenizer)
    (folder / "chat_template.jinja").write_text("{{ nothing.at.all }}", "utf-8")
    with pytest.raises(ModelError, match="cannot be rendered") as caught:
        read_vocabulary(folder, 400, STOPS)
    assert str(folder / "chat_template.jinja") == caught.value.where
