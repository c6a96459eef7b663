"""Export a merged model to another form, compare it with its source, and keep it only if it is the same model.

There are two comparisons of log-probabilities on a set of probes:

- The form's weights, read back and computed in float32, against the source with its weights rounded in the same way. They must
  agree to float32 rounding, whatever the form, so a wrong rotary rule, row order or scale cannot hide behind quantisation.
- The form as it will be served against the source. The loss may rise by what its type allows.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from corral.engines.base import Engine, run_engine
from corral.engines.transformers import TransformersEngine
from corral.errors import ModelError
from corral.export import contract, gguf_writer
from corral.export.contract import Check
from corral.export.ollama_modelfile import modelfile
from corral.export_forms import ExportForm, GgufType, OpenVinoType
from corral.model import gguf_reader
from corral.model.folder import check_folder, licence_texts, read_json
from corral.model.loading import load_model, load_template, quiet
from corral.progress import Progress
from corral.storage import new_directory, remove_tree, sha256_file, storage_errors, write_json
from corral.template import Template

ALLOWED_LOSS_INCREASE = {"f32": 1e-3, "f16": 0.01, "int8": 0.1, "q8_0": 0.02, "int4": 0.6, "q4_0": 0.6}
"""How much a type may add to the loss on the probes (nats per token). Four bits cost a model of 135M parameters a quarter of a
nat and one of billions a twentieth. The contract only shows that nothing broke; held-out data show how good the form is."""


def export_form(folder: Path, out: Path, form: ExportForm, progress: Progress) -> Path:
    """Export a model folder into `out`, unless `out` holds that form of the same files and template already.

    Args:
        folder: a Hugging Face folder, as `corral run` merges it.
        out: the export directory; it is created if it is missing, and other forms in it stay.

    Returns: `form.path(out)`.

    Raises:
        ContractError: the exported model differs from its source; it stays in `out` as a candidate, with its contract.
        ModelError, MissingExtraError, StorageError: the model cannot be exported.
    """
    check_folder(folder)
    template = load_template(folder)
    source = {path.name: sha256_file(path) for path in contract.model_files(folder)}
    if _is_current(form.contract_path(out), source, template):
        progress.say(f"{form.path(out)}: already done")
        return form.path(out)
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    candidate = out / f"candidate-{form.target}-{form.type}"
    progress.start(f"Exporting to {form}", None)
    build = _gguf_candidate if form.target == "gguf" else _openvino_candidate
    with build(folder, candidate, form, template, progress) as built:
        progress.start(f"Checking {form}", None)
        served, checks = _check_candidate(folder, template, built, ALLOWED_LOSS_INCREASE[form.type])
    with storage_errors(candidate):
        for licence in licence_texts(folder):
            shutil.copyfile(licence, candidate / licence.name)
    contract_path = candidate / form.contract_path(out).name
    probes = contract.make_probes(template)
    contract.write(contract_path, template, probes, served, checks, form=str(form), files=built.files, source=source)
    contract.raise_if_failed(
        checks,
        where=candidate,
        hint=f"the model is kept there but not promoted; `{contract_path.name}` holds every figure",
    )
    _move_into_place(candidate, out, form)
    for check in checks:
        progress.say(f"contract of {form}, {check.name}: {check.detail}")
    return form.path(out)


def _is_current(contract_path: Path, source: dict[str, str], template: Template) -> bool:
    try:
        recorded = contract.read(contract_path)
    except ModelError:
        return False
    complete = all((contract_path.parent / name).is_file() for name in recorded["files"])
    same = recorded["source"] == source and recorded["template"] == contract.record_template(template)
    return complete and same and recorded["passed"]


def _move_into_place(candidate: Path, out: Path, form: ExportForm) -> None:
    with storage_errors(out):
        if form.target == "openvino":
            remove_tree(form.path(out))
            candidate.rename(form.path(out))
            return
        # The contract last: without it, the form counts as unfinished.
        for path in sorted(candidate.iterdir(), key=lambda path: path.name.endswith(".contract.json")):
            path.replace(out / path.name)
        candidate.rmdir()


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An exported model that is not checked yet, and what the checks need."""

    files: list[Path]
    """All that answers depend on."""
    text_folder: Path
    """A folder with the tokenizer, template and generation config as they are in the form."""
    stored_weight: Callable[[str, Any], Any]
    """(name, float32 weight) → the weight as the form holds it, in float32."""
    exact: Callable[[], Engine]
    """Loads an engine that computes the form in float32."""
    served: Callable[[], Engine] | None
    """Loads an engine that computes the form as it will be served, if that is another."""


@contextmanager
def _openvino_candidate(
    folder: Path, candidate: Path, form: ExportForm, template: Template, progress: Progress
) -> Generator[_Candidate]:
    from corral.engines.openvino import OpenVinoEngine
    from corral.model import openvino_graph

    precision = cast("OpenVinoType", form.type)
    with new_directory(candidate) as new:
        openvino_graph.write_model(folder, new, precision, progress=lambda n, of: progress.update(n, f"of {of} layers"))
        shutil.copyfile(folder / "config.json", new / "config.json")
        generation = folder / "generation_config.json"
        stated = read_json(generation) if generation.is_file() else {}
        # OpenVINO GenAI generates with what stands there, and corral does not: ids only, no penalties or limits.
        ids = {name: stated[name] for name in ("bos_token_id", "pad_token_id") if name in stated}
        write_json(new / generation.name, ids | {"eos_token_id": list(template.stop_ids)})
        template.save(new)
        differing_text = openvino_graph.write_tokenizer(template, new)
    if differing_text:
        progress.say(f"OpenVINO's own tokenizer is left out, as it gives other ids for {differing_text!r}")
    yield _Candidate(
        files=contract.model_files(candidate),
        text_folder=candidate,
        stored_weight=lambda name, weight: openvino_graph.stored_weight(name, weight, precision),
        exact=lambda: OpenVinoEngine(candidate, exact=True),
        served=None if precision in ("f32", "f16") else lambda: OpenVinoEngine(candidate),
    )


@contextmanager
def _gguf_candidate(
    folder: Path, candidate: Path, form: ExportForm, template: Template, progress: Progress
) -> Generator[_Candidate]:
    kind = cast("GgufType", form.type)
    with new_directory(candidate) as new:
        path = form.path(new)
        gguf_writer.write_gguf(
            folder,
            path,
            kind,
            stop_ids=template.stop_ids,
            progress=lambda n, of: progress.update(n, f"of {of / 1e6:.0f} MB"),
        )
        (new / f"Modelfile-{form.type}").write_text(modelfile(folder, path.name, template.stop_ids), "utf-8")
    path = form.path(candidate)
    types = {tensor.name: tensor.type for tensor in gguf_reader.read_header(path).tensors}
    with tempfile.TemporaryDirectory(dir=candidate.parent, prefix=".corral-") as read_back:
        with quiet():
            gguf_reader.convert_to_folder(path, Path(read_back))
        yield _Candidate(
            files=[path],
            text_folder=Path(read_back),
            stored_weight=lambda name, weight: gguf_writer.stored_weight(name, weight, types),
            exact=lambda: TransformersEngine(load_model(Path(read_back))),
            served=None,
        )


def _check_candidate(
    folder: Path, template: Template, candidate: _Candidate, allowed: float
) -> tuple[list[list[float]], list[Check]]:
    """The log-probabilities that the form, as served, gives the probes; and all checks."""
    probe_set = contract.make_probes(template)
    model: Any = load_model(folder)

    def measure_source(probes: Sequence[contract.Probe]) -> list[list[float]]:
        return run_engine(TransformersEngine(model), lambda engine: contract.measure(engine, probes))

    full = measure_source(probe_set)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(candidate.stored_weight(name, parameter.numpy())))
    exact = run_engine(candidate.exact(), lambda engine: contract.measure(engine, probe_set))
    answers = run_engine(candidate.exact(), lambda engine: contract.measure_greedy(engine, probe_set))
    served = (
        run_engine(candidate.served(), lambda engine: contract.measure(engine, probe_set))
        if candidate.served
        else exact
    )
    return served, [
        contract.check_token_ids(template, candidate.text_folder),
        contract.check_stop_ids(template, candidate.text_folder),
        contract.compare_logprobs("weights", exact, measure_source(probe_set), contract.ACROSS_ENGINES),
        contract.compare_logprobs(
            "greedy answers",
            [values for _, values in answers],
            measure_source([probe for probe, _ in answers]),
            contract.ACROSS_ENGINES,
        ),
        contract.compare_losses("as served", served, full, allowed),
    ]
