"""LoRA fine-tuning on a CPU: corral against TRL's SFTTrainer on the same rows, one process after another.

Each side trains the same adapter (rank 16 on q, k, v, o; float32) of SmolLM2-135M-Instruct on the same recipes from
Wikibooks, 8 rows a step, loss on the answers only. Speed counts real tokens (no padding) from the end of the first step to
the end of the last; memory is the peak resident size of the process.

- `train_speed_vs_trl`, `train_memory_vs_trl`: TRL runs twice: as it comes (padded batches of 4, accumulated twice) and
  packed (best-fit decreasing into 1,024 tokens); the faster one is TRL's best, and the leaner one is what memory is held
  against. `train_loss_gap` is the largest difference of a step's loss from TRL's unpacked form.
- `qlora_speed_vs_trl`: both with the base in NF4 with double quantisation, through bitsandbytes; TRL packed, its faster
  form, for half the steps.
- `train_linearity_8x`: seconds per token of a run over 8 times the rows of another, which runs before and after it.
- `train_share_of_gemm_limit`: the time that the arithmetic of corral's steps would take if it were all done at the rate of
  the model's matrix products (corral's own product, the model's weights in turn, as in a pass of 512 tokens; the mean of
  many rounds before and after), as a share of the time that the steps took. Counted is what a step needs for the tokens and
  positions that it computes (`needed_flops`), not what the program does besides: no scores of attention formed twice, no
  rows that fill up, no W + BA.

    python benchmarks/train_cpu.py [--steps 9] [--json FILE]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import claims
import sides

ROWS_PER_STEP = 8
PACK = 1024  # of TRL's packed form
LR = 2e-4
WARM_UP = 2  # rounds of products that are not counted


def prepare_rows(folder: Path, rows: int) -> Any:
    """(model folder, tokenizer, the first `rows` training examples in step order)."""
    from corral.data.prepare import prepare
    from corral.model.loading import load_template, resolve_model
    from corral.progress import Progress
    from corral.recipe import Data, Source, Train
    from corral.training.sampler import BatchSampler

    base = resolve_model("asset:smollm2-135m-instruct").folder
    template = load_template(base)
    data = Data(sources=(Source(path="asset:wikibooks-recipes", format="wikibooks-recipes"),), max_length=512)
    train = prepare(data, template, folder, 0, Progress()).train
    sampler = BatchSampler(Train(steps=rows // ROWS_PER_STEP, batch_size=ROWS_PER_STEP), train.lengths.tolist(), 0)
    return (
        base,
        template.tokenizer,
        train,
        [train[i] for step in range(1, sampler.steps + 1) for i in sampler.batch(step)],
    )


def side_corral(steps: int, *, nf4: bool = False) -> dict[str, Any]:
    from corral.model import adapters, loading
    from corral.model.quantisation import Quantization
    from corral.recipe import Lora, Optimizer, Train
    from corral.training.loop import Trainer
    from corral.training.objective_table import build_objective

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, _, train, examples = prepare_rows(folder, steps * ROWS_PER_STEP)
        quantization = Quantization("nf4") if nf4 else None
        loaded = loading.load_model(base, dtype="float32", device="cpu", quantization=quantization)
        model = adapters.attach(loaded, Lora(), seed=0)
        config = Train(
            steps=steps,
            batch_size=ROWS_PER_STEP,
            checkpoint_every=10**6,
            optimizer=Optimizer(lr=LR, schedule="constant", warmup_ratio=0),
        )
        trainer = Trainer(
            model,
            train,
            [],
            build_objective(config),
            config,
            pack_length=512,
            seed=0,
            folder=folder,
            save_best=lambda: None,
        )
        log: list[tuple[float, int, float]] = []
        trainer.run(on_step=lambda m: log.append((time.perf_counter(), m.tokens, m.loss or 0.0)))
    seconds, tokens = log[-1][0] - log[0][0], log[-1][1] - log[0][1]
    measured = [s for e in examples[ROWS_PER_STEP:] for s in e.sequences]
    return {
        "tokens_per_second": tokens / seconds,
        "tokens": tokens,
        "seconds": seconds,
        "needed_flops": needed_flops(loaded.config, [(len(s.ids), sum(s.trained)) for s in measured]),
        "losses": [x[2] for x in log],
    }


def needed_flops(config: Any, sequences: list[tuple[int, int]], rank: int = 16) -> float:
    """What a step of LoRA on q, k, v, o needs at least, for sequences of (tokens, trained tokens).

    A product of [m, k] and [k, n] counts 2mkn. Frozen weights: one forward, one for the gradient by their input (which the
    first layer's q, k and v need not have). Adapters: A and B, forwards, and for the gradients by both and by their input.
    Attention: pairs of positions that see each other, two products forwards and four backwards. The head: as a frozen
    weight, at trained positions alone.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    projections = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    frozen = sum(i * o for i, o in projections) + 3 * hidden * config.intermediate_size
    first = sum(i * o for i, o in projections[:3])
    adapters = sum(rank * (i + o) for i, o in projections)
    per_token = layers * (4 * frozen + 6 * adapters) - 2 * first
    pairs = sum(n * (n + 1) // 2 for n, _ in sequences)
    tokens, trained = (sum(column) for column in zip(*sequences, strict=True))
    return per_token * tokens + layers * 6 * 2 * queries * pairs + 4 * hidden * config.vocab_size * trained


def side_gemm(steps: int) -> dict[str, Any]:
    """The rate of the model's products as a pass of 512 tokens, half of them trained, goes through them."""
    import torch

    from corral.model.compute.cpu_matmul import times_transposed
    from corral.model.loading import load_model, resolve_model

    model: Any = load_model(resolve_model("asset:smollm2-135m-instruct").folder, dtype="float32", device="cpu")
    layers = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    products = [(weight, 512) for weight in layers] + [(model.get_output_embeddings().weight, 256)]
    rates: list[float] = []
    with torch.no_grad():
        inputs = {(n, size): torch.randn(n, size) for weight, n in products for size in weight.shape}
        for _ in range(WARM_UP + max(3, 2 * steps)):
            began = time.perf_counter()
            for weight, n in products:
                times_transposed(inputs[n, weight.shape[1]], weight)
            for weight, n in reversed(products):
                times_transposed(inputs[n, weight.shape[0]], weight.T)
            rates.append(sum(4 * n * weight.numel() for weight, n in products) / (time.perf_counter() - began))
    sustained = rates[WARM_UP:]
    return {"flops_per_second": len(sustained) / sum(1 / rate for rate in sustained), "rates": rates}


def side_trl(steps: int, *, packed: bool, nf4: bool = False) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, tokenizer, _, examples = prepare_rows(folder, steps * ROWS_PER_STEP)
        rows = [
            {"input_ids": list(s.ids), "completion_mask": [int(t) for t in s.trained]}
            for e in examples
            for s in e.sequences
        ]
        config = SFTConfig(
            output_dir=str(folder / "out"),
            num_train_epochs=1,
            per_device_train_batch_size=1 if packed else 4,
            gradient_accumulation_steps=3 if packed else 2,
            packing=packed,
            packing_strategy="bfd",
            max_length=PACK,
            completion_only_loss=True,
            learning_rate=LR,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_grad_norm=1.0,
            weight_decay=0.0,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        times: list[float] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                times.append(time.perf_counter())

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype="float32", **({"quantization_config": quantization} if nf4 else {})
        )
        lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[Clock()],
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        in_first = config.per_device_train_batch_size * config.gradient_accumulation_steps
        first = sum(map(len, trainer.train_dataset[:in_first]["input_ids"]))
    tokens = sum(len(r["input_ids"]) for r in rows) - first
    return {"tokens_per_second": tokens / (times[-1] - times[0]), "tokens": tokens, "losses": losses}


SIDES: dict[str, sides.Side] = {
    "trl": lambda steps: side_trl(steps, packed=False),
    "trl-packed": lambda steps: side_trl(steps, packed=True),
    "gemm": side_gemm,
    "corral": side_corral,
    "gemm-again": side_gemm,
    "trl-nf4": lambda steps: side_trl(max(2, steps // 2), packed=True, nf4=True),
    "corral-nf4": lambda steps: side_corral(max(2, steps // 2), nf4=True),
    "corral-1x": lambda steps: side_corral(max(2, steps // 2)),
    "corral-8x": lambda steps: side_corral(8 * max(2, steps // 2)),
    "corral-1x-again": lambda steps: side_corral(max(2, steps // 2)),
}


def main() -> int:
    args = sides.options(__doc__, SIDES, 9, "steps of the longest TRL side, from which the others follow")
    measured = {side: sides.measure(__file__, side, args.steps) for side in SIDES}
    packages = ["torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes"]
    return claims.report(make_claims(measured), measured, packages, args.json)


def make_claims(measured: dict[str, dict[str, Any]]) -> list[claims.Claim]:
    """The claims from the figures of all sides."""
    speeds = {side: result["tokens_per_second"] for side, result in measured.items() if "tokens_per_second" in result}
    theirs = (measured["trl"], measured["trl-packed"])
    ours = measured["corral"]
    memory = ours["peak_memory_bytes"] / min(s["peak_memory_bytes"] for s in theirs)
    gap = max(abs(a - b) for a, b in zip(ours["losses"], measured["trl"]["losses"], strict=True))
    rate = (measured["gemm"]["flops_per_second"] + measured["gemm-again"]["flops_per_second"]) / 2
    share = ours["needed_flops"] / rate / ours["seconds"]
    once = (speeds["corral-1x"] + speeds["corral-1x-again"]) / 2
    return [
        claims.Claim("train_speed_vs_trl", speeds["corral"] / max(speeds["trl"], speeds["trl-packed"]), "×", 2.2),
        claims.Claim("train_memory_vs_trl", memory, "×", 0.4, "<="),
        claims.Claim("train_loss_gap", gap, "nats", 1e-3, "<="),
        claims.Claim("train_share_of_gemm_limit", share, "of the limit", 0.65),
        claims.Claim("qlora_speed_vs_trl", speeds["corral-nf4"] / speeds["trl-nf4"], "×", 2),
        claims.Claim("train_linearity_8x", once / speeds["corral-8x"], "×", 1.1, "<="),
    ]


if __name__ == "__main__":
    sys.exit(main())
