"""What an adapter's files say: what is refused, which model it fits, its base, its vocabulary and its template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from corral.errors import ModelError
from corral.messages import Conversation
from corral.model import adapters, packed_forward
from corral.model.adapter_files import AdapterFiles, find_base_model
from corral.model.loading import load_model, load_tokenizer
from corral.model.naming import find_model_files
from tests.conftest import change_json, make_tiny_model
from tests.model.tiny import write_by_peft

ASKED = Conversation.from_turns(("user", "What is 2 + 2?"))
OWN = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] }}{% if m['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)


@pytest.fixture
def adapter(tiny_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    write_by_peft(folder, tiny_folder, load_model(tiny_folder), ids=[5, 6, 7])
    return folder


@pytest.mark.parametrize(
    ("changes", "message", "way_out"),
    [
        ({"peft_type": "LOHA"}, "LOHA", "merge it"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS", None),
        ({"alora_invocation_tokens": [5, 6]}, r"alora_invocation_tokens = \[5, 6\]", "merge it"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication", "merge it"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4", "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "loftq", "path_initial_model_for_weight_conversion"),
        ({"setting_of_a_later_peft": 7}, "setting_of_a_later_peft = 7", "merge it"),
    ],
)
def test_an_adapter_that_would_be_computed_otherwise_than_by_peft_is_refused(
    adapter: Path, changes: dict[str, Any], message: str, way_out: str | None
) -> None:
    change_json(adapter / "adapter_config.json", **changes)
    with pytest.raises(ModelError, match=message) as caught:
        AdapterFiles.read(adapter)
    assert caught.value.hint is None if way_out is None else way_out in (caught.value.hint or "")


def test_settings_of_a_later_peft_that_are_off_do_no_harm(adapter: Path) -> None:
    change_json(adapter / "adapter_config.json", later=None, even_later=False, last={}, qalora_group_size=16)
    AdapterFiles.read(adapter)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(adapter: Path) -> None:
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickle") as caught:
        AdapterFiles.read(adapter)
    assert "save_pretrained" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(0), r"q_proj.lora_A.weight is \[0\]"),
        ("model.layers.7.self_attn.q_proj.lora_A.weight", torch.zeros(4, 64), "no layer 'model.layers.7"),
        ("model.layers.0.self_attn.q_proj.base_layer.bias", torch.zeros(64), "q_proj' has no bias"),
        ("score.weight", torch.zeros(2, 64), "no layer 'score'"),
        ("model.embed_tokens.weight", torch.zeros(400, 32), r"embed_tokens.weight is \[400, 32\]"),
        ("model.embed_tokens.lora_embedding_B", torch.zeros(32, 4), "lora_embedding_B"),
    ],
)
def test_a_tensor_that_the_model_has_no_place_for_is_named(
    adapter: Path, tiny_folder: Path, name: str, value: torch.Tensor, message: str
) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(weights | {f"base_model.model.{name}": value}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=message):
        AdapterFiles.read(adapter).check_fit(tiny_folder)


RESIZED: dict[str, tuple[bool, list[str], bool, str | None]] = {
    # name: whether the base is tied, what the adapter changes, whether its weights are saved whole, rows that are lost
    "a tied head alone": (True, ["lm_head"], False, "model.embed_tokens and lm_head"),
    "a tied head with its weight": (True, ["lm_head"], True, None),
    "a tied embedding with its weight": (True, ["embed_tokens"], True, None),
    "a head with its weight": (False, ["lm_head"], True, "model.embed_tokens"),
    "both with their weights": (False, ["embed_tokens", "lm_head"], True, None),
    "both alone": (False, ["embed_tokens", "lm_head"], False, "model.embed_tokens and lm_head"),
}


@pytest.mark.parametrize("name", RESIZED)
def test_an_adapter_whose_new_rows_of_the_vocabulary_are_lost_is_refused(name: str, tmp_path: Path) -> None:
    tied, targets, whole, lost = RESIZED[name]
    base, adapter, ids = tmp_path / "base", tmp_path / "adapter", [5, 6, 302]
    make_tiny_model(300, tie_word_embeddings=tied).save_pretrained(base)
    expected = write_by_peft(adapter, base, load_model(base), ids=ids, resize=303, target_modules=targets)
    if not whole:
        path = adapter / "adapter_model.safetensors"
        save_file({key: value for key, value in load_file(path).items() if "lora_" in key}, path)
    if lost is None:
        AdapterFiles.read(adapter).check_fit(base)
        adapted = adapters.load(load_model(base), adapter)
        assert packed_forward.score(adapted, [ids], [1])[0] == pytest.approx(expected, abs=1e-4)
        return
    with pytest.raises(ModelError, match=f"from 300 to 303 rows, and the new rows of {lost} are not") as caught:
        AdapterFiles.read(adapter).check_fit(base)
    assert "merge it where it was trained" in (caught.value.hint or "")


def test_different_numbers_of_rows_are_refused(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    more = {"model.embed_tokens.weight": torch.zeros(402, 64), "lm_head.weight": torch.zeros(403, 64)}
    save_file(weights | {f"base_model.model.{k}": v for k, v in more.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="402, 403"):
        _ = AdapterFiles.read(adapter).vocabulary_size


@pytest.mark.parametrize("base", ["/content/drive/llama", "C:\\models\\llama", "nobody/nothing"])
def test_a_base_that_is_not_there_is_named_with_the_command_that_takes_another(adapter: Path, base: str) -> None:
    change_json(adapter / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(ModelError) as caught:
        find_base_model(AdapterFiles.read(adapter))
    assert repr(base).strip("'") in caught.value.what
    assert f"corral merge {adapter} --base" in (caught.value.hint or "")


def test_the_folder_around_adapters_is_refused_with_their_names(adapter: Path, tmp_path: Path) -> None:
    adapter.rename(adapter.with_name("checkpoint-10"))
    with pytest.raises(ModelError, match="checkpoint-10") as caught:
        find_model_files(str(tmp_path))
    assert str(tmp_path / "checkpoint-10") in (caught.value.hint or "")


def write_own_tokenizer(adapter: Path, base: Path, template: str | None) -> None:
    """An adapter's own tokenizer, as older transformers writes it: with the template in `tokenizer_config.json`."""
    tokenizer = load_tokenizer(base)
    tokenizer.save_pretrained(adapter)
    (adapter / "chat_template.jinja").unlink(missing_ok=True)
    change_json(adapter / "tokenizer_config.json", chat_template=template)


def rendered(adapter: Path) -> str:
    template = find_model_files(str(adapter)).load_template()
    return template.decode(template.prompt(ASKED))


def test_the_template_in_an_adapters_tokenizer_config_is_used(adapter: Path, tiny_folder: Path) -> None:
    assert not rendered(adapter).startswith("###"), "the base's"
    write_own_tokenizer(adapter, tiny_folder, OWN)
    assert rendered(adapter) == "### user:\nWhat is 2 + 2?\n### assistant:\n"


@pytest.mark.parametrize("kind", ["text", "named", "file"])
def test_an_adapters_template_without_a_tokenizer_is_written_with_the_bases_tokenizer(adapter: Path, kind: str) -> None:
    if kind == "file":
        (adapter / "chat_template.jinja").write_text(OWN)
    else:
        template: Any = OWN if kind == "text" else [{"name": "default", "template": OWN}]
        (adapter / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert rendered(adapter).startswith("### user:")


def test_an_adapters_tokenizer_without_a_template_is_used_with_the_bases_template(
    adapter: Path, tiny_folder: Path
) -> None:
    before = find_model_files(str(adapter)).load_template()
    write_own_tokenizer(adapter, tiny_folder, None)
    change_json(adapter / "tokenizer_config.json", eos_token="<|endoftext|>")
    after = find_model_files(str(adapter)).load_template()
    assert after.source == before.source
    assert after.stop_ids != before.stop_ids


def test_a_template_may_write_the_tokens_that_the_adapter_added_to_the_vocabulary(
    tiny_folder: Path, tmp_path: Path
) -> None:
    adapter, small = tmp_path / "adapter", tmp_path / "small"
    write_by_peft(adapter, tiny_folder, load_model(tiny_folder), ids=[5, 6], resize=401)
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|done|>"]})
    tokenizer.chat_template = OWN.replace("eos_token", "'<|done|>'")
    tokenizer.save_pretrained(adapter)
    assert len(tokenizer) == 401
    template = find_model_files(str(adapter)).load_template()
    assert 400 in template.stop_ids
    shutil.copytree(adapter, small)
    write_by_peft(small, tiny_folder, load_model(tiny_folder), ids=[5, 6])
    with pytest.raises(ModelError, match="id 400, and the model's embedding has 400 rows"):
        find_model_files(str(small)).load_template()
