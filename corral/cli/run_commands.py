"""The verbs init, run, plan, inspect, evaluate, compare and report."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.cli.terminal import TerminalProgress, show
from corral.errors import GateError, InputError, RecipeError

if TYPE_CHECKING:
    from corral.training.distributed import World

STARTER = Path(__file__).parent.parent / "recipe" / "starter.toml"


def _recipe(args: argparse.Namespace, *, stages_required: bool = True) -> Any:
    from corral.recipe import load

    return load(args.recipe, args.set, stages_required=stages_required)


def _run_folder(args: argparse.Namespace, recipe: Any) -> Path:
    return Path(args.out or Path("runs") / (f"{recipe.name}-small" if args.small else recipe.name))


def execute_recipe(recipe: Any, out: Path, args: argparse.Namespace, **options: Any) -> dict[str, Any]:
    """Run a recipe's stages, and say which were done already."""
    from corral.pipeline import execution

    outcome = execution.execute(recipe, out, TerminalProgress(), **options)
    skipped = [name for name, what in outcome.items() if what == "skipped"]
    if skipped and not args.json:
        print(f"already done: {', '.join(skipped)}", file=sys.stderr)
    return {"run": str(out), "stages": outcome}


def _print_scorecard(out: Path) -> None:
    from corral.evaluation import tables
    from corral.evaluation.scorecard import Scorecard

    card = Scorecard.from_json((out / "evaluate" / "scorecard.json").read_text("utf-8"))
    show(tables.render_scores(card))
    if set(card.variants) > {"base", "tuned"} or any("/" in name for v in card.variants.values() for name in v.metrics):
        show(*tables.render_costs(card))


def init(args: argparse.Namespace) -> dict[str, Any]:
    """Write a recipe to start from."""
    path = Path(args.path)
    if path.exists():
        raise InputError("this file exists", where=str(path), hint="name another one: `corral init NAME.toml`")
    from corral.storage import write_atomic

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-") or "starter"
    write_atomic(path, STARTER.read_text("utf-8").replace('name = "starter"', f'name = "{name}"'))
    print(f"wrote {path}; point its [[data.sources]] at your rows, then: corral run {path}")
    return {"recipe": str(path)}


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Run a recipe: prepare, train, merge, evaluate, export, report."""
    from corral.training.distributed import world_from_environment

    with world_from_environment() as world:
        if world.is_main:
            return _run(args, world)
        from corral.pipeline.execution import follow

        follow(world)
        return None  # the first process prints the result


def _run(args: argparse.Namespace, world: World) -> dict[str, Any]:
    from corral.run.directory import Run, is_run

    recipe = _recipe(args)
    out = _run_folder(args, recipe)
    if args.small:
        from corral.data.small_form import shrink_recipe

        recipe = shrink_recipe(recipe, out / ".corral-small-rows")
    if is_run(out):
        recipe = recipe.with_exports(Run(out).recipe.export)  # what `corral export` added stays
    result = execute_recipe(recipe, out, args, world=world, profile=args.profile, redo=args.redo)
    _print_scorecard(out)
    print(f"model   {Run(out).model}")
    print(f"report  {out / 'report' / 'index.html'}")
    for exported in sorted((out / "export").glob("*.gguf")) + sorted((out / "export").glob("openvino-*")):
        print(f"export  {exported}")
    print(f"chat    corral chat {out}")
    print(f"serve   corral serve {out}")
    return result


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what training a recipe needs on this machine, or estimate it for another device."""
    from corral.interrupts import Interrupts
    from corral.preflight.plan import render
    from corral.preflight.planner import plan as find_out

    recipe = _recipe(args)
    out = _run_folder(args, recipe)
    progress = TerminalProgress()
    with Interrupts(), tempfile.TemporaryDirectory() as rows:
        try:
            if args.small:
                from corral.data.small_form import shrink_recipe

                recipe = shrink_recipe(recipe, Path(rows))
            outcome = find_out(recipe, out, progress, device=args.device)
        finally:
            progress.stop()
    result = outcome.to_json()
    show(render(outcome))
    if outcome.verdict == "does not fit":
        if args.json:
            print(json.dumps(result, ensure_ascii=False), file=args.stdout)
        raise GateError(
            "this recipe does not fit", where=outcome.reasons[0], hint="make the changes that the plan lists"
        )
    return result


def inspect(args: argparse.Namespace) -> dict[str, Any]:
    """Show the rows that a recipe trains on, coloured by token, and what became of all others."""
    from corral.data import preview
    from corral.data.lost_rows_budget import check_loss_budget
    from corral.data.prepare import prepare
    from corral.model.loading import resolve_model
    from corral.model.naming import ModelFiles, find_adapter_to_train
    from corral.storage import write_atomic

    recipe = _recipe(args, stages_required=False)
    progress = TerminalProgress()
    progress.start("Preparing rows", None)
    folder = resolve_model(recipe.model.base, progress=progress.say).folder
    model, adapter = recipe.model, None
    if model.adapter is not None:
        adapter = find_adapter_to_train(
            model.adapter, folder, recipe.train[0].quantization if recipe.train else "none"
        ).folder
    template = ModelFiles(folder, adapter, recipe).load_template()
    with tempfile.TemporaryDirectory() as rows:
        try:
            # A recipe that loses too many rows is one that the user wants to inspect.
            data = recipe.data.model_copy(update={"max_loss": None})
            prepared = prepare(
                data,
                template,
                Path(rows),
                recipe.rows_seed,
                progress,
                split_seed=recipe.split_seed,
                mixtures=recipe.mixtures,
            )
        finally:
            progress.stop()
        if args.html:
            write_atomic(Path(args.html), preview.to_html(prepared, template, rows=args.rows))
        ledger: dict[str, Any] = json.loads((Path(rows) / "ledger.json").read_text("utf-8"))
        show(preview.to_terminal(prepared, template, rows=args.rows))
    refused = None
    try:
        check_loss_budget(recipe.data, ledger, where=Path(args.recipe))
    except GateError as error:
        refused = str(error)
        print(f"`corral run` stops before training: {refused}")
    if args.html:
        print(f"page    {args.html}")
    return {"ledger": ledger, "html": args.html, "refused": refused}


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate a run again, optionally with other settings, variants or tasks."""
    from corral.recipe import parse
    from corral.run.directory import Run

    out = Path(args.run)
    text = Run(out).path.joinpath("recipe.toml").read_text("utf-8")
    for override in args.set:
        if not override.startswith(("evaluate.", "answer.")):
            raise RecipeError(
                f"{override!r} is a setting of neither [evaluate] nor [answer]",
                where="--set",
                hint="use `corral run RECIPE --set …` instead",
            )
    test = [] if args.test is None else [f"evaluate.test={{path={json.dumps(args.test)}}}"]
    recipe = parse(text, where=str(out / "recipe.toml"), base=Path(), overrides=[*test, *args.set])
    execute_recipe(recipe, out, args, allowed=("export", "evaluate", "report"))
    _print_scorecard(out)
    return json.loads((out / "evaluate" / "scorecard.json").read_text("utf-8"))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Compare variants of runs, by default their tuned models, on the rows on which both were evaluated."""
    from corral.evaluation import tables
    from corral.evaluation.scorecard import build_scorecard, choose_primary
    from corral.pipeline.evaluate_stage import parse_variant, read_metrics, read_primary, read_variant_rows
    from corral.run.freshness import stale_stages

    sides = {spec: parse_variant(spec) for spec in (args.a, args.b)}
    if len(set(sides.values())) == 1:
        raise InputError(f"both are {args.a!r}", hint="name two different ones, each as RUN or RUN:VARIANT")
    for spec, (folder, _) in sides.items():
        if (reason := stale_stages(folder.parent).get("evaluate")) is not None:
            print(f"note    the scores of {spec} are not of its run's present state: {reason}")
    rows = {spec: read_variant_rows(*side) for spec, side in sides.items()}
    primary, notes = choose_primary({spec: read_primary(folder) for spec, (folder, _) in sides.items()})
    metrics = read_metrics(folder for folder, _ in sides.values())
    card = build_scorecard(rows, baseline=args.b, seed=0, primary=primary, metrics=metrics, notes=notes)
    show(tables.render_scores(card), *tables.render_costs(card))
    return json.loads(card.to_json())


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Write the report of a run again."""
    from corral.report.write import write_report
    from corral.run.directory import Run

    page = write_report(Run(Path(args.run)).path)
    print(f"report  {page}")
    return {"report": str(page)}
