"""Export of a checkpoint as a Hugging Face model folder: one process, no GPU, any number of original ranks."""

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
from lomo_ds.train.output_folder import check_empty_folder, check_input_overlap
from lomo_ds.zero3 import SCALES, stored_tensors


def export_checkpoint(
    checkpoint: Path,
    output_dir: Path,
    max_shard_size: str,
    model_name_or_path: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write the weights of ``checkpoint`` to ``output_dir``, with one output file at a time in memory.

    Args:
        checkpoint: folder of a checkpoint, or of a run, whose newest complete checkpoint is used.
        output_dir: a new or empty folder.
        model_name_or_path: folder of the configuration and tokenizer; by default the checkpoint's own.
        trust_remote_code: whether to run the code that comes with the model.

    Raises:
        LomoError: the checkpoint is damaged or of another model, or the folder is not empty or cannot be written.
    """
    check_empty_folder(output_dir)
    is_run = is_run_folder(checkpoint)
    input_folders = list_checkpoints(checkpoint) if is_run else [checkpoint]
    check_input_overlap(output_dir, [*input_folders, Path(model_name_or_path)] if model_name_or_path else input_folders)
    opened = open_newest_in_one_process(checkpoint) if is_run else open_in_one_process(checkpoint)
    checkpoint = opened.folder
    folder = model_name_or_path or str(checkpoint / MODEL)
    if not Path(folder).is_dir():
        raise CheckpointError(
            f"{checkpoint} contains no model configuration, because it was not saved by launch/train.py; give the "
            "folder of its model with --model_name_or_path"
        )
    dtypes = {name: parse_dtype(dtype) for name, (_, dtype) in opened.record["tensors"].items()}
    dtype = next(d for name, d in dtypes.items() if d.is_floating_point and not name.endswith(SCALES))
    model = meta_model(load_config(folder, trust_remote_code), dtype, trust_remote_code)
    load_generation_config(model, folder)
    tensors = saved_tensors(model)
    int8_names = {name for name in tensors if name + SCALES in dtypes}
    stored = stored_tensors(tensors, int8_names, opened.record["world_size"])
    check_same_model(checkpoint, opened.record, describe_tensors(stored))
    tokenizer = load_tokenizer(folder, trust_remote_code)
    export = Export(output_dir, model, max_shard_size)
    export.start()
    for file, names in tqdm(export.files.items(), desc="exporting", unit=" files", disable=None):
        file_tensors = {name: tensors[name] for name in names}
        export.write(file, load_full_tensors(file_tensors, opened.weights, int8_names, opened.record["world_size"]))
    export.finish(model, tokenizer)
