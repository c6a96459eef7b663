"""The merge stage: promotes the last trained model, if it passes its contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corral.export import contract
from corral.pipeline.context import RunContext, training_stage_name
from corral.pipeline.train_stage import training_setup, validation_set
from corral.run.stage_record import Stage
from corral.storage import link_or_copy_tree, new_directory, remove_tree


def inputs(context: RunContext, done: Mapping[str, str]) -> dict[str, Any]:
    """What the stage depends on, from the fingerprints of the stages before it."""
    return {"trained": done[training_stage_name(context.recipe, len(context.recipe.train))]}


def merge(context: RunContext, stage: Stage) -> None:
    """Check the merged model against the trained one, and promote it to `model`.

    Raises:
        ContractError: a check fails; the model stays in `candidate`.
    """
    from corral.training.merge_check import check_merged_model
    from corral.training.trained_model import MERGED_FOLDER

    number = len(context.recipe.train)
    setup, trained = training_setup(context, number), context.run.path / training_stage_name(context.recipe, number)
    candidate = stage.path / "candidate"
    with new_directory(candidate) as folder:
        link_or_copy_tree(trained / MERGED_FOLDER, folder)
    probe_set = contract.make_probes(context.template)
    context.progress.start("Measuring the contract", None)
    measured, checks = check_merged_model(setup, trained, candidate, probe_set, validation_set(context, setup))
    checks = contract.certify_merged(candidate, context.template, probe_set, measured, checks, form=setup.dtype)
    remove_tree(stage.path / "model")  # left by a process that ended between promoting it and recording that
    candidate.rename(stage.path / "model")
    for check in checks:
        context.progress.say(f"contract, {check.name}: {check.detail}")
