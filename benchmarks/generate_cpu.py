"""Generation on a CPU: corral's openvino engine against transformers' batched generate and plain OpenVINO GenAI.

20 prompts (recipes from Wikibooks) × 5 samples × 128 tokens of SmolLM2-135M-Instruct, temperature 0.7, top-p 0.9, end
tokens ignored so that all sides generate equally many. Equal precision: float32 weights, products, keys and values. Each side
runs in a process of its own, one after another, `--rounds` times; a claim is the median over rounds of the ratio within a
round. Loading is not counted, and each side warms up on one short answer. transformers runs one batch of 100; plain OpenVINO
GenAI gets the same model files, and five samples of each prompt as one request.

int8 and int4 are measured too, with the change of loss from their contracts.

    python benchmarks/generate_cpu.py [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import claims

PROMPTS, SAMPLES, TOKENS = 20, 5, 128
TEMPERATURE, TOP_P = 0.7, 0.9
PRECISION = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def base_folder() -> Path:
    from corral.model.loading import resolve_model

    return resolve_model("asset:smollm2-135m-instruct").folder


def prompts() -> list[list[int]]:
    """The first test rows of the quickstart recipe, rendered."""
    from corral.data.prepare import prepare
    from corral.model.loading import load_template
    from corral.progress import Progress
    from corral.recipe import Data, Source

    template = load_template(base_folder())
    data = Data(sources=(Source(path="asset:wikibooks-recipes", format="wikibooks-recipes"),), max_length=512)
    with tempfile.TemporaryDirectory() as name:
        test = prepare(data, template, Path(name), 7, Progress()).test
        return [template.prompt(test[i].record.split_answer()[0]) for i in range(PROMPTS)]


def side_transformers(prompt_ids: list[list[int]]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32).eval()
    width = max(map(len, prompt_ids))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompt_ids])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompt_ids])
    settings = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0, "pad_token_id": 0}
    model.generate(input_ids=ids[:1], attention_mask=mask[:1], max_new_tokens=4, **settings)
    torch.manual_seed(0)
    began = time.perf_counter()
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        num_return_sequences=SAMPLES,
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        **settings,
    )
    return figures(out[:, width:].numel(), began)


def side_raw(prompt_ids: list[list[int]]) -> dict[str, Any]:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    from corral.model.openvino_graph import cached_form

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2
    pipeline = genai.ContinuousBatchingPipeline(str(cached_form(base_folder(), "f32")), scheduler, "CPU", PRECISION)

    def config(n: int, tokens: int) -> Any:
        settings = genai.GenerationConfig(
            max_new_tokens=tokens, num_return_sequences=n, do_sample=True, ignore_eos=True
        )
        settings.temperature, settings.top_p = TEMPERATURE, TOP_P
        settings.set_eos_token_id(0)
        return settings

    inputs = [ov.Tensor(np.array([p], dtype=np.int64)) for p in prompt_ids]
    pipeline.generate(inputs[:1], [config(1, 4)])
    began = time.perf_counter()
    results = pipeline.generate(inputs, [config(SAMPLES, TOKENS)] * len(inputs))
    return figures(sum(len(ids) for result in results for ids in result.m_generation_ids), began)


def side_corral(prompt_ids: list[list[int]], folder: Path | None = None) -> dict[str, Any]:
    import asyncio

    from corral.engines.base import Sampling
    from corral.engines.registry import load_engine

    sampling = Sampling(max_tokens=TOKENS, n=SAMPLES, temperature=TEMPERATURE, top_p=TOP_P, seed=0)

    async def work() -> dict[str, Any]:
        async with load_engine("openvino", folder or base_folder(), dtype="float32", device="cpu") as engine:
            await engine.submit(prompt_ids[0], Sampling(max_tokens=4)).completions()
            began = time.perf_counter()
            done = await asyncio.gather(*(engine.submit(p, sampling).completions() for p in prompt_ids))
            return figures(sum(len(c.ids) for each in done for c in each), began)

    return asyncio.run(work())


def figures(tokens: int, began: float) -> dict[str, Any]:
    seconds = time.perf_counter() - began
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


def export_base(kind: str, out: Path) -> tuple[Path, dict[str, Any]]:
    """Export the base in another form. Returns: its folder, and the checks of its contract by name."""
    from corral.export import contract
    from corral.export.export import export_form
    from corral.export_forms import ExportForm
    from corral.progress import Progress

    form = ExportForm("openvino", kind)
    folder = export_form(base_folder(), out, form, Progress())
    checks = contract.read(form.contract_path(out))["checks"]
    return folder, {check["name"]: check["detail"] for check in checks}


SIDES = {"transformers": side_transformers, "openvino-raw": side_raw, "corral": side_corral}


def measure(side: str, *extra: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, *extra]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    if result["tokens"] != PROMPTS * SAMPLES * TOKENS:
        sys.exit(f"{side} generated {result['tokens']} tokens")
    return result


def main() -> int:
    parser = claims.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="measure one side in this process and print JSON")
    parser.add_argument("--form", type=Path, help="an exported folder, for corral's side")
    args = parser.parse_args()
    if args.side:
        prompt_ids = prompts()
        print(json.dumps(side_corral(prompt_ids, args.form) if args.form else SIDES[args.side](prompt_ids)))
        return 0
    rounds: list[dict[str, dict[str, Any]]] = []
    for _ in range(args.rounds):
        rounds.append({side: measure(side) for side in SIDES})
        print(
            "  ".join(f"{side} {figures['tokens_per_second']:.1f}" for side, figures in rounds[-1].items()), flush=True
        )
    forms: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for kind in ("int8", "int4"):
            folder, checks = export_base(kind, Path(name))
            forms[kind] = measure("corral", "--form", str(folder)) | {"contract": checks}
            print(f"{kind} {forms[kind]['tokens_per_second']:.1f}  {checks['as served']}", flush=True)

    def ratio(other: str) -> float:
        return statistics.median(r["corral"]["tokens_per_second"] / r[other]["tokens_per_second"] for r in rounds)

    results = [
        claims.Claim("generate_vs_transformers", ratio("transformers"), "×", 3.5),
        claims.Claim("generate_vs_openvino", ratio("openvino-raw"), "×", 0.95),
    ]
    shifts = {
        kind: float(re.search(r": ([+-][\d.]+) \(allowed", forms[kind]["contract"]["as served"])[1]) for kind in forms
    }
    raw = {"rounds": rounds, "forms": forms, "loss_shift": shifts}
    return claims.report(results, raw, ["torch", "transformers", "openvino", "openvino-genai"], args.json)


if __name__ == "__main__":
    sys.exit(main())
