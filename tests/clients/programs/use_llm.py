"""The command `llm`, with a server of one's own in its `extra-openai-models.yaml`."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from scenarios import ANSWER, MODEL, main, scenario

MODELS = """
- model_id: mine
  model_name: {model}
  api_base: {url}
  can_stream: true
- model_id: mine-text
  model_name: {model}
  api_base: {url}
  completion: true
"""


def llm(url, *commands):
    """What each command prints; the commands share a folder with the client's settings and logs."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "extra-openai-models.yaml").write_text(MODELS.format(model=MODEL, url=json.dumps(url)))
        environment = os.environ | {"LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}
        outputs = []
        for command in commands:
            done = subprocess.run(
                [sys.executable, "-m", "llm", *command],
                env=environment,
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
            )
            assert done.returncode == 0, done.stderr
            outputs.append(done.stdout.strip())
        return outputs


@scenario
def streamed(url):
    assert llm(url, ["-m", "mine", "What is two plus two?"]) == [ANSWER]


@scenario
def not_streamed_with_a_system_prompt(url):
    assert llm(url, ["-m", "mine", "--no-stream", "-s", "Be brief.", "What is two plus two?"]) == [ANSWER]


@scenario
def with_options(url):
    options = {
        "temperature": 0.5, "max_tokens": 64, "top_p": 0.9, "frequency_penalty": 0.1, "presence_penalty": 0.1,
        "stop": "###", "seed": 7, "logit_bias": '{"5": -10}',
    }  # fmt: skip
    flags = [part for name, value in options.items() for part in ("-o", name, str(value))]
    assert llm(url, ["-m", "mine", *flags, "What is two plus two?"]) == [ANSWER]


@scenario
def continued(url):
    assert llm(url, ["-m", "mine", "Two?"], ["-c", "Three?"]) == [ANSWER, ANSWER]


@scenario
def completion(url):
    assert llm(url, ["-m", "mine-text", "-o", "max_tokens", "32", "Two plus two is"]) == [ANSWER]


if __name__ == "__main__":
    main()
