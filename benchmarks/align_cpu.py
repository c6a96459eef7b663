"""Direct preference optimisation on a CPU: corral against TRL's DPOTrainer on the same pairs, one process after another.

Each side trains the same adapter (rank 16 on q, k, v, o; float32) of SmolLM2-135M-Instruct on the same pairs of answers that
people rated by their harm, 8 pairs a step, with β 0.1 and the preference term alone: TRL takes its SFT term per micro-batch,
so its losses would depend on how a step is cut. Speed counts real tokens (prompt and answer of both sequences of a pair, no
padding) over the time from the end of the first step to the end of the last, with the time that these pairs'
log-probabilities under the reference took before the first step; the raw figures have it without. Memory is the peak resident
size of the process.

TRL runs in several forms: 1, 2 or 4 pairs in a micro-batch with log-probabilities of the reference computed before, with them
computed in each step, and with its default, gradient checkpointing. (TRL 1.16 has no packed or padding-free form for pairs.)
The fastest is TRL's best. corral runs first, between them and last; its speed is the mean.

- `dpo_speed_vs_trl`: the goal is 3 where AVX-512 units have their full width, else 1.2 times the same ratio of supervised
  fine-tuning, which is measured in the same run (`train_cpu.py`).
- `dpo_memory_vs_trl`: the leanest form of each without checkpointing; `dpo_checkpointed_memory_vs_trl`: with it.
- `dpo_loss_gap` is the largest difference of a step's loss from TRL's.

    python benchmarks/align_cpu.py [--steps 3] [--json FILE]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import claims
import sides
import train_cpu

PAIRS_PER_STEP = 8
LR = 1e-4
BETA = 0.1


def prepare_pairs(folder: Path, steps: int) -> Any:
    """(model folder, tokenizer, pairs for so many steps from all prompts)."""
    from corral.data.prepare import prepare
    from corral.model.loading import load_template, resolve_model
    from corral.progress import Progress
    from corral.recipe import Data, Source

    base = resolve_model("asset:smollm2-135m-instruct").folder
    template = load_template(base)
    data = Data(sources=(Source(path="asset:harm-rated-pairs"),), max_length=512)
    train, count = prepare(data, template, folder, 0, Progress()).train, steps * PAIRS_PER_STEP
    return base, template.tokenizer, [train[i * len(train) // count] for i in range(count)]


def stage_settings(steps: int, *, checkpointed: bool = False) -> Any:
    """The settings of corral's stage."""
    from corral.recipe import Optimizer, Train, alignment

    return Train(
        objective="dpo",
        dpo=alignment.Dpo(beta=BETA, sft_weight=0),
        steps=steps,
        batch_size=PAIRS_PER_STEP,
        checkpoint_every=10**6,
        gradient_checkpointing=checkpointed,
        optimizer=Optimizer(lr=LR, schedule="constant", warmup_ratio=0),
    )


def token_counts(pairs: list[Any]) -> list[int]:
    return [sum(len(sequence.ids) for sequence in pair.sequences) for pair in pairs]


def in_order(pairs: list[Any], steps: int) -> list[Any]:
    """The pairs as corral's steps take them."""
    from corral.training.sampler import BatchSampler

    sampler = BatchSampler(stage_settings(steps), token_counts(pairs), 0)
    return [pairs[i] for step in range(1, steps + 1) for i in sampler.batch(step)]


def figures(pairs: list[Any], times: list[float], reference: float, losses: list[float]) -> dict[str, Any]:
    """Of a run over pairs in order: the ends of its steps, and seconds of the reference pass over all of them."""
    counts = token_counts(pairs)
    tokens, seconds = sum(counts[PAIRS_PER_STEP:]), times[-1] - times[0]
    return {
        "tokens_per_second": tokens / (seconds + reference * tokens / sum(counts)),
        "tokens_per_second_without_reference": tokens / seconds,
        "reference_seconds": reference,
        "tokens": tokens,
        "seconds": seconds,
        "losses": losses,
    }


def side_corral(steps: int, *, checkpointed: bool = False) -> dict[str, Any]:
    from corral.model import adapters, loading
    from corral.recipe import Lora
    from corral.training.loop import Trainer
    from corral.training.objective_table import build_objective

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, _, pairs = prepare_pairs(folder, steps)
        config = stage_settings(steps, checkpointed=checkpointed)
        trainer = Trainer(
            adapters.attach(loading.load_model(base, dtype="float32", device="cpu"), Lora(), seed=0),
            pairs,
            [],
            build_objective(config),
            config,
            pack_length=512,
            seed=0,
            folder=folder,
            save_best=lambda: None,
        )
        began = time.perf_counter()
        trainer.prepare_reference()
        reference = time.perf_counter() - began
        log: list[tuple[float, float]] = []
        trainer.run(on_step=lambda m: log.append((time.perf_counter(), m.loss or 0.0)))
    return figures(in_order(pairs, steps), [t for t, _ in log], reference, [loss for _, loss in log])


def side_trl(steps: int, micro_batch: int, *, precomputed: bool = True, checkpointed: bool = False) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    times: list[float] = []
    reference = 0.0

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    class OnTokenIds(DPOTrainer):
        """Takes the rows as they are, and times the reference pass."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *args: Any, **settings: Any) -> Any:
            nonlocal reference
            began = time.perf_counter()
            rows = super()._precompute_ref_logps(*args, **settings)
            reference = time.perf_counter() - began
            return rows

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, tokenizer, pairs = prepare_pairs(folder, steps)
        pairs = in_order(pairs, steps)
        rows: list[dict[str, list[int]]] = []
        for chosen, rejected in (pair.sequences for pair in pairs):
            start = chosen.trained.index(True)
            assert chosen.ids[:start] == rejected.ids[:start]
            rows.append(
                {
                    "prompt_ids": list(chosen.ids[:start]),
                    "chosen_ids": list(chosen.ids[start:]),
                    "rejected_ids": list(rejected.ids[start:]),
                }
            )
        config = DPOConfig(
            output_dir=str(folder / "out"),
            num_train_epochs=1,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=PAIRS_PER_STEP // micro_batch,
            precompute_ref_log_probs=precomputed,
            precompute_ref_batch_size=micro_batch,
            beta=BETA,
            max_length=None,
            learning_rate=LR,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_grad_norm=1.0,
            weight_decay=0.0,
            train_sampling_strategy="sequential",
            gradient_checkpointing=checkpointed,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        trainer = OnTokenIds(
            model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
            callbacks=[Clock()],
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return figures(pairs, times, reference, losses)


SIDES: dict[str, sides.Side] = {
    "corral": side_corral,
    "trl-1": lambda steps: side_trl(steps, 1),
    "trl-2": lambda steps: side_trl(steps, 2),
    "corral-again": side_corral,
    "trl-4": lambda steps: side_trl(steps, 4),
    "trl-live": lambda steps: side_trl(steps, 1, precomputed=False),
    "corral-last": side_corral,
    "checkpointed-trl": lambda steps: side_trl(steps, 1, checkpointed=True),
    "checkpointed-corral": lambda steps: side_corral(steps, checkpointed=True),
    "sft-corral": train_cpu.side_corral,
    "sft-trl": lambda steps: train_cpu.side_trl(steps, packed=True),
    "sft-corral-again": train_cpu.side_corral,
}


def main() -> int:
    args = sides.options(__doc__, SIDES, 3, "steps of each side")
    measured = {side: sides.measure(__file__, side, args.steps) for side in SIDES}
    packages = ["torch", "transformers", "peft", "trl", "accelerate"]
    return claims.report(make_claims(measured), measured, packages, args.json)


def make_claims(measured: dict[str, dict[str, Any]]) -> list[claims.Claim]:
    """The claims from the figures of all sides."""
    ours, theirs, ours_sft = ([measured[s] for s in SIDES if s.startswith(p)] for p in ("corral", "trl-", "sft-corral"))
    best = max(side["tokens_per_second"] for side in theirs)
    speed = fmean(side["tokens_per_second"] for side in ours) / best
    sft = fmean(side["tokens_per_second"] for side in ours_sft) / measured["sft-trl"]["tokens_per_second"]
    memory = max(s["peak_memory_bytes"] for s in ours) / min(s["peak_memory_bytes"] for s in theirs)
    checkpointed = [measured[f"checkpointed-{name}"]["peak_memory_bytes"] for name in ("corral", "trl")]
    gap = max(abs(a - b) for a, b in zip(ours[0]["losses"], measured["trl-1"]["losses"], strict=True))
    return [
        claims.Claim("dpo_speed_vs_trl", speed, "×", 3 if claims.has_full_width_avx512() else round(1.2 * sft, 2)),
        claims.Claim("dpo_memory_vs_trl", memory, "×", 0.5, "<="),
        claims.Claim("dpo_checkpointed_memory_vs_trl", checkpointed[0] / checkpointed[1], "×", 0.7, "<="),
        claims.Claim("dpo_loss_gap", gap, "nats", 1e-3, "<="),
    ]


if __name__ == "__main__":
    sys.exit(main())
