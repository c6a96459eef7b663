"""Parity records ("contracts"): a file beside a model that shows it to be the same model as the one it was made from.

A contract holds a fixed set of probes as token ids, the log-probabilities that the model gives them, and the checks made when
it was written. Later, in any engine, `verify` measures the same probes and compares.
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
    """How much log-probabilities (nats per token) of two forms of one model may differ."""

    mean: float
    largest: float


TOLERANCES = {
    "float32": Tolerance(mean=1e-4, largest=2e-3),
    "bfloat16": Tolerance(mean=0.08, largest=1.0),
    "float16": Tolerance(mean=0.01, largest=0.125),
    "int8": Tolerance(mean=0.1, largest=1.5),
    "int4": Tolerance(mean=0.2, largest=3.0),
}
"""By the less precise dtype of the two; int8 and int4 round activations too, differently on each kind of processor.

Measured on SmolLM2-135M: float32 arithmetic in another order changes them by under 1e-5 on average. bfloat16 arithmetic rounds
every activation, so any two ways of computing one model differ: an adapter and its merged model by 0.042 to 0.054 on average
and 0.53 at most, as much as bfloat16 and float32 (0.046 and 0.5). float16 differs by an eighth of that."""

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
    """The result of one comparison."""

    name: str
    passed: bool
    detail: str
    mean: float | None = None
    max: float | None = None
    tolerance: Tolerance | None = None
    n: int = 0


def make_probes(template: Template) -> list[Probe]:
    """`PROBES` as token ids; those from the first trained one on are scored."""
    encoded = [template.encode(c) for c in renderable_conversations(template)]
    return [Probe(e.ids, max(1, e.trained.index(True))) for e in encoded]


def renderable_conversations(template: Template) -> list[Conversation]:
    """Those of `PROBES` that a template can render: some take no system message, or one turn only.

    Raises: TemplateError (it renders none).
    """
    renderable: list[Conversation] = []
    last_error: TemplateError | None = None
    for conversation in PROBES:
        try:
            template.encode(conversation)
            renderable.append(conversation)
        except TemplateError as error:
            last_error = error
    if last_error is not None and not renderable:
        raise last_error
    return renderable


async def measure(engine: Engine, probe_set: Sequence[Probe]) -> list[list[float]]:
    """Log-probabilities of each probe's scored ids."""
    return await asyncio.gather(*(engine.score(p.ids, p.start) for p in probe_set))


def compare_logprobs(
    name: str, a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], tolerance: Tolerance
) -> Check:
    """Compare two measurements of one probe set. NaN never passes."""
    gaps = [abs(x - y) for xs, ys in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=True)]
    mean, largest = sum(gaps) / len(gaps), max(gaps)
    passed = mean <= tolerance.mean and all(gap <= tolerance.largest for gap in gaps)
    detail = (
        f"log-probs differ by {mean:.2g} on average and {largest:.2g} at most "
        f"(allowed {tolerance.mean:g} and {tolerance.largest:g})"
    )
    return Check(name, passed, detail, mean, largest, tolerance, len(gaps))


async def measure_greedy(engine: Engine, probe_set: Sequence[Probe]) -> list[tuple[Probe, list[float]]]:
    """The engine's greedy answers to the probes' prompts, as probes, with the log-probabilities it reported for them.

    Scoring computes a text in one pass; answering computes it token by token from cached keys and values.
    """
    sampling = Sampling(max_tokens=40, logprobs=True)
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
    """Whether a saved model folder gives the same ids, in corral and in transformers' own chat templating."""
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
            prompt = Conversation(conversation.messages[:end])
            ids = saved.apply_chat_template(prompt.to_json()["messages"], add_generation_prompt=True, return_dict=False)
            if list(ids) != template.prompt(prompt):
                return Check(name, False, f"transformers gives other ids for {prompt.messages[-1].content!r}")
            turns += 1
    return Check(name, True, f"{turns} prompts and {len(conversations)} conversations have equal ids", n=turns)


def check_stop_ids(template: Template, folder: Path) -> Check:
    """Whether the folder's generation config lists every id that ends an answer."""
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
        logprobs: of the probes, in this form as it is served.
        form: how the weights are stored: a dtype, or the name of an exported form.
        files: the form's files (weights, config, tokenizer, template), in the folder of `record`.
        source: the `model_files` that this form was made from, `{file: sha256}`.
    """
    value = {
        "version": VERSION,
        "passed": all(c.passed for c in checks),
        "form": form,
        "files": cached_file_hashes(record.parent, files),
        "source": dict(source or {}),
        "template": record_template(template),
        "checks": [{key: _finite(value) for key, value in asdict(c).items()} for c in checks],
        "probes": [
            {"ids": list(p.ids), "start": p.start, "logprobs": [v if math.isfinite(v) else None for v in values]}
            for p, values in zip(probe_set, logprobs, strict=True)
        ],
    }
    write_json(record, value)


def record_template(template: Template) -> dict[str, Any]:
    """What a contract holds of the template that a model was written with."""
    return {"sha256": template.digest, "stop_ids": list(template.stop_ids)}


def certify_merged(
    folder: Path,
    template: Template,
    probe_set: Sequence[Probe],
    logprobs: Sequence[Sequence[float]],
    checks: Sequence[Check],
    *,
    form: str,
) -> list[Check]:
    """Write the contract of a merged model's folder, which is not in its place yet.

    Args:
        logprobs: of the probes, by the model as it was written.
        checks: of its weights; those of its tokenizer and its stop ids are made here.
        form: the dtype of its weights.

    Returns: all checks.

    Raises:
        ContractError: one fails; the folder stays as it is.
    """
    checks = [check_token_ids(template, folder), check_stop_ids(template, folder), *checks]
    write(folder / CONTRACT_FILE, template, probe_set, logprobs, checks, form=form, files=model_files(folder))
    hint = f"the model is kept there but not promoted; `{CONTRACT_FILE}` holds every figure"
    raise_if_failed(checks, where=folder, hint=hint)
    return checks


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder that answers depend on."""
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    texts = [folder / name for name in names if (folder / name).is_file()]
    return [*texts, *sorted(folder.glob("*.safetensors")), *sorted(folder.glob("openvino_model.*"))]


def read(record: Path) -> dict[str, Any]:
    """A contract as it is in its file. Raises: ModelError (it is missing, cannot be read, or has another version)."""
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
    """Whether a model's files and template are those its contract was written for. No model is loaded.

    Hashes are cached by size and modification time, so only the first call reads gigabytes.

    Raises: ModelError, as `read`.
    """
    contract = read(record)
    files: dict[str, str] = contract["files"]
    existing = [record.parent / name for name in files if (record.parent / name).is_file()]
    hashes = cached_file_hashes(record.parent, existing)
    changed = [name for name, digest in files.items() if hashes.get(name) != digest]
    same = template.digest == contract["template"].get("sha256")
    return [
        Check("files", not changed, f"changed or missing: {', '.join(changed)}" if changed else "as recorded"),
        Check("template", same, "as recorded" if same else "another template, or other special tokens, than recorded"),
    ]


async def verify(record: Path, engine: Engine) -> Check:
    """Compare the log-probabilities of the probes in an engine with those in the contract. Raises: ModelError, as `read`."""
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
        tolerance = ACROSS_ENGINES  # the contract may have been measured in another engine
    return compare_logprobs(name, measured, recorded, tolerance)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def raise_if_failed(checks: Sequence[Check], *, where: Path, hint: str) -> None:
    """Raises: ContractError (it lists the checks that failed), with what the user can do as its hint."""
    failed = [c for c in checks if not c.passed]
    if failed:
        raise ContractError(
            "; ".join(f"contract broken: {c.name}: {c.detail}" for c in failed),
            where=str(where),
            hint=hint,
        )
