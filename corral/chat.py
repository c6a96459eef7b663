"""A conversation in the terminal with a local model. Knows nothing about runs but where their model is."""

from __future__ import annotations

import sys
from pathlib import Path

from corral.answerer import Answerer, blocking
from corral.engines.base import Sampling
from corral.engines.load import load_engine
from corral.errors import CorralError
from corral.messages import Conversation
from corral.template import Template

ENDS = frozenset({"exit", "quit"})


def model_folder(spec: str) -> Path:
    """The model folder of a run directory, or of any model spec. Raises: RunError, ModelError, AssetError."""
    from corral.model.loading import resolve
    from corral.run import Run

    if (Path(spec) / "recipe.toml").is_file():
        return Run(Path(spec)).merged_model
    return resolve(spec).folder


def chat(spec: str, *, system: str | None, max_tokens: int, temperature: float, top_p: float) -> None:
    """Read lines, stream answers, keep the conversation; `exit`, `quit` or the end of input ends it."""
    from corral.model.loading import load_tokenizer
    from corral.model.placement import placement

    folder = model_folder(spec)
    template = Template.load(load_tokenizer(folder))
    print("loading …", file=sys.stderr)
    device, dtype = placement()
    engine = load_engine("transformers", folder, dtype=dtype, device=device)
    start = Conversation.of(("system", system)) if system else Conversation(())
    with blocking(Answerer(engine, template, Sampling(max_tokens, temperature=temperature, top_p=top_p))) as face:
        print("say something; `exit` or `quit` ends", file=sys.stderr)
        conversation = start
        while (line := _read()) is not None:
            if not line.strip():
                continue
            asked = conversation.add("user", line)
            answer = ""
            try:
                for delta in face.stream(asked):
                    answer += delta.text
                    print(delta.text, end="", flush=True)
            except KeyboardInterrupt:
                print(" …", end="")
            except CorralError as error:
                # The turn is taken back: the conversation stands as it was before it.
                print(f"corral: {error}", file=sys.stderr)
                continue
            print()
            conversation = asked.add("assistant", answer) if answer else conversation


def _read() -> str | None:
    try:
        line = input("> ") if sys.stdin.isatty() else input()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    return None if line.strip().lower() in ENDS else line
