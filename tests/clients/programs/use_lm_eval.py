"""lm-eval's two clients: generated answers over both protocols, and log-likelihoods over completions."""

import json
import os
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}

import lm_eval
from lm_eval.tasks import TaskManager
from scenarios import MODEL, main, scenario

ROWS = [{"question": f"What is {i} plus {i}?", "answer": f" {2 * i}."} for i in range(2)]
TASK = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": "",
}
GENERATE = {
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["\n\n", "Q:", "###", "</s>", "<|im_end|>"], "max_gen_toks": 16, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
SCORE = {"output_type": "loglikelihood", "metric_list": [{"metric": "acc"}]}


def evaluate(client, url, kind, **options):
    """The client's results of a task with two rows."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        task = {**TASK, "task": "sums", "dataset_kwargs": {"data_files": {"test": str(rows)}}, **kind}
        settings = {"model": MODEL, "base_url": url, "tokenizer_backend": None, "max_retries": 1, **options}
        done = lm_eval.simple_evaluate(
            model=client, model_args=settings, tasks=[task], task_manager=TaskManager(), bootstrap_iters=0,
            apply_chat_template="chat" in client,
        )  # fmt: skip
    return [sample["resps"] for sample in done["samples"]["sums"]]


@scenario
def chats(url):
    assert len(evaluate("local-chat-completions", f"{url}/chat/completions", GENERATE)) == 2


@scenario
def chats_with_further_settings(url):
    kind = GENERATE | {"generation_kwargs": {"until": ["\n\n"], "temperature": 0.7, "top_p": 0.9, "do_sample": True}}
    assert len(evaluate("local-chat-completions", f"{url}/chat/completions", kind, num_concurrent=2)) == 2


@scenario
def completions(url):
    assert len(evaluate("local-completions", f"{url}/completions", GENERATE)) == 2


if __name__ == "__main__":
    main()
