"""Where a run goes on: the newest whole checkpoint, for the config and the processes that it is started with."""

import dataclasses
import logging
from pathlib import Path

from accelerate.utils import broadcast_object_list

from checkpoint import list_checkpoints, remove_leftovers, set_newer_aside, verify_checkpoint
from config import changed_keys, to_dict

log = logging.getLogger("deep3d")


def find_start(config, accelerator, frames):
    """Where config.resume says to go on: (checkpoint folder or None, its meta, the config fitted to it and to the processes).

    The main process verifies, passes damaged checkpoints over and tells the others. Raises ValueError when it must not go on.
    """
    found = [None, {}, config.train.batch_size, {}]
    if accelerator.is_main_process:
        root = Path(config.out) / "checkpoints"
        remove_leftovers(root)
        remove_leftovers(config.out, "best")
        folders = list_checkpoints(root)
        if config.resume == "none" and folders:
            raise ValueError(f"{config.out} holds checkpoints and resume=none; choose another out=, or delete it")
        if config.resume not in ("auto", "none") and not folders:  # a start from elsewhere; once begun, the run goes on from its own
            folders = [Path(config.resume)]
        for folder in folders:
            try:
                meta, before = verify_checkpoint(folder)
            except ValueError as error:
                if folder == folders[-1]:
                    raise ValueError(f"{error}; nothing older is left{f' (delete {root} to start anew)' * root.exists()}") from None
                log.warning(f"{error}; passing it over")
                continue
            measured = {k: v for k, v in before["model"].items() if k in ("size_prior", "depth_mean", "depth_std")}
            batch_size = fit_batch(config.train, meta, accelerator.num_processes, folder)
            refuse_changes(with_priors(config, measured), before, meta, frames, folder)
            change = f" with {meta['processes']} -> {accelerator.num_processes} processes of {batch_size} images, the same global batch"
            log.info(f"resumed from {folder}{change * (meta['processes'] != accelerator.num_processes)}")
            if folder.parent == root:
                for path in set_newer_aside(folder):
                    log.warning(f"kept as {path}")
            found = [folder, meta, batch_size, measured]
            break
    folder, meta, batch_size, measured = broadcast_object_list(found)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch_size))
    return folder, meta, with_priors(config, measured)


def with_priors(config, measured):
    """Config with the priors that it leaves empty taken from a checkpoint, so that a data set that lost an image resumes too."""
    empty = {name: value for name, value in measured.items() if not getattr(config.model, name)}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **empty))


def fit_batch(train, meta, world, folder):
    """Images per process that keep the checkpoint's global batch with this number of processes. Raises ValueError if there is none."""
    batch, now, share = meta["global_batch"], train.batch_size * world * train.accumulate, world * train.accumulate
    if now != batch and train.batch_size != meta["asked_batch"]:
        raise ValueError(f"{folder}: its global batch was {batch} and is now {now}: not the same run")
    if batch % share:
        raise ValueError(
            f"{folder}: its global batch of {batch} does not divide over {world} processes with train.accumulate={train.accumulate}"
        )
    return batch // share


def refuse_changes(config, before, meta, frames, folder):
    """Show the keys in which a config differs from a checkpoint's; raise ValueError unless config.allow_changes."""
    changes = changed_keys(before, to_dict(config))
    if frames != meta["frames"]:
        changes.append(f"frames of data.train: {meta['frames']} -> {frames}")
    for line in changes:
        log.warning(f"changed since the checkpoint: {line}")
    if changes and not config.allow_changes:
        raise ValueError(f"{folder}: this is not the run's config ({'; '.join(changes)}); allow_changes=true goes on all the same")
