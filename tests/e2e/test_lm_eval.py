"""lm-eval as a user runs it, against `corral serve`: both of its clients get the model's answers and log-probs."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import openai
import pytest

from corral.answering.open_model import open_model
from tests.conftest import run_python
from tests.e2e.test_serve import address, serving

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'lm-eval[api]'"
    ),
]

ROWS = [{"question": f"What is {i} plus {i}? It is", "answer": f" {2 * i}."} for i in range(4)]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
"""
GENERATE = """generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""
SCORE = """metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def url(tiny_folder: Path) -> Generator[str]:
    with serving(tiny_folder, "--name", "tiny", "--database", "none") as (output, _):
        yield address(output)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks of the same rows: `generate` and `score`."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, kind, rest in (("generate", "generate_until", GENERATE), ("score", "loglikelihood", SCORE)):
        head = TASK.format(name=name, kind=kind, rows=folder / "rows.jsonl")
        (folder / f"{name}.yaml").write_text(head + rest)
    return folder


def run_lm_eval(client: str, task: str, tasks: Path, out: Path, *options: str, **settings: object) -> list[Any]:
    """The response that lm-eval recorded for each row."""
    model_args = ",".join(f"{name}={value}" for name, value in {"model": "tiny", **settings}.items())
    command = ["-m", "lm_eval", "run", "--model", client, "--model_args", model_args, "--tasks", task, *options]
    command += ["--include_path", str(tasks), "--output_path", str(out), "--log_samples"]
    environment = {"HF_HOME": str(out / "cache"), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    done = run_python(*command, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    (samples,) = out.rglob(f"samples_{task}_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
    assert len(rows) == len(ROWS)
    return [row["resps"][0][0] for row in sorted(rows, key=lambda row: row["doc_id"])]


def test_local_completions_gets_the_texts_of_the_server_and_the_log_probs_of_the_engine(
    url: str, tasks: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    settings = {"base_url": f"{url}/v1/completions", "tokenizer": tiny_folder, "tokenizer_backend": "huggingface"}
    texts = run_lm_eval("local-completions", "generate", tasks, tmp_path / "generate", max_length=512, **settings)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert texts == [
            client.completions.create(
                model="tiny", prompt=row["question"], max_tokens=8, temperature=0, stop=["\n\n", "<|im_end|>"]
            )
            .choices[0]
            .text
            for row in ROWS
        ]
    scores = run_lm_eval("local-completions", "score", tasks, tmp_path / "score", max_length=512, **settings)

    async def expected() -> list[float]:
        answerer = open_model(str(tiny_folder), "transformers").answerer
        encode = answerer.template.tokenizer.backend_tokenizer.encode
        async with answerer.engine as engine:
            totals: list[float] = []
            for row in ROWS:
                ids = encode(row["question"] + row["answer"], add_special_tokens=False).ids
                start = len(encode(row["question"], add_special_tokens=False).ids)
                totals.append(sum(await engine.score(ids, start)))
        return totals

    assert [float(total) for total, _ in scores] == pytest.approx(asyncio.run(expected()), abs=1e-3)
    assert {str(is_greedy) for _, is_greedy in scores} <= {"True", "False"}


def test_local_chat_completions_gets_the_texts_of_the_server(url: str, tasks: Path, tmp_path: Path) -> None:
    out, base_url = tmp_path / "generate", f"{url}/v1/chat/completions"
    texts = run_lm_eval("local-chat-completions", "generate", tasks, out, "--apply_chat_template", base_url=base_url)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answers = [
            client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": row["question"]}],
                max_tokens=8,
                temperature=0,
                stop=["\n\n"],
            )
            for row in ROWS
        ]
    assert texts == [answer.choices[0].message.content for answer in answers]
    assert any(texts)
