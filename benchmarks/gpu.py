"""LoRA fine-tuning on a GPU: corral against plain transformers + PEFT, in bfloat16, one after the other in one process.

The models have the published shapes of Llama-3.2-3B and Llama-3.1-8B and random weights, so nothing is downloaded. LoRA
of rank 16 on q, k, v and o, AdamW, float32 adapters, the same rows in the same order. Two kinds of rows:

- `long`: documents of 4,096 tokens, all trained, 8 a step;
- `mix`: rows with the lengths of R1's ten sources (see `gpu_rows`), answers trained, 32 a step.

corral trains in its own loop with packs of 16,384 tokens. It is compared with a careful loop of the usual kind: transformers'
model with SDPA, PEFT, autocast, fused AdamW, the rows of a step sorted by length into padded micro-batches as large as memory
allows, with gradient checkpointing only if a single row does not fit without. Speed counts real tokens (no padding) after
the first steps, in which kernels are compiled; memory is torch's peak allocation after them.

MFU is 4·N·tokens/s over the peak rate of the GPU: a frozen weight takes one product in the forward pass and one for its
input's gradient, none for its own; N counts all parameters; attention's own products are not counted. The results also give
6·N (as for full fine-tuning), and 4·N with attention relative to the rate of a large product measured in the same run.

First a tiny model's losses and gradients on the GPU are compared with plain transformers on the CPU in float32: float32 to
rounding, and bfloat16 next to the error of plain transformers + PEFT in bfloat16.

Then it compares packs with their sequences alone, the peak of memory with corral's estimate of it, and generation by corral's
transformers engine with transformers' own. The slower ways that this GPU is given, with their reasons, are in the results.

Needs torch ≥ 2.11, transformers ≥ 5.17, peft, numpy and pydantic; corral itself need not be installed. Without a CUDA device
it says so and exits with 2; `--rehearse` runs everything on tiny models on the CPU, to test this script, and claims nothing.

    python benchmarks/gpu.py [--json FILE] [--quick] [--rehearse]
"""

from __future__ import annotations

import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import claims
from gpu_checks import estimate_ratio, generation, packed_gap
from gpu_rows import Row, documents, mix

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
PACK = 16_384
PEAKS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}  # dense bfloat16, SXM forms, by NVIDIA's data sheets
SHAPES: dict[str, dict[str, Any]] = {
    name: {
        "vocab_size": 128_256,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    for name, hidden, inner, layers, tied, factor in (
        ("3b", 3072, 8192, 28, True, 32.0),
        ("8b", 4096, 14_336, 32, False, 8.0),
    )
}
TINY: dict[str, Any] = SHAPES["8b"] | {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GOALS: dict[str, tuple[str, float, str]] = {
    "mfu_3b": ("of the peak rate, 4N a token", 0.5, ">="),
    "tokens_per_second_8b": ("tokens/s", 15_000, ">="),
    "speed_vs_plain_3b": ("×", 1.5, ">="),
    "speed_vs_plain_8b": ("×", 1.5, ">="),
    "mix_samples_per_second_3b": ("rows/s", 60, ">="),
    "mix_speed_vs_plain_3b": ("×", 2, ">="),
    "peak_memory_gb_8b": ("GB", 100, "<="),
    "mix_peak_memory_vs_plain_3b": ("×", 0.8, "<="),
    "estimate_error_8b": ("of the measured peak", 0.1, "<="),
    "packed_gap_float32": ("nats", 1e-3, "<="),
    "packed_gap_bfloat16": ("nats", 0.1, "<="),
    "generate_speed_vs_plain_3b": ("×", 1.0, ">="),
    "first_loss_gap": ("nats", 0.02, "<="),
    "float32_gradient_gap": ("relative", 1e-3, "<="),
    "bfloat16_gradient_gap_vs_plain": ("×", 1.25, "<="),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Device, dtype and size of what is run."""

    device: str
    dtype: str
    shapes: dict[str, dict[str, Any]]
    document: int
    documents: int
    rows: int
    pack: int
    warm: int
    steps: int


def sizes(*, quick: bool, rehearse: bool) -> Sizes:
    if not rehearse:
        return Sizes("cuda", "bfloat16", SHAPES, 4096, 8, 32, PACK, 3, 4 if quick else 12)
    return Sizes("cpu", "float32", {"3b": TINY, "8b": TINY}, 64, 2, 4, 512, 1, 1)


def base_model(shape: dict[str, Any], device: str, dtype: str) -> Any:
    """A model with random weights, which are the same at each call on the same device."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**shape)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    return model.to(device).eval()


def plain_adapter(model: Any) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=list(TARGETS), task_type="CAUSAL_LM"))


def side_corral(base: Any, batches: Sequence[Sequence[Row]], size: Sizes) -> dict[str, Any]:
    """corral's own loop over a fresh adapter."""
    from corral.data.example_store import Example
    from corral.messages import Conversation
    from corral.model import adapters
    from corral.recipe import Lora
    from corral.template import Encoded
    from corral.training.loop import Trainer
    from corral.training.objective_table import build_objective

    record = Conversation.from_turns(("user", "?"), ("assistant", "!"))
    rows = [row for batch in batches for row in batch]
    examples = [Example(str(i), "random", i, (Encoded(*row),), record) for i, row in enumerate(rows)]
    model = adapters.attach(base, Lora(rank=16, targets=TARGETS), seed=1)
    clock, config = Clock(size), settings(len(batches[0]), len(batches))
    # The trainer shuffles; put each example where the trainer will look for it at its turn.
    shuffled: list[Any] = [None] * len(rows)
    for index, example in zip(training_order(rows, config), examples, strict=True):
        shuffled[index] = example
    with tempfile.TemporaryDirectory() as name:
        trainer = Trainer(
            model,
            shuffled,
            [],
            build_objective(config),
            config,
            pack_length=size.pack,
            seed=0,
            folder=Path(name),
            save_best=lambda: None,
        )
        trainer.run(on_step=lambda m: clock.tick(m.loss or math.nan, m.tokens))
    return clock.figures(len(batches[0]))


def settings(per_step: int, steps: int) -> Any:
    from corral.recipe import Optimizer, Train

    rate = Optimizer(schedule="constant", warmup_ratio=0)
    return Train(steps=steps, batch_size=per_step, checkpoint_every=10**6, optimizer=rate)


def training_order(rows: Sequence[Row], config: Any) -> list[int]:
    """Indices of the rows in the order in which the trainer takes them."""
    from corral.training.sampler import BatchSampler

    sampler = BatchSampler(config, [1] * len(rows), 0)
    return [i for step in range(1, sampler.steps + 1) for i in sampler.batch(step)]


class Clock:
    """Times of steps; the first ones, in which kernels are compiled and memory is allocated, are not counted."""

    def __init__(self, size: Sizes) -> None:
        self._size, self._log = size, [(time.perf_counter(), 0, math.nan)]

    def tick(self, loss: float, tokens: int) -> None:
        """Record the end of a step, also on the device; `tokens` is the total so far."""
        self._log.append((time.perf_counter(), tokens, loss))
        if len(self._log) == self._size.warm + 1 and self._size.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()

    def figures(self, per_step: int) -> dict[str, Any]:
        import torch

        (began, before, _), (ended, after, _) = self._log[self._size.warm], self._log[-1]
        steps, seconds = len(self._log) - 1 - self._size.warm, ended - began
        return {
            "tokens_per_second": (after - before) / seconds,
            "rows_per_second": steps * per_step / seconds,
            "seconds_a_step": seconds / steps,
            "seconds_of_first_steps": began - self._log[0][0],
            "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if self._size.device == "cuda" else None,
            "losses": [loss for _, _, loss in self._log[1:]],
        }


def side_plain(base: Any, batches: Sequence[Sequence[Row]], size: Sizes) -> dict[str, Any]:
    """transformers + PEFT, with as many rows at a time as fit, and gradient checkpointing if not even one fits."""
    import torch

    model = plain_adapter(base)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        at_once = len(batches[0])
        while at_once:
            try:
                figures = plain_steps(model, batches, at_once, size)
                return figures | {"rows_at_once": at_once, "gradient_checkpointing": checkpointing}
            except torch.OutOfMemoryError:
                at_once //= 2
            gc.collect()
            torch.cuda.empty_cache()
    raise SystemExit("plain transformers does not fit into this GPU")


def plain_steps(model: Any, batches: Sequence[Sequence[Row]], at_once: int, size: Sizes) -> dict[str, Any]:
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=True)
    optimizer.zero_grad(set_to_none=True)
    model.train()
    clock, tokens = Clock(size), 0
    for drawn in batches:
        batch = sorted(drawn, key=lambda row: len(row[0]))
        units = sum(sum(marks[1:]) for _, marks in batch)
        total = torch.zeros((), device=size.device)
        for start in range(0, len(batch), at_once):
            with torch.autocast(size.device, torch.bfloat16, enabled=size.dtype == "bfloat16"):
                loss = plain_loss(model, batch[start : start + at_once], size.device) / units
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += sum(len(ids) for ids, _ in batch)
        clock.tick(total.item(), tokens)
    return clock.figures(len(batches[0]))


def plain_loss(model: Any, batch: Sequence[Row], device: str) -> Any:
    """transformers' own loss: the summed negative log-likelihood of the trained tokens of a padded batch."""
    import torch

    longest = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in batch])
    seen = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch])
    marks = torch.tensor([[*marks, *[False] * (longest - len(marks))] for _, marks in batch])
    labels = ids.masked_fill(~marks, -100)
    mask = None if bool(seen.all()) else seen.to(device)  # without one SDPA takes its fast causal path
    # With `num_items_in_batch` transformers divides the sum by it, which is what its Trainer does.
    return model(
        input_ids=ids.to(device), attention_mask=mask, labels=labels.to(device), num_items_in_batch=1, use_cache=False
    ).loss


def correctness(device: str) -> dict[str, float]:
    """Relative error of the gradients of a tiny model's adapter, against plain transformers on the CPU in float32."""
    import torch

    from corral.model.compute.fused_forwards import fuse
    from corral.model.packed_forward import target_logprobs

    rows = [((row := documents(1, n, TINY["vocab_size"])[0])[0], row[1]) for n in (7, 130, 2, 64)]

    def gradients(where: str, dtype: str, *, ours: bool) -> Any:
        model = plain_adapter(base_model(TINY, "cpu", "float32").to(getattr(torch, dtype)))
        with torch.no_grad():
            for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
                p.data = torch.sin(torch.arange(p.numel()) * (0.7 + 0.01 * i)).view(p.shape) * 0.1
        model.to(where).train()
        if ours:
            fuse(model)
            logprobs = target_logprobs(model, [ids for ids, _ in rows], [range(1, len(ids)) for ids, _ in rows])
            loss = -torch.cat(logprobs).sum()
        else:
            loss = torch.stack([plain_loss(model, [row], where) for row in rows]).sum()
        loss.backward()
        return torch.cat([p.grad.float().cpu().flatten() for p in model.parameters() if p.requires_grad])

    exact = gradients("cpu", "float32", ours=False)

    def gap(dtype: str, *, ours: bool) -> float:
        return ((gradients(device, dtype, ours=ours) - exact).norm() / exact.norm()).item()

    wide, half, plain = gap("float32", ours=True), gap("bfloat16", ours=True), gap("bfloat16", ours=False)
    return {"float32": wide, "bfloat16": half, "bfloat16_plain": plain}


def product_rate(size: Sizes) -> float:
    """FLOP/s of a matrix product with the shape of the 3B model's MLP, in the dtype of training."""
    import torch

    n, shape = min(size.pack, 16_384), size.shapes["3b"]
    x = torch.randn(n, shape["hidden_size"], device=size.device, dtype=getattr(torch, size.dtype))
    weight = torch.randn(shape["intermediate_size"], shape["hidden_size"], device=size.device, dtype=x.dtype)
    rate = 0.0
    for _ in range(3):
        synchronise(size)
        began = time.perf_counter()
        for _ in range(20):
            _ = x @ weight.T
        synchronise(size)
        rate = max(rate, 20 * 2 * n * weight.numel() / (time.perf_counter() - began))
    return rate


def synchronise(size: Sizes) -> None:
    import torch

    if size.device == "cuda":
        torch.cuda.synchronize()


def shares(name: str, parameters: int, figures: dict[str, Any], size: Sizes, rate: float) -> dict[str, float | None]:
    """Share of the GPU's rate that a side reaches on long documents, by three conventions."""
    import torch

    shape = size.shapes[name]
    gpu = torch.cuda.get_device_name() if size.device == "cuda" else ""
    peak = next((peak for part, peak in PEAKS.items() if part in gpu), None)
    speed = figures["tokens_per_second"]
    # Causal scores and weighted values: half of 4 · length · heads · head size in the forward pass, 2.5 times that backward.
    square = 3.5 * 2 * size.document * shape["num_attention_heads"] * shape["head_dim"] * shape["num_hidden_layers"]
    return {
        "mfu_4n": 4 * parameters * speed / peak if peak else None,
        "mfu_6n": 6 * parameters * speed / peak if peak else None,
        "with_attention_of_measured_product_rate": (4 * parameters + square) * speed / rate,
    }


def measured(name: str, kind: str, size: Sizes) -> dict[str, Any]:
    """Run both sides on one model and kind of rows."""
    import torch

    shape = size.shapes[name]
    per_step = size.documents if kind == "long" else size.rows
    total = per_step * (size.warm + size.steps)
    vocabulary = shape["vocab_size"]
    rows = documents(total, size.document, vocabulary) if kind == "long" else mix(total, vocabulary)
    batches = [rows[start : start + per_step] for start in range(0, total, per_step)]
    result: dict[str, Any] = {"rows": total, "tokens": sum(len(ids) for ids, _ in rows)}
    sides: dict[str, Callable[..., dict[str, Any]]] = {"corral": side_corral, "plain": side_plain}
    for side, run in sides.items():
        base = base_model(shape, size.device, size.dtype)
        result["parameters"] = sum(p.numel() for p in base.parameters())
        result[side] = run(base, batches, size)
        del base
        gc.collect()
        if size.device == "cuda":
            torch.cuda.empty_cache()
        printed = {k: v for k, v in result[side].items() if k != "losses"}
        print(f"{name} {kind} {side}: {json.dumps(printed)}", flush=True)
    return result


def make_claims(raw: dict[str, Any]) -> Iterator[claims.Claim]:
    three, eight, mixed = raw["3b long"], raw["8b long"], raw["3b mix"]
    values = {
        "mfu_3b": three["shares"]["mfu_4n"] or math.nan,
        "tokens_per_second_8b": eight["corral"]["tokens_per_second"],
        "speed_vs_plain_3b": three["corral"]["tokens_per_second"] / three["plain"]["tokens_per_second"],
        "speed_vs_plain_8b": eight["corral"]["tokens_per_second"] / eight["plain"]["tokens_per_second"],
        "mix_samples_per_second_3b": mixed["corral"]["rows_per_second"],
        "mix_speed_vs_plain_3b": mixed["corral"]["rows_per_second"] / mixed["plain"]["rows_per_second"],
        "peak_memory_gb_8b": eight["corral"]["peak_memory_gb"],
        "mix_peak_memory_vs_plain_3b": mixed["corral"]["peak_memory_gb"] / mixed["plain"]["peak_memory_gb"],
        "estimate_error_8b": abs(raw["estimate_ratio_8b"] - 1),
        "packed_gap_float32": raw["packed_gap"]["float32"],
        "packed_gap_bfloat16": raw["packed_gap"]["bfloat16"],
        "generate_speed_vs_plain_3b": (
            raw["generation_3b"]["corral_tokens_per_second"] / raw["generation_3b"]["plain_tokens_per_second"]
        ),
        "first_loss_gap": max(raw[kind]["first_loss_gap"] for kind in ("3b long", "3b mix", "8b long")),
        "float32_gradient_gap": raw["correctness"]["float32"],
        "bfloat16_gradient_gap_vs_plain": raw["correctness"]["bfloat16"] / raw["correctness"]["bfloat16_plain"],
    }
    for name, (unit, goal, direction) in GOALS.items():
        yield claims.Claim(name, values[name], unit, goal, ">=" if direction == ">=" else "<=")


def not_run(json_file: Path | None) -> int:
    print("\nno CUDA device: tiny models were run on the CPU, and nothing is claimed")
    if json_file:
        stated = [
            {"name": name, "value": None, "unit": unit, "goal": goal, "direction": direction, "met": "not run"}
            for name, (unit, goal, direction) in GOALS.items()
        ]
        content = {"claims": stated, "raw": "not run: no CUDA device", "machine": claims.machine()}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def checks(size: Sizes) -> dict[str, Any]:
    """Packs against their sequences, generation, and why anything is computed in a slower way."""
    import torch

    from corral.model import packed_forward

    gaps = {
        dtype: packed_gap(base_model(TINY, "cpu", "float32").to(size.device, getattr(torch, dtype)), TINY["vocab_size"])
        for dtype in ("float32", "bfloat16")
    }
    model = base_model(size.shapes["3b"], size.device, size.dtype)
    how = {"prompts": 64, "length": 128, "new": 128} if size.device == "cuda" else {"prompts": 3, "length": 8, "new": 4}
    figures = generation(model, size.shapes["3b"]["vocab_size"], **how)
    found = {"packed_gap": gaps, "generation_3b": figures, "fallbacks": packed_forward.fallbacks(model)}
    del model
    gc.collect()
    if size.device == "cuda":
        torch.cuda.empty_cache()
    print(json.dumps(found), flush=True)
    return found


def main() -> int:
    parser = claims.parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--rehearse", action="store_true", help="run on tiny models on the CPU, to test this script")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent.parent))  # corral need not be installed
    import torch

    if not (torch.cuda.is_available() or args.rehearse):
        print("no CUDA device: nothing was run (--rehearse runs tiny models on the CPU)", file=sys.stderr)
        return 2
    size = sizes(quick=args.quick, rehearse=args.rehearse)
    raw: dict[str, Any] = {"correctness": correctness(size.device), "product_rate": product_rate(size)}
    print(json.dumps(raw), flush=True)
    if raw["correctness"]["float32"] > GOALS["float32_gradient_gap"][1]:
        raise SystemExit("the gradients are wrong: speed means nothing")
    raw |= checks(size)
    for name, kind in (("3b", "long"), ("3b", "mix"), ("8b", "long")):
        if name == "8b":
            torch.compiler.reset()  # other shapes: torch keeps few programs of one function
        figures = measured(name, kind, size)
        if kind == "long":
            figures["shares"] = shares(name, figures["parameters"], figures["corral"], size, raw["product_rate"])
        figures["first_loss_gap"] = gap = abs(figures["corral"]["losses"][0] - figures["plain"]["losses"][0])
        if size.device == "cpu" and gap > 1e-3:
            raise SystemExit(f"{name} {kind}: the first losses are {gap:.3g} apart")
        raw[f"{name} {kind}"] = figures
    peak = raw["8b long"]["corral"]["peak_memory_gb"] or math.nan
    tokens = min(size.pack, size.documents * size.document)
    raw["estimate_ratio_8b"] = estimate_ratio(size.shapes["8b"], settings(size.documents, 1), tokens, peak)
    if size.device != "cuda":
        return not_run(args.json)
    raw["gpu"] = torch.cuda.get_device_name()
    return claims.report(list(make_claims(raw)), raw, ["torch", "transformers", "peft", "triton"], args.json)


if __name__ == "__main__":
    sys.exit(main())
