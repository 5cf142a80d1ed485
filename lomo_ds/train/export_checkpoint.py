"""From a checkpoint to a Hugging Face folder, in one process, without a GPU and without the ranks that wrote it."""

from pathlib import Path

from tqdm import tqdm

from lomo_ds.checkpoint import (
    MODEL,
    check_same_model,
    describe_tensors,
    is_run_folder,
    list_checkpoints,
    load_full_tensors,
    open_in_one_process,
    open_newest_in_one_process,
    parse_dtype,
)
from lomo_ds.errors import CheckpointError
from lomo_ds.models import Export, load_config, load_generation_config, load_tokenizer, meta_model, saved_tensors
from lomo_ds.train.output_folder import refuse_full_folder, refuse_what_is_read
from lomo_ds.zero3 import SCALES, stored_tensors


def export_checkpoint(
    checkpoint: Path,
    output_dir: Path,
    max_shard_size: str,
    model_name_or_path: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write the weights of ``checkpoint`` to ``output_dir``; in memory, one output file at a time.

    Args:
        checkpoint: its folder, or that of a run, whose newest whole one is meant.
        output_dir: a folder that is new or empty.
        model_name_or_path: folder of the configuration and tokenizer; by default the checkpoint's own.
        trust_remote_code: whether to run the code that comes with the model.

    Raises:
        LomoError: the checkpoint is damaged or of another model, or the folder cannot or must not be written.
    """
    refuse_full_folder(output_dir)
    of_run = is_run_folder(checkpoint)
    read = list_checkpoints(checkpoint) if of_run else [checkpoint]
    refuse_what_is_read(output_dir, [*read, Path(model_name_or_path)] if model_name_or_path else read)
    found = open_newest_in_one_process(checkpoint) if of_run else open_in_one_process(checkpoint)
    checkpoint = found.folder
    folder = model_name_or_path or str(checkpoint / MODEL)
    if not Path(folder).is_dir():
        raise CheckpointError(
            f"{checkpoint} holds no model configuration, since it was not launch/train.py that saved it; give the "
            "folder of its model with --model_name_or_path"
        )
    dtypes = {name: parse_dtype(dtype) for name, (_, dtype) in found.record["tensors"].items()}
    dtype = next(d for name, d in dtypes.items() if d.is_floating_point and not name.endswith(SCALES))
    model = meta_model(load_config(folder, trust_remote_code), dtype, trust_remote_code)
    load_generation_config(model, folder)
    tensors = saved_tensors(model)
    in_eight_bits = {name for name in tensors if name + SCALES in dtypes}
    kept = stored_tensors(tensors, in_eight_bits, found.record["world_size"])
    check_same_model(checkpoint, found.record, describe_tensors(kept))
    tokenizer = load_tokenizer(folder, trust_remote_code)
    export = Export(output_dir, model, max_shard_size)
    export.start()
    for file, names in tqdm(export.files.items(), desc="exporting", unit=" files", disable=None):
        wanted = {name: tensors[name] for name in names}
        export.write(file, load_full_tensors(wanted, found.weights, in_eight_bits, found.record["world_size"]))
    export.finish(model, tokenizer)
