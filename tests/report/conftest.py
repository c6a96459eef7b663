"""A synthetic run directory with every part, in the shapes that the stages write."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from corral.data.ledger import Ledger
from corral.evaluation.scorecard import Comparison, MetricValue, Scorecard, Variant, build_scorecard
from corral.evaluation.scoring import Row, VariantRows
from corral.export.contract import Check, Tolerance
from corral.recipe import parse

MakeRun = Callable[..., Path]

RECIPE = """
name = "quickstart"
seed = 7
[model]
base = "asset:smollm2-135m-instruct"
[data]
max_length = 512
[[data.sources]]
path = "asset:wikibooks-recipes"
format = "wikibooks-recipes"
[[data.sources]]
path = "house.jsonl"
name = "house recipes"
[[train]]
steps = 60
batch_size = 8
[evaluate]
answer_rows = 24
"""

DISHES = ["Potato soup", "Banana bread", "Chickpea curry", "Apple crumble", "Tomato salad", "Lentil stew"]
INGREDIENTS = [
    "500 g potatoes",
    "1 large onion",
    "2 cloves of garlic",
    "2 tablespoons oil",
    "salt and pepper",
    "100 ml cream",
]
STEPS = [
    "Peel the potatoes and cut them into pieces of about two centimetres.",
    "Chop the onion and the garlic.",
    "Heat the oil in a large pot over medium heat.",
    "Simmer for twenty minutes, stirring now and then.",
    "Season with salt, pepper and nutmeg.",
    "Blend until smooth, stir in the cream and serve hot.",
]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run(*parts)` fills a directory with the parts named, or all."""

    def make(*parts: str, name: str = "quickstart", stages: tuple[str, ...] = ("train-1-sft",)) -> Path:
        return fill(tmp_path / "runs" / name, parts or tuple(PARTS), stages)

    return make


def fill(run: Path, parts: tuple[str, ...], stages: tuple[str, ...] = ("train-1-sft",)) -> Path:
    run.mkdir(parents=True)
    names = {int(stage.split("-")[1]): stage.split("-", 2)[2] for stage in stages}
    tables = (f'name = "{names[n]}"' if names.get(n, "sft") != "sft" else "" for n in range(2, max(names) + 1))
    others = "".join(f"[[train]]\n{table}\n" for table in tables)
    recipe = RECIPE.replace("[evaluate]", f"{others}[evaluate]")
    (run / "recipe.toml").write_text(parse(recipe, where="test").to_toml(), "utf-8")
    for part, write_part in PARTS.items():
        if part in parts:
            write_part(run)
    for stage in stages if "metrics" in parts else ():
        write_lines(run / stage / "metrics.jsonl", metrics())
    return run


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=2), "utf-8")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    write(path, "".join(json.dumps(line) + "\n" for line in lines))


def metrics(steps: int = 60) -> list[dict[str, Any]]:
    rng = random.Random(1)
    lines: list[dict[str, Any]] = []
    tokens, seconds = 0, 0.0
    for step in range(steps + 1):
        level = 1.78 + 0.5 * math.exp(-step / 18)
        held = step % 10 == 0
        more = rng.randint(1500, 2300) if step else 0
        rate = rng.gauss(540, 25) if step else 0.0
        tokens += more
        seconds += more / rate if rate else 0.0
        lr = 2e-4 * (step / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / (steps - 3))))
        lines.append(
            {
                "step": step,
                "loss": rng.gauss(level, 0.09) if step else None,
                "eval_loss": level + 0.02 + 0.03 * max(0, step - 45) / 15 if held else None,
                "lr": lr,
                "grad_norm": rng.uniform(0.8, 1.6) if step else None,
                "tokens": tokens,
                "tokens_per_second": rate,
                "peak_memory_bytes": int(1.2e9 + 0.35e9 * min(1, step / 8)),
                "seconds": seconds,
            }
        )
    return lines


def aligned_metrics(steps: int = 20) -> list[dict[str, Any]]:
    """Of a stage that trains on pairs."""
    lines = metrics(steps)
    for line in lines:
        share = line["step"] / steps
        rewards = {"reward_chosen": 0.2 * share, "reward_rejected": -share, "reward_accuracy": 0.5 + 0.4 * share}
        rewards |= {"logprob_chosen": 2 * share - 60, "logprob_rejected": -70 - 10 * share}
        if line["step"]:
            line |= rewards
        if line["eval_loss"] is not None:
            line |= {f"eval_{name}": 0.9 * value for name, value in rewards.items()}
            line["basic_prompts_passed"] = 20 - 4 * (line["step"] > 10)
    return lines


def completions(rows: int = 24) -> list[dict[str, Any]]:
    """Answers to the same prompts: the base model's are chatty, the tuned model's resemble the reference."""
    rng = random.Random(2)

    def recipe(steps: list[str]) -> str:
        numbered = [f"{n}. {step}" for n, step in enumerate(steps, 1)]
        return "\n".join([dish, "", "Ingredients:", *(f"- {i}" for i in ingredients), "", "Steps:", *numbered])

    lines: list[dict[str, Any]] = []
    for variant in ("base", "tuned"):
        for number in range(rows):
            fixed = random.Random(number)
            dish, ingredients, steps = fixed.choice(DISHES), fixed.sample(INGREDIENTS, 5), fixed.sample(STEPS, 5)
            answer = recipe(rng.sample(steps, rng.randint(2, 5)) + rng.sample(STEPS, 1))
            cut_off = False
            if variant == "base":
                answer = "Here is a delicious recipe for you!\n\n**Ingredients:**\n" + ", ".join(ingredients[:3])
                answer += "\n\nFirst of all, make sure that you have everything. " * rng.randint(1, 6)
                cut_off = rng.random() < 0.6
            prompt = "Write a recipe from these ingredients: " + ", ".join(ingredients)
            lines.append(
                {
                    "variant": variant,
                    "id": f"{number:04x}",
                    "prompt": [{"role": "user", "content": prompt}],
                    "reference": recipe(steps),
                    "answer": answer,
                    "finish": "length" if cut_off else "stop",
                    "tokens": rng.randint(80, 160),
                    "seconds": 1.5,
                }
            )
    return lines


@lru_cache(maxsize=1)
def card() -> Scorecard:
    """A real scorecard: of `completions`, and of losses of 100 rows."""
    rng = random.Random(3)
    lines = completions()
    base = [(rng.randint(60, 200), rng.gauss(2.28, 0.3)) for _ in range(100)]
    variants: dict[str, VariantRows] = {}
    for variant, gain in (("base", 0.0), ("tuned", 0.44)):
        texts = {line["id"]: line for line in lines if line["variant"] == variant}
        rows = [
            Row(
                id=f"{i:04x}",
                nll=n * (loss - gain + (rng.gauss(0, 0.08) if gain else 0)),
                tokens=n,
                reference=texts.get(f"{i:04x}", {}).get("reference"),
                answer=texts.get(f"{i:04x}", {}).get("answer"),
            )
            for i, (n, loss) in enumerate(base)
        ]
        variants[variant] = VariantRows(rows, {"tokens_per_second": 31.5})
    return build_scorecard(variants, baseline="base", seed=7)


def tiny_card(**changes: Any) -> Scorecard:
    """A scorecard of one metric and one comparison, with these changes."""
    comparison: dict[str, Any] = {"difference": -0.44, "low": -0.47, "high": -0.41, "p": 0.0001, "p_holm": 0.0001}
    comparison |= {"a": "tuned", "b": "base", "metric": "loss", "n": 100, "mde": None, "better": "lower"}
    return Scorecard(
        variants={
            "base": Variant(metrics={"loss": MetricValue(mean=2.28, se=0.03, n=100)}),
            "tuned": Variant(metrics={"loss": MetricValue(mean=1.84, se=0.02, n=100)}),
        },
        comparisons=[Comparison.model_validate(comparison | changes)],
        baseline="base",
        seed=0,
        signatures={},
    )


def ledger() -> dict[str, Any]:
    """A real ledger of two sources."""
    counts = Ledger()
    for source, rows in (("asset:wikibooks-recipes", 3129), ("house recipes", 139)):
        rng = random.Random(source)
        for index in range(rows):
            counts.add_read(source)
            match rng.choices(
                ("kept", "truncated", "no answer", "521 tokens, over the limit", "duplicate"), (88, 4, 3, 3, 2)
            )[0]:
                case "kept" | "truncated" as fate:
                    counts.add_fate(
                        source, index, fate, side=rng.choices(("train", "validation", "test"), (90, 5, 5))[0]
                    )
                case "duplicate":
                    counts.add_fate(source, index, "duplicate")
                case reason:
                    counts.add_fate(source, index, "dropped", reason=reason)
    return counts.to_json()


def contract(passed: bool = True) -> dict[str, Any]:
    checks = [
        Check("token ids", True, "6 prompts and 5 conversations have equal ids", n=6),
        Check("stop ids", True, "answers end at [2]"),
        Check(
            "adapter and merged model",
            passed,
            "log-probs differ by 1.2e-06 on average and 2.1e-05 at most (allowed 0.0001 and 0.002)",
            1.2e-6,
            2.1e-5,
            Tolerance(1e-4, 2e-3),
            118,
        ),
    ]
    return {"version": 2, "passed": passed, "form": "float32", "checks": [asdict(c) for c in checks]}


def lineage() -> dict[str, Any]:
    seconds = {"prepare": 6.2, "train-1-sft": 236.3, "evaluate": 187.0, "report": 3.3}
    return {
        "recipe": "quickstart",
        "seed": 7,
        "model": {"spec": "asset:smollm2-135m-instruct", "identity": "5af3" * 16, "template": "b1e0" * 16},
        "stages": [
            {
                "name": name,
                "fingerprint": f"{place}c0ffee{place}" * 8,
                "status": "done",
                "inputs": {"seed": 7},
                "started": f"2025-03-14T09:{10 + place}:00+00:00",
                "seconds": took,
                "finished": f"2025-03-14T09:{11 + place}:00+00:00",
                "outputs": {f"{name}.json": f"{place}e" * 32},
            }
            for place, (name, took) in enumerate(seconds.items())
        ],
    }


ENVIRONMENT: dict[str, Any] = {
    "corral": "0.1.0",
    "python": "3.11.2",
    "platform": "Linux x86_64",
    "cpu": "Some Processor 3.0 GHz",
    "cores": 2,
    "memory_bytes": 8_335_000_000,
    "packages": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
}


def promote_model(run: Path, record: dict[str, Any]) -> None:
    """Let a run stand for a model with this contract."""
    stage = next(stage for stage in lineage()["stages"] if stage["name"] == "train-1-sft")
    write(run / "train-1-sft" / "stage.json", stage)
    write(run / "train-1-sft" / "merged" / "config.json", {})
    write(run / "train-1-sft" / "merged" / "contract.json", record)
    pointer = {"stage": stage["name"], "fingerprint": stage["fingerprint"], "sha256": "ab" * 32}
    write(run / "model", pointer | {"reason": "the last training stage", "promoted": "2025-03-14T09:12:00+00:00"})


PARTS: dict[str, Callable[[Path], None]] = {
    "environment": lambda run: write(run / "environment.json", ENVIRONMENT),
    "lineage": lambda run: write(run / "lineage.json", lineage()),
    "ledger": lambda run: write(run / "prepare" / "ledger.json", ledger()),
    "metrics": lambda run: None,  # by `fill`, for each stage
    "contract": lambda run: promote_model(run, contract()),
    "scorecard": lambda run: write(run / "evaluate" / "scorecard.json", card().to_json()),
    "completions": lambda run: write_lines(run / "evaluate" / "completions.jsonl", completions()),
}
