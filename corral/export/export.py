"""A merged model in another form, made, measured against its source, and kept only if it is the same model.

Each form is proved twice. Its weights, read back and computed exactly, must give the log-probabilities that the source
gives with its weights rounded in the same way: to rounding of float32, whatever the form, so that a wrong rotary rule, row
order or scale cannot hide behind the loss of quantisation. And the form as it will be served must not lose more on the
probes than its type may.

This module does not know how the forms are written (`model`) or compared (`contract`).
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from corral.engines.base import Engine
from corral.errors import ModelError
from corral.export import contract
from corral.export.contract import Check
from corral.export_forms import ExportForm, GgufType, OpenVinoType
from corral.progress import Progress
from corral.storage import new_directory, remove_tree, sha256_file, storage_errors

if TYPE_CHECKING:
    from corral.template import Template

T = TypeVar("T")
ALLOWED_LOSS_INCREASE = {"f32": 1e-3, "f16": 0.01, "int8": 0.1, "q8_0": 0.02, "int4": 0.6, "q4_0": 0.6}
"""How much a type may add to the loss on the probes (nats per token). Four bits cost a model of 135M parameters a quarter
of a nat and one of billions a twentieth; held-out data say what it is worth, the contract only that nothing broke."""


def export_form(folder: Path, out: Path, form: ExportForm, progress: Progress) -> Path:
    """Write a model folder's form into `out`, unless it is there already, made from the same weights and template.

    Args:
        folder: a Hugging Face folder, as `corral run` merges it.
        out: the export directory; it is made if need be, and other forms in it stay.

    Returns: `form.path(out)`.

    Raises:
        ContractError: what was made is not the same model; it stays in `out` as a candidate, with its contract.
        ModelError, MissingExtraError, StorageError: it cannot be made.
    """
    from corral.model.folder import check_folder, weight_files
    from corral.model.loading import load_tokenizer
    from corral.template import Template

    check_folder(folder)
    template = Template.load(load_tokenizer(folder))
    source = {path.name: sha256_file(path) for path in weight_files(folder)}
    if _is_current(form.contract_path(out), source, template):
        progress.say(f"{form.path(out)}: already done")
        return form.path(out)
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    candidate = out / f"candidate-{form.target}-{form.type}"
    progress.start(f"Exporting to {form}", None)
    make = _gguf_candidate if form.target == "gguf" else _openvino_candidate
    with make(folder, candidate, form, template, progress) as made:
        progress.start(f"Proving {form}", None)
        served, checks = _check_candidate(folder, template, made, ALLOWED_LOSS_INCREASE[form.type])
    contract.write(
        candidate / form.contract_path(out).name,
        template,
        contract.make_probes(template),
        served,
        checks,
        form=str(form),
        files=made.files,
        source=source,
    )
    contract.raise_if_failed(checks, where=candidate)
    _promote(candidate, out, form)
    for check in checks:
        progress.say(f"contract of {form}, {check.name}: {check.detail}")
    return form.path(out)


def _is_current(record: Path, source: dict[str, str], template: Template) -> bool:
    try:
        found = contract.read(record)
    except ModelError:
        return False
    whole = all((record.parent / name).is_file() for name in found["files"])
    return whole and found["passed"] and found["source"] == source and found["template"]["sha256"] == template.digest


def _promote(candidate: Path, out: Path, form: ExportForm) -> None:
    with storage_errors(out):
        if form.target == "openvino":
            remove_tree(form.path(out))
            candidate.rename(form.path(out))
            return
        # The contract last: while it is missing, the form does not count as done.
        for path in sorted(candidate.iterdir(), key=lambda path: path.name.endswith(".contract.json")):
            path.replace(out / path.name)
        candidate.rmdir()


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A candidate, and what it takes to prove it."""

    files: list[Path]
    """What the form is made of."""
    speaks: Path
    """A folder whose tokenizer, template and generation config are what the form says of itself."""
    restored: Callable[[str, Any], Any]
    """(name, float32 weight) → the weight as the form holds it."""
    exact: Callable[[], Engine]
    served: Callable[[], Engine] | None
    """An engine that computes the form as it will be served, where that is not the exact one."""


@contextmanager
def _openvino_candidate(
    folder: Path, candidate: Path, form: ExportForm, template: Template, progress: Progress
) -> Generator[_Candidate]:
    from corral.engines.openvino import OpenVinoEngine
    from corral.model import openvino_graph
    from corral.model.folder import licence_texts

    precision = cast("OpenVinoType", form.type)
    with new_directory(candidate) as new:
        openvino_graph.write_model(folder, new, precision, progress=lambda n, of: progress.update(n, f"of {of} layers"))
        for name in ("config.json", "generation_config.json"):
            shutil.copyfile(folder / name, new / name)
        template.save(new)
        for licence in licence_texts(folder):
            shutil.copyfile(licence, new / licence.name)
        unlike = openvino_graph.write_tokenizer(template, new)
    if unlike:
        progress.say(f"OpenVINO's own tokenizer is left out, as it gives other ids for {unlike!r}")
    yield _Candidate(
        files=contract.model_files(candidate),
        speaks=candidate,
        restored=lambda name, weight: openvino_graph.stored_weight(name, weight, precision),
        exact=lambda: OpenVinoEngine(candidate, exact=True),
        served=None if precision in ("f32", "f16") else lambda: OpenVinoEngine(candidate),
    )


@contextmanager
def _gguf_candidate(
    folder: Path, candidate: Path, form: ExportForm, template: Template, progress: Progress
) -> Generator[_Candidate]:
    from corral.engines.transformers import TransformersEngine
    from corral.export import gguf_writer
    from corral.model import gguf_reader
    from corral.model.folder import licence_texts
    from corral.model.loading import load_model, quiet

    kind = cast("GgufType", form.type)
    with new_directory(candidate) as new:
        path = form.path(new)
        gguf_writer.write_gguf(folder, path, kind, progress=lambda n, of: progress.update(n, f"of {of / 1e6:.0f} MB"))
        (new / f"Modelfile-{form.type}").write_text(gguf_writer.modelfile(folder, path.name), "utf-8")
        for licence in licence_texts(folder):
            shutil.copyfile(licence, new / licence.name)
    path = form.path(candidate)
    types = {tensor.name: tensor.type for tensor in gguf_reader.read_header(path).tensors}
    with tempfile.TemporaryDirectory(dir=candidate.parent, prefix=".corral-") as back:
        with quiet():
            gguf_reader.convert_to_folder(path, Path(back))
        yield _Candidate(
            files=[path],
            speaks=Path(back),
            restored=lambda name, weight: gguf_writer.stored_weight(name, weight, types),
            exact=lambda: TransformersEngine(load_model(Path(back))),
            served=None,
        )


def _check_candidate(
    folder: Path, template: Template, made: _Candidate, allowed: float
) -> tuple[list[list[float]], list[Check]]:
    """What the form, as served, gives the probes; and every check of it."""
    import torch

    from corral.engines.transformers import TransformersEngine
    from corral.model.loading import load_model

    probe_set = contract.make_probes(template)
    model: Any = load_model(folder)

    def source(probes: Sequence[contract.Probe]) -> list[list[float]]:
        return _with_engine(lambda: TransformersEngine(model), lambda engine: contract.measure(engine, probes))

    full = source(probe_set)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(made.restored(name, parameter.numpy())))
    exact = _with_engine(made.exact, lambda engine: contract.measure(engine, probe_set))
    answers = _with_engine(made.exact, lambda engine: contract.measure_greedy(engine, probe_set))
    served = _with_engine(made.served, lambda engine: contract.measure(engine, probe_set)) if made.served else exact
    return served, [
        contract.check_token_ids(template, made.speaks),
        contract.check_stop_ids(template, made.speaks),
        contract.compare_logprobs("weights", exact, source(probe_set), contract.ACROSS_ENGINES),
        contract.compare_logprobs(
            "greedy answers",
            [values for _, values in answers],
            source([probe for probe, _ in answers]),
            contract.ACROSS_ENGINES,
        ),
        contract.compare_losses("as served", served, full, allowed),
    ]


def _with_engine(make: Callable[[], Engine], ask: Callable[[Engine], Coroutine[Any, Any, T]]) -> T:
    async def asked() -> T:
        async with make() as engine:
            return await ask(engine)

    return asyncio.run(asked())
