"""The verbs merge, export, verify, chat and batch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.cli.run_commands import execute_recipe
from corral.cli.terminal import TerminalProgress
from corral.engines.base import CHAT_SAMPLING, run_engine
from corral.errors import InputError

if TYPE_CHECKING:
    from corral.batch import BatchResult
    from corral.chat.client import ServerBackend
    from corral.chat.repl import LocalBackend
    from corral.recipe import Answer

DEFAULT_TYPES = {"gguf": "q8_0", "openvino": "int8"}


def merge(args: argparse.Namespace) -> dict[str, Any]:
    """Merge a LoRA adapter into its base model, and check that the two answer alike."""
    from corral.export.merge import merge as merge_adapter

    progress = TerminalProgress()
    try:
        checks = merge_adapter(args.adapter, Path(args.out), progress, base=args.base)
    finally:
        progress.stop()
    for check in checks:
        print(f"holds   {check.name}: {check.detail}")
    print(f"merged  {args.out}")
    return {"merged": str(args.out), "checks": [asdict(check) for check in checks]}


def export(args: argparse.Namespace) -> dict[str, Any]:
    """Convert a run's model to GGUF or OpenVINO, and check it against a contract."""
    from corral.export.export import export_form
    from corral.export_forms import EXPORT_TYPES, ExportForm
    from corral.run.directory import Run, is_run

    if args.type and not args.to:
        raise InputError(
            f"--type {args.type} is given without a format", hint=f"add --to {' or --to '.join(EXPORT_TYPES)}"
        )
    form = ExportForm(args.to, args.type or DEFAULT_TYPES[args.to]) if args.to else None
    path = Path(args.model)
    if is_run(path):
        if args.out:
            raise InputError(f"--out {args.out} is given for a run", hint=f"a run is exported to {path / 'export'}")
        recipe = Run(path).recipe
        if form is not None:
            recipe = recipe.with_export(form.target, form.type)
        execute_recipe(recipe, path, args, allowed=("export", "report"))
        paths = [str(each.path(path / "export")) for each in recipe.export_forms]
        if not paths:
            raise InputError("the recipe of this run names no format", where=args.model, hint="add --to gguf")
    else:
        from corral.model.loading import resolve_model

        progress = TerminalProgress()
        try:
            folder = resolve_model(args.model, progress=progress.say).folder
            if form is None or not args.out:
                raise InputError(
                    f"{args.model!r} is not a run", hint="for a model, add --to FORMAT and --out DIRECTORY"
                )
            paths = [str(export_form(folder, Path(args.out), form, progress))]
        finally:
            progress.stop()
    for exported in paths:
        print(f"export  {exported}")
    return {"exported": paths}


def verify(args: argparse.Namespace) -> dict[str, Any]:
    """Check a model against its contract."""
    from corral.answering.open_model import open_model
    from corral.export import contract
    from corral.model.loading import load_template
    from corral.model.naming import find_contract, find_model_folder

    folder, record = find_model_folder(args.model), find_contract(args.model)
    recorded = contract.read(record)
    template = load_template(folder)
    checks = contract.check_unchanged(record, template)
    if all(check.passed for check in checks):
        checks += [contract.check_token_ids(template, folder), contract.check_stop_ids(template, folder)]
        engine = open_model(args.model, args.engine).answerer.engine
        checks.append(run_engine(engine, lambda engine: contract.verify(record, engine)))
    for check in checks:
        print(f"{'holds ' if check.passed else 'BROKEN'}  {check.name}: {check.detail}", flush=True)
    hint = "if files changed, restore them, or merge or export the model again; if none did, choose another engine"
    contract.raise_if_failed(checks, where=record, hint=hint)
    return {"model": str(record.parent), "form": recorded["form"], "checks": [asdict(check) for check in checks]}


def chat(args: argparse.Namespace) -> None:
    """Chat in the terminal with a run's model, or with any OpenAI-compatible server."""
    from corral.chat import repl

    with closing(_server_backend(args) if args.model is None else _local_backend(args)) as backend:
        repl.chat(backend, system=args.system)


def _local_backend(args: argparse.Namespace) -> LocalBackend:
    from corral.answering.settings import AnswererSettings, find_run
    from corral.chat.repl import LocalBackend

    for name, flag in (("host", "--host"), ("port", "--port"), ("server_model", "--model"), ("key", "--key")):
        if getattr(args, name) is not None:
            raise InputError(
                f"{flag} is for a server, and {args.model!r} is a model on this machine",
                hint="leave it out, or leave out the model to chat with the server",
            )
    # A run is asked with the settings of its recipe, here as everywhere.
    answer, _ = _answer_settings(args, {} if find_run(args.model) else CHAT_SAMPLING)
    return LocalBackend(AnswererSettings(args.model, answer, None, args.engine, tuple(args.url)))


def _server_backend(args: argparse.Namespace) -> ServerBackend:
    from corral.chat.client import ServerBackend
    from corral.engines.remote.protocol import KEY_VARIABLE, api_url, one_line

    for name in ("engine", "shots"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name} is for a model on this machine", hint="name one: corral chat MODEL")
    urls = [*args.url]
    if args.host or args.port:
        host = args.host or "127.0.0.1"
        urls.append(f"http://{f'[{host}]' if ':' in host else host}:{args.port or 8000}/v1")
    if len(urls) != 1:
        what = "no model and no server is named" if not urls else f"{len(urls)} servers are named"
        raise InputError(
            what, hint="name a model (corral chat MODEL) or one server (corral chat --url http://HOST:PORT/v1)"
        )
    options = {name: value for name in CHAT_SAMPLING if (value := getattr(args, name)) is not None}
    if args.n is not None and args.consensus in (None, "none"):
        raise InputError("--n is the number of answers in a vote", hint="add --consensus, e.g. rouge-l")
    if args.consensus is not None:
        options["consensus"] = _consensus_field(args)
    url = api_url(urls[0])
    key = args.key or os.environ.get(KEY_VARIABLE)
    if not key and url.startswith("https://api.openai.com/"):
        key = os.environ.get("OPENAI_API_KEY")
    server = ServerBackend(url, model=args.server_model, key=key, options=options)
    print(f"chatting with {one_line(server.model)} at {server.url}", file=sys.stderr)
    return server


def _consensus_field(args: argparse.Namespace) -> dict[str, Any] | None:
    if args.consensus == "none":
        return None
    return {"method": args.consensus} | ({} if args.n is None else {"n": args.n})


def batch(args: argparse.Namespace) -> dict[str, Any]:
    """Answer a file of prompts; after a stop or a kill the same command goes on."""
    from corral.answering.settings import AnswererSettings
    from corral.batch import answer_file

    if args.url and args.ray is not None:
        raise InputError("--url and --ray cannot be combined", hint="leave one out")
    answer, seed = _answer_settings(args)
    settings = AnswererSettings(args.model, answer, seed, args.engine, tuple(args.url))
    if args.ray is not None:
        from corral.batch.ray_cluster import answer_on_ray

        answer_prompts = partial(
            answer_on_ray, args.ray or None, settings.open_answerer, settings.choices_per_prompt, seed
        )
    else:
        from corral.batch.local_worker import answer_locally

        answer_prompts = partial(answer_locally, settings.open_answerer, settings.choices_per_prompt, seed)
    result = answer_file(
        args.prompts, Path(args.out), settings.identity().conditions(), answer_prompts, TerminalProgress()
    )
    _print_result(result)
    return asdict(result) | {"out": str(result.out)}


def _answer_settings(args: argparse.Namespace, defaults: Mapping[str, float] | None = None) -> tuple[Answer, int]:
    """(`[answer]`, seed) of the model's run, with the options of the command line."""
    from corral.answering.settings import load_answer_settings

    names = ("max_tokens", "temperature", "top_p", "consensus", "n", "shots", "seed")
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    return load_answer_settings(args.model, dict(defaults or {}) | given)


def _print_result(result: BatchResult) -> None:
    figures = result.figures
    bad = f", {figures.bad:,} of them bad" if figures.bad else ""
    print(f"answers  {result.out} ({figures.rows:,} rows{bad}; {figures.tokens:,} tokens)")
    if result.answered:
        speed = f"{result.prompts_per_second:.3g} prompts/s, {result.tokens_per_second:,.0f} tokens/s"
        saved = f", {result.saved:.0%} of the candidates ended early" if result.saved else ""
        print(f"speed    {speed}{saved}")
    else:
        print("already done: every row has its answer")
    for fault in figures.faults:
        print(f"bad      {fault}")
    if figures.bad > len(figures.faults):
        print(f"         and {figures.bad - len(figures.faults):,} more")
