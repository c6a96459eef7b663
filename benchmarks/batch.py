"""A batch with votes on a CPU: `corral batch` against plain transformers, one by one and batched, and OpenVINO GenAI.

200 prompts (recipes from Wikibooks) × 5 samples of SmolLM2-135M-Instruct, temperature 0.7, top-p 0.9, at most 128 new tokens,
answers end where the model ends them; the mean length is printed. Equal precision: float32 weights, products, keys and
values. corral's side is the whole command: read rows, generate answers, vote by ROUGE-L (every candidate is completed, so
that all sides generate equally many) and write. Each side runs in a process of its own, one after another; loading is not
counted, and each warms up on one short answer. A claim is the median over rounds of the ratio of completions per second; their
lengths differ by chance only, and tokens per second are printed too.

`sequential`: `generate` for one completion at a time, timed on 15, of 15 prompts spread over all. `batched`: `generate` with
the batch size that is fastest here, found among `--sizes` on part of the prompts; then timed on `--part` of them, sorted by
length. `raw`: OpenVINO GenAI's ContinuousBatchingPipeline with the model files and the cache of corral's engine; five samples
of each prompt as one request, all prompts at once.

    python benchmarks/batch.py [--prompts 200] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import claims

PROMPTS, SAMPLES, TOKENS, ALONE = 200, 5, 128, 15
TEMPERATURE, TOP_P = 0.7, 0.9
MODEL = "asset:smollm2-135m-instruct"
PRECISION = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
SAMPLED = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0}


def base_folder() -> Path:
    from corral.model.loading import resolve_model

    return resolve_model(MODEL).folder


def questions(count: int) -> list[dict[str, Any]]:
    """The first rows of the quickstart recipe, without their answers, as `{"messages": …}`."""
    from corral.data.prepare import prepare
    from corral.progress import Progress
    from corral.recipe import Data, Source

    data = Data(sources=(Source(path="asset:wikibooks-recipes", format="wikibooks-recipes"),), max_length=512)
    with tempfile.TemporaryDirectory() as name:
        rows = prepare(data, template(), Path(name), 7, Progress()).train
        return [rows[i].record.split_answer()[0].to_json() for i in range(count)]


def template() -> Any:
    from corral.model.loading import load_template

    return load_template(base_folder())


def render(rows: list[dict[str, Any]]) -> tuple[list[list[int]], tuple[int, ...]]:
    """(token ids of each prompt, ids that end an answer)."""
    from corral.messages import Conversation

    chat_template = template()
    return [chat_template.prompt(Conversation.from_json(row)) for row in rows], chat_template.stop_ids


class Plain:
    """transformers' own `generate`."""

    def __init__(self, stops: tuple[int, ...]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32).eval()
        self._stops = stops
        torch.manual_seed(0)
        self.generate([[5, 6, 7]], 1, tokens=4)

    def generate(self, prompt_ids: list[list[int]], samples: int, tokens: int = TOKENS) -> int:
        """Returns: tokens generated, without end tokens."""
        width = max(map(len, prompt_ids))
        ids = self._torch.tensor([[0] * (width - len(p)) + p for p in prompt_ids])
        mask = self._torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompt_ids])
        out = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            num_return_sequences=samples,
            max_new_tokens=tokens,
            eos_token_id=list(self._stops),
            pad_token_id=0,
            **SAMPLED,
        )
        return sum(count_tokens(row, self._stops) for row in out[:, width:].tolist())


def count_tokens(ids: list[int], stops: tuple[int, ...]) -> int:
    return next((i for i, id_ in enumerate(ids) if id_ in stops), len(ids))


def side_sequential(rows: list[dict[str, Any]], _: Any) -> dict[str, Any]:
    prompt_ids, stops = render(rows)
    model = Plain(stops)
    chosen = [prompt_ids[i * len(prompt_ids) // ALONE] for i in range(ALONE)]
    began = time.perf_counter()
    tokens = sum(model.generate([ids], 1) for ids in chosen)
    return figures(ALONE, tokens, began)


def side_batched(rows: list[dict[str, Any]], options: Any) -> dict[str, Any]:
    prompt_ids, stops = render(rows)
    prompt_ids.sort(key=len)
    model = Plain(stops)

    def timed(prompts: list[list[int]], size: int) -> dict[str, Any]:
        """Generate in batches of this many completions."""
        each = max(1, size // SAMPLES)
        began = time.perf_counter()
        tokens = sum(model.generate(prompts[i : i + each], SAMPLES) for i in range(0, len(prompts), each))
        return figures(len(prompts) * SAMPLES, tokens, began)

    speeds: dict[int, float] = {}
    for size in options.sizes:
        # At least one full batch, so that a large size is not judged by a small batch.
        some = prompt_ids[:: max(1, min(10, len(prompt_ids) * SAMPLES // size))]
        speeds[size] = timed(some, size)["completions_per_second"]
    best = max(speeds, key=lambda size: speeds[size])
    part = prompt_ids[:: max(1, round(1 / options.part))]
    return timed(part, best) | {"batch_size": best, "completions_per_second_by_batch_size": speeds}


def side_raw(rows: list[dict[str, Any]], _: Any) -> dict[str, Any]:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    from corral.engines.openvino import OpenVinoEngine
    from corral.model.openvino_graph import cached_form

    prompt_ids, stops = render(rows)
    form = cached_form(base_folder(), "f32")
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = cache_blocks(OpenVinoEngine, base_folder())
    scheduler.enable_prefix_caching = True
    scheduler.max_num_batched_tokens = 512
    pipeline = genai.ContinuousBatchingPipeline(str(form), scheduler, "CPU", PRECISION)

    def config(n: int, tokens: int) -> Any:
        settings = genai.GenerationConfig(max_new_tokens=tokens, num_return_sequences=n, do_sample=True)
        settings.temperature, settings.top_p = TEMPERATURE, TOP_P
        settings.stop_token_ids = set(stops)
        settings.set_eos_token_id(stops[0])
        return settings

    inputs = [ov.Tensor(np.array([p], dtype=np.int64)) for p in prompt_ids]
    pipeline.generate(inputs[:1], [config(1, 4)])
    began = time.perf_counter()
    results = pipeline.generate(inputs, [config(SAMPLES, TOKENS)] * len(inputs))
    lengths = [count_tokens(list(ids), stops) for result in results for ids in result.m_generation_ids]
    return figures(len(lengths), sum(lengths), began)


def cache_blocks(engine: Any, folder: Path) -> int:
    """Number of key-value cache blocks that corral's engine would allocate now."""
    import asyncio

    loaded = engine(folder, dtype="float32")
    blocks = loaded._settings["blocks"]
    asyncio.run(loaded.close())
    return blocks


def side_corral(rows: list[dict[str, Any]], _: Any) -> dict[str, Any]:
    from functools import partial

    from corral.answering.answerer import Answerer
    from corral.answering.settings import AnswererSettings
    from corral.batch import answer_file
    from corral.batch.local_worker import answer_locally
    from corral.progress import Progress
    from corral.recipe import Answer

    voted = {"method": "rouge-l", "n": SAMPLES, "temperature": TEMPERATURE, "top_p": TOP_P, "stop": "never"}
    answer = Answer.model_validate({"max_tokens": TOKENS, "consensus": voted})
    settings = AnswererSettings(MODEL, answer, 0, "openvino")
    answerer = settings.open_answerer()
    warmed = warm(answerer)
    with tempfile.TemporaryDirectory() as name:
        prompts, out = Path(name) / "prompts.jsonl", Path(name) / "answers.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        made_of = settings.identity()

        def opened() -> Answerer:
            return warmed

        began = time.perf_counter()
        answering = partial(answer_locally, opened, settings.choices_per_prompt, settings.seed)
        outcome = answer_file(str(prompts), out, made_of, answering, Progress())
        result = figures(len(rows) * SAMPLES, outcome.figures.tokens, began)
    if outcome.figures.bad:
        sys.exit(f"bad rows: {outcome.figures.faults}")
    return result


def warm(answerer: Any) -> Any:
    import asyncio

    from corral.engines.base import Sampling

    async def work() -> None:
        await answerer.engine.submit([5, 6, 7], Sampling(max_tokens=4)).completions()

    asyncio.run(work())
    return answerer


def figures(completions: int, tokens: int, began: float) -> dict[str, Any]:
    seconds = time.perf_counter() - began
    return {
        "completions": completions,
        "tokens": tokens,
        "seconds": seconds,
        "completions_per_second": completions / seconds,
        "tokens_per_second": tokens / seconds,
        "mean_length": tokens / completions,
    }


SIDES = {"corral": side_corral, "raw": side_raw, "batched": side_batched, "sequential": side_sequential}


def measure(side: str, options: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--prompts", str(options.prompts), "--part", str(options.part)]
    command += ["--sizes", *map(str, options.sizes)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    print(
        f"{side:<10}  {result['completions_per_second']:8.2f} completions/s  {result['tokens_per_second']:8.1f} tokens/s  "
        f"{result['completions']:5} completions of {result['mean_length']:.1f} tokens on average"
        + (f", batch of {result['batch_size']}" if "batch_size" in result else ""),
        flush=True,
    )
    return result


def main() -> int:
    parser = claims.parser(__doc__)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[25, 50, 100, 200], help="batch sizes to try")
    parser.add_argument("--part", type=float, default=0.5, help="of the prompts, for batched transformers")
    parser.add_argument("--side", choices=SIDES, help="measure one side in this process and print JSON")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(SIDES[args.side](questions(args.prompts), args)))
        return 0
    rounds = [{side: measure(side, args) for side in SIDES} for _ in range(args.rounds)]

    def ratio(other: str) -> float:
        speed = "completions_per_second"
        return statistics.median(each["corral"][speed] / each[other][speed] for each in rounds)

    results = [
        claims.Claim("batch_vs_sequential", ratio("sequential"), "×", 25),
        claims.Claim("batch_vs_batched_transformers", ratio("batched"), "×", 3.5),
        claims.Claim("batch_vs_raw_engine", ratio("raw"), "×", 0.95),
    ]
    raw = {"prompts": args.prompts, "samples": SAMPLES, "max_tokens": TOKENS, "rounds": rounds}
    return claims.report(results, raw, ["torch", "transformers", "openvino", "openvino-genai"], args.json)


if __name__ == "__main__":
    sys.exit(main())
