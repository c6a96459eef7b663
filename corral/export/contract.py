"""Parity records: proof that two forms of a model are the same model, which travels with it.

A contract holds a fixed probe set as token ids, the log-probabilities the model gives them, and the checks that were made
when it was written. Whoever loads the model later, in any engine, can measure the same probes and compare: `verify`.

This module does not know how models are merged, exported or served; it measures engines and compares numbers.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from corral.engines.base import Engine, Sampling
from corral.errors import ContractError, EngineError, ModelError, TemplateError
from corral.export_forms import CONTRACT_FILE as CONTRACT_FILE
from corral.messages import Conversation
from corral.storage import cached_file_hashes, write_json
from corral.template import Template

VERSION = 2

PROBES = (
    Conversation.from_turns(
        ("user", "What is the capital of France?"), ("assistant", "The capital of France is Paris.")
    ),
    Conversation.from_turns(
        ("system", "Answer in one sentence."),
        ("user", "Why is the sky blue?"),
        ("assistant", "Air scatters blue light more than red light."),
        ("user", "And at sunset?"),
        ("assistant", "Then the light passes through more air, and mostly red is left."),
    ),
    Conversation.from_turns(
        ("user", "Grüße, 東京! Ça va? 🙂\n\n\tTabs  and   spaces."), ("assistant", "Très bien — 元気です。 🙂")
    ),
    Conversation.from_turns(
        ("user", "Write a function that doubles a number."),
        ("assistant", "```python\ndef double(x: float) -> float:\n    return 2 * x\n```"),
    ),
    Conversation.from_turns(
        ("user", "List: 1, 22, 333, 4444; 3.14159; 1e-5."), ("assistant", "1\n22\n333\n4444\n3.14159\n1e-5")
    ),
)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far log-probabilities (nats per token) of two forms of one model may lie apart."""

    mean: float
    largest: float


TOLERANCES = {
    "float32": Tolerance(mean=1e-4, largest=2e-3),
    "bfloat16": Tolerance(mean=0.08, largest=1.0),
    "float16": Tolerance(mean=0.01, largest=0.125),
    "int8": Tolerance(mean=0.1, largest=1.5),
    "int4": Tolerance(mean=0.2, largest=3.0),
}
"""By the less exact dtype of the two; int8 and int4 round activations too, differently on each kind of processor. Measured on
SmolLM2-135M: float32 arithmetic in another order moves them by under 1e-5 on average. bfloat16 arithmetic rounds every
activation, so that any two ways of computing one model differ: an adapter and its merged model by 0.042 to 0.054 on average
and 0.53 at most, as much as computing in bfloat16 instead of float32 does (0.046 and 0.5). float16 rounds to an eighth of
that."""

ACROSS_ENGINES = Tolerance(mean=5e-4, largest=5e-3)
"""Between two programs that compute the same weights in float32; 9e-5 and 3e-4 measured on SmolLM2-135M, transformers against
OpenVINO."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Token ids, of which those from `start` on are scored."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison and how it came out."""

    name: str
    passed: bool
    detail: str
    mean: float | None = None
    max: float | None = None
    tolerance: Tolerance | None = None
    n: int = 0


def make_probes(template: Template, conversations: Sequence[Conversation] = PROBES) -> list[Probe]:
    """The probe set through a template; scored are the tokens from the first trained one on."""
    made: list[Probe] = []
    for conversation in renderable_conversations(template, conversations):
        encoded = template.encode(conversation)
        made.append(Probe(encoded.ids, max(1, encoded.trained.index(True))))
    return made


def renderable_conversations(template: Template, conversations: Sequence[Conversation] = PROBES) -> list[Conversation]:
    """The conversations that a template takes: some know no system message, or one turn only. Raises: TemplateError."""
    taken: list[Conversation] = []
    refusal: TemplateError | None = None
    for conversation in conversations:
        try:
            template.encode(conversation)
            taken.append(conversation)
        except TemplateError as error:
            refusal = error
    if refusal is not None and not taken:
        raise refusal
    return taken


async def measure(engine: Engine, probe_set: Sequence[Probe]) -> list[list[float]]:
    """Log-probabilities of each probe's scored ids."""
    return await asyncio.gather(*(engine.score(p.ids, p.start) for p in probe_set))


def compare_logprobs(
    name: str, a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], tolerance: Tolerance
) -> Check:
    """Hold two measurements of one probe set against each other. NaN never passes."""
    gaps = [abs(x - y) for xs, ys in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=True)]
    mean, largest = sum(gaps) / len(gaps), max(gaps)
    passed = mean <= tolerance.mean and all(gap <= tolerance.largest for gap in gaps)
    detail = (
        f"log-probs differ by {mean:.2g} on average and {largest:.2g} at most "
        f"(allowed {tolerance.mean:g} and {tolerance.largest:g})"
    )
    return Check(name, passed, detail, mean, largest, tolerance, len(gaps))


async def measure_greedy(
    engine: Engine, probe_set: Sequence[Probe], tokens: int = 40
) -> list[tuple[Probe, list[float]]]:
    """The engine's own greedy answers to the probes' prompts, as probes, with the log-probabilities it gave on the way.

    Scoring computes a text in one go; this is the way of an answer, token by token from kept keys and values.
    """
    sampling = Sampling(max_tokens=tokens, logprobs=True)
    prompts = [probe.ids[: probe.start] for probe in probe_set]
    answers = await asyncio.gather(*(engine.submit(ids, sampling).completions() for ids in prompts))
    return [
        (Probe((*ids, *answer.ids), len(ids)), list(answer.logprobs or ()))
        for ids, (answer,) in zip(prompts, answers, strict=True)
    ]


def compare_losses(name: str, a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], allowed: float) -> Check:
    """Whether the mean loss (nats per token) of `a` exceeds that of `b` by no more than `allowed`. NaN never passes."""
    losses = [-sum(sum(values) for values in logprobs) / sum(map(len, logprobs)) for logprobs in (a, b)]
    shift = losses[0] - losses[1]
    gaps = [abs(x - y) for xs, ys in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=True)]
    detail = (
        f"loss {losses[0]:.4f} against {losses[1]:.4f}: {shift:+.4f} (allowed {allowed:+g}); "
        f"log-probs differ by {sum(gaps) / len(gaps):.2g} on average and {max(gaps):.2g} at most"
    )
    return Check(name, shift <= allowed, detail, sum(gaps) / len(gaps), max(gaps), None, len(gaps))


def check_token_ids(template: Template, folder: Path) -> Check:
    """Whether a saved model folder gives the same ids: read by corral, and by transformers' own chat templating."""
    from transformers import AutoTokenizer

    name = "token ids"
    saved: Any = AutoTokenizer.from_pretrained(folder)
    try:
        again = Template.load(saved)
    except TemplateError as error:
        return Check(name, False, f"the saved template cannot be used: {error.what}")
    if again.digest != template.digest:
        return Check(name, False, "the saved template or its special tokens are not those the model was trained with")
    turns = 0
    conversations = renderable_conversations(template)
    for conversation in conversations:
        if again.encode(conversation) != template.encode(conversation):
            return Check(name, False, f"the saved tokenizer gives other ids for {conversation.messages[0].content!r}")
        for end, message in enumerate(conversation.messages):
            if message.role != "assistant":
                continue
            asked = Conversation(conversation.messages[:end])
            theirs = saved.apply_chat_template(
                asked.to_json()["messages"], add_generation_prompt=True, return_dict=False
            )
            if list(theirs) != template.prompt(asked):
                return Check(name, False, f"transformers gives other ids for {asked.messages[-1].content!r}")
            turns += 1
    return Check(name, True, f"{turns} prompts and {len(conversations)} conversations have equal ids", n=turns)


def check_stop_ids(template: Template, folder: Path) -> Check:
    """Whether the folder tells other programs every id that ends an answer."""
    config: dict[str, Any] = json.loads((folder / "generation_config.json").read_text("utf-8"))
    saved = config.get("eos_token_id")
    saved_ids = {saved} if isinstance(saved, int) else set(saved or ())
    missing = set(template.stop_ids) - saved_ids
    detail = f"generation_config.json lacks {sorted(missing)}" if missing else f"answers end at {sorted(saved_ids)}"
    return Check("stop ids", not missing, detail)


def write(
    record: Path,
    template: Template,
    probe_set: Sequence[Probe],
    logprobs: Sequence[Sequence[float]],
    checks: Sequence[Check],
    *,
    form: str,
    files: Sequence[Path],
    source: Mapping[str, str] | None = None,
) -> None:
    """Write a contract, passed or failed.

    Args:
        record: the file to write.
        logprobs: what this form gives the probes, as it is served.
        form: what the weights are stored as: a dtype, or the name of an exported form.
        files: what the form is made of (weights, config, tokenizer, template); they lie beside the record.
        source: the weights this form was made from, `{file: sha256}`.
    """
    value = {
        "version": VERSION,
        "passed": all(c.passed for c in checks),
        "form": form,
        "files": cached_file_hashes(record.parent, files),
        "source": dict(source or {}),
        "template": {"sha256": template.digest, "stop_ids": list(template.stop_ids)},
        "checks": [{key: _finite(value) for key, value in asdict(c).items()} for c in checks],
        "probes": [
            {"ids": list(p.ids), "start": p.start, "logprobs": [v if math.isfinite(v) else None for v in values]}
            for p, values in zip(probe_set, logprobs, strict=True)
        ],
    }
    write_json(record, value)


def model_files(folder: Path) -> list[Path]:
    """What a model folder is made of, as far as answers depend on it."""
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    found = [folder / name for name in names if (folder / name).is_file()]
    return [*found, *sorted(folder.glob("*.safetensors")), *sorted(folder.glob("openvino_model.*"))]


def read(record: Path) -> dict[str, Any]:
    """A contract as written. Raises: ModelError (there is none, it cannot be read, or it is of another version)."""
    try:
        value: Any = json.loads(record.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(
            "this model has no contract", where=str(record), hint="`corral run` and `corral export` write one"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"the contract cannot be read: {error}", where=str(record)) from None
    if not isinstance(value, dict) or cast("dict[str, Any]", value).get("version") != VERSION:
        raise ModelError(
            f"the contract is not of version {VERSION}", where=str(record), hint="merge or export the model again"
        )
    contract = cast("dict[str, Any]", value)
    shapes = {"passed": bool, "form": str, "files": dict, "source": dict, "template": dict, "probes": list}
    for key, kind in shapes.items():
        if not isinstance(contract.get(key), kind):
            raise ModelError(
                f"the contract is damaged: {key!r} is missing or wrong",
                where=str(record),
                hint="merge or export the model again",
            )
    return contract


def check_unchanged(record: Path, template: Template) -> list[Check]:
    """Whether a model's files and template are those its contract was written for; nothing is computed.

    Hashes are remembered by size and time of change, so that only the first look reads gigabytes.

    Raises: ModelError, as `read`.
    """
    contract = read(record)
    files: dict[str, str] = contract["files"]
    there = [record.parent / name for name in files if (record.parent / name).is_file()]
    found = cached_file_hashes(record.parent, there)
    changed = [name for name, digest in files.items() if found.get(name) != digest]
    same = template.digest == contract["template"].get("sha256")
    return [
        Check("files", not changed, f"changed or missing: {', '.join(changed)}" if changed else "as recorded"),
        Check("template", same, "as recorded" if same else "another template, or other special tokens, than recorded"),
    ]


async def verify(record: Path, engine: Engine) -> Check:
    """Hold what a model gives its probes, now and in this engine, against its contract. Raises: ModelError, as `read`."""
    contract = read(record)
    name = f"engine {engine.name}"
    try:
        probe_set = [Probe(tuple(p["ids"]), p["start"]) for p in contract["probes"]]
        recorded = [[math.nan if v is None else v for v in p["logprobs"]] for p in contract["probes"]]
        measured = await measure(engine, probe_set)
    except EngineError as error:
        return Check(name, False, f"the probes cannot be computed: {error.what}")
    except (KeyError, TypeError) as error:
        raise ModelError(f"the contract is damaged: {error!r}", where=str(record)) from None
    tolerance = TOLERANCES.get(contract["form"].rpartition(" ")[2], ACROSS_ENGINES)
    if tolerance.mean < ACROSS_ENGINES.mean:
        tolerance = ACROSS_ENGINES  # who wrote the contract may have been another engine
    return compare_logprobs(name, measured, recorded, tolerance)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def raise_if_failed(checks: Sequence[Check], *, where: Path) -> None:
    """Raise for the checks that failed. Raises: ContractError."""
    failed = [c for c in checks if not c.passed]
    if failed:
        raise ContractError(
            "; ".join(f"contract broken: {c.name}: {c.detail}" for c in failed),
            where=str(where),
            hint="the model is kept there but not promoted; `contract.json` holds every figure",
        )
