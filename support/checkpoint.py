"""Checkpoints: saving and resuming; and the student that a run leaves.

OUT/step-N/           a Hugging Face folder: the student in fp32, its config and tokenizer, which from_pretrained loads
OUT/step-N/optimizer/ the optimizer's state, sharded over the ranks, which any number of ranks can load
OUT/step-N/state.json written last: step, settings, versions, and size and digest of every other file
OUT/final/            the student after the last step, in the dtype that its own files came in

No file holds code, such as pickles. No random states either: every draw of a run has a seed of its own.
"""

import json
import re
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from configs import may_change
from support.common import gather, print0, rank, versions, world_size
from support.errors import on_all_ranks, one_line
from support.files import CONFIG, FINAL, claim_folder, delete, fsync, remove, write_file
from support.rows import name_and_split
from support.vocabulary import folder_of

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # we save from one process on purpose
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FILE_BYTES = 1 << 28  # of tensors in one file: a file is copied to host memory as a whole, then written
STATE = "state.json"
OPTIMIZER = "optimizer"

# -----------------------------------------------------------------------------
# the run's folder


def complete(out: Path) -> list[Path]:
    """Checkpoint folders, oldest first. An unfinished one still has its temporary name; a user's copies have others."""
    folders = [path for path in out.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted([path for path in folders if (path / STATE).exists()], key=number)


def latest(out: Path) -> Path | None:
    return next(reversed(complete(out)), None)


def number(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def find(cfg) -> Path | None:
    """The checkpoint to resume from, or None to start afresh. ValueError if --out holds another run, or its config is damaged."""
    out = Path(cfg.out)
    config = out / CONFIG
    if cfg.resume == "false":
        if config.exists():
            if has_begun(out) and not cfg.overwrite:
                remedies = "--resume goes on with it, --overwrite deletes it, --out names another folder"
                raise ValueError(f"{out} already holds a run: {remedies}")
            check_inputs_outlive(out, cfg)
        return None
    newest = latest(out)
    if cfg.resume == "true" and not newest:
        raise ValueError(
            f"--resume: {out} holds no complete checkpoint; with --resume auto the run starts from the beginning"
        )
    saved = read_json(config) if config.exists() else {}
    for name, new in asdict(cfg).items():
        old = saved.get(name, new)
        if old != new and not may_change(name) and name not in ("teacher", "data"):  # these are known by their content
            hint = ". It goes on from its checkpoint, even if that folder has moved" if name == "student" else ""
            raise ValueError(f"--resume: {out} was run with --{name} {old!r}, not {new!r}{hint}")
    return newest


def has_begun(out) -> bool:
    """Whether the folder holds more than a failed setup leaves behind. If not, a run may start in it without --overwrite."""
    return any(path.is_dir() or (path.suffix == ".jsonl" and path.stat().st_size) for path in out.iterdir())


def check_inputs_outlive(out, cfg):
    """ValueError if --overwrite would delete a model or data that this run is about to read."""
    for flag in ("student", "teacher", "data", "eval_data"):
        for name in getattr(cfg, flag).split(","):
            path = Path(name_and_split(name)[0])  # a folder of data may have a split after it, FOLDER:SPLIT
            if path.exists() and path.resolve().is_relative_to(out.resolve()):
                raise ValueError(f"--overwrite would delete --{flag} {name}: choose another --out")


def check_data(resume_from, data_digest):
    """ValueError if the checkpoint was made with other training prompts."""
    if resume_from and read_state(resume_from)["data"] != data_digest:
        raise ValueError(
            "--resume: the training prompts are not those that the run began with: has --data's file changed?"
        )


def check_teacher(resume_from, cfg, digest):
    """ValueError if the checkpoint was made with another teacher. digest: of its weights; None for a server's, which is not compared."""
    state = read_state(resume_from) if resume_from else {}
    before = state.get("teacher")
    if not before or not digest or before == digest:
        return
    is_same_dtype = before.split()[0] == digest.split()[0]  # the digests of bf16, on a GPU, and of fp32 tell nothing
    if is_same_dtype or state["config"]["teacher"] != cfg.teacher:
        raise ValueError(f"--resume: the weights of --teacher {cfg.teacher} are not those that the run began with")


def claim(cfg):
    """Makes --out this run's, on rank 0, and returns its lock. OSError if it cannot be written to."""
    if rank() > 0:
        return None
    out = Path(cfg.out)
    lock = claim_folder(out, CONFIG, cfg.overwrite)
    write_file(out / CONFIG, json.dumps(asdict(cfg), indent=1) + "\n")
    return lock


# -----------------------------------------------------------------------------
# saving


def model_files(path, stop_ids) -> dict[str, bytes]:
    """{name: content} of a model's files besides its weights, unchanged; but generate() shall stop at all of stop_ids.

    path: folder or hub name. They are read before the first step, so that no later save can fail on them.
    """
    folder = folder_of(path)
    names = [
        file.name
        for file in folder.iterdir()
        if file.suffix in (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")
    ]
    names = [name for name in names if not name.endswith(".index.json") and name != STATE]
    files = {name: (folder / name).read_bytes() for name in sorted(names)}
    generation_config = json.loads(files.get("generation_config.json", b"{}"))
    eos = generation_config.get("eos_token_id", [])
    if set(eos if isinstance(eos, list) else [eos]) != set(stop_ids):
        generation_config["eos_token_id"] = stop_ids
        files["generation_config.json"] = (json.dumps(generation_config, indent=2) + "\n").encode()
    return files


def save(out, step, weights, files, policy, optimizer, cfg, inputs):
    """Writes OUT/step-N, which gets its name when all of it is on the disk. All ranks call it, and exit in one line if it fails.

    weights: the student's (name, full tensor) pairs, over which all ranks must iterate together. files: from model_files.
    inputs: digests of "data" and "teacher". The disk never holds more than cfg.keep checkpoints, this one included, except
    with cfg.keep 1: the old one goes when the new one is complete.
    """
    tmp, final = out / f"step-{step}.tmp", out / f"step-{step}"
    on_all_ranks(make_room, out, cfg.keep, tmp, files)
    errors = [save_weights(tmp, weights), save_optimizer(tmp / OPTIMIZER, policy, optimizer)]
    on_all_ranks(give_up_after, errors, tmp, final)
    names = sorted(set().union(*gather(files_of(tmp))))  # a network file system may show one node more than another
    digests = gather(on_all_ranks(digests_of, tmp, names[rank() :: world_size()]))
    state = {"step": step, **inputs, "config": asdict(cfg), "versions": versions()}
    state["files"] = {name: x for part in digests for name, x in part.items()}
    on_all_ranks(publish, tmp, final, state, cfg.keep)


def make_room(out, keep, tmp, files):
    """On rank 0, deletes checkpoints until the newest keep - 1 are left (or one), and begins the new one."""
    if rank() > 0:
        return
    delete_all_but(out, max(keep - 1, 1))
    remove(tmp)
    (tmp / OPTIMIZER).mkdir(parents=True)
    for name, content in files.items():
        (tmp / name).write_bytes(content)


def delete_all_but(out, n_newest):
    for old in complete(out)[:-n_newest]:
        try:
            delete(old)
        except OSError as error:  # such as a file on NFS that a process has open: it costs room, but not the run
            print0(f"warning: could not delete {old}: {one_line(error)}")


def save_weights(folder, weights):
    """On rank 0, writes the weights as files of about FILE_BYTES, with the index by which transformers finds them.

    Returns an error, or None; it iterates over all weights in any case, because the other ranks do.
    """
    shard, size, where, error = {}, 0, {}, None
    for name, weight in weights:
        if rank() > 0 or error:
            continue
        if size + weight.nbytes > FILE_BYTES and shard:
            error, shard, size = save_shard(folder, shard, where), {}, 0
        shard[name] = weight.detach().cpu().contiguous()
        size += weight.nbytes
    if rank() == 0 and not error:
        index = {"metadata": {}, "weight_map": where}  # which save_shard completes
        error = save_shard(folder, shard, where)
        error = error or error_of(
            lambda: write_file(folder / "model.safetensors.index.json", json.dumps(index, indent=1))
        )
    return error


def save_shard(folder, shard, where):
    """Writes one file, and notes in `where` {weight: file} what it holds. Returns an error, or None."""
    file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
    error = error_of(lambda: save_file(shard, folder / file, {"format": "pt"}) or fsync(folder / file))
    where |= dict.fromkeys(shard, file)
    return error


def error_of(write):
    """The error of write(), or None."""
    try:
        write()
    except (OSError, SafetensorError) as error:
        return error


def optimizer_tensors(policy, optimizer):
    """(the optimizer's state dict, {name: tensor} of its tensors), sharded as they are.

    A trained parameter that has no state yet gets the one before its first step: all of a fresh optimizer, which is loaded into,
    and what no gradient has reached, such as the indexer of DeepSeek-V3.2. Both sides of a resume then have the same names.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.requires_grad and not optimizer.state[p]:
                step = torch.zeros((), device=p.device if group["fused"] else "cpu")
                optimizer.state[p] |= {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    state_dict = get_optimizer_state_dict(policy, optimizer, options=FLAT)
    return state_dict, {name: x for name, x in state_dict.items() if isinstance(x, torch.Tensor)}


def save_optimizer(folder, policy, optimizer):
    """Every rank writes its part. Returns an error, the same on all ranks, or None."""
    _, tensors = optimizer_tensors(policy, optimizer)
    files, total = {}, 0
    for name, x in tensors.items():  # {tensor: number of its file, from 1}, about FILE_BYTES in each
        files[name] = 1 + total // FILE_BYTES
        total += (x.to_local() if hasattr(x, "to_local") else x).nbytes
    try:
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), files, save_distributed=True))
    except CheckpointException as failed:
        return next(iter(failed.failures.values()))[0]


def give_up_after(errors, tmp, final):
    for error in filter(None, errors):
        shutil.rmtree(tmp, ignore_errors=True)
        raise OSError(f"could not save {final}: {one_line(error)}; the checkpoints before it are whole")


def publish(tmp, final, state, keep):
    """On rank 0, gives a complete checkpoint its name."""
    if rank() > 0:
        return
    write_file(tmp / STATE, json.dumps(state, indent=1))
    for path in [*tmp.iterdir(), tmp]:  # before it gets its name: a power cut may leave what was not flushed empty
        fsync(path)
    remove(final)
    tmp.rename(final)
    fsync(final.parent)
    delete_all_but(final.parent, keep)


# -----------------------------------------------------------------------------
# loading


def read_state(folder) -> dict:
    """state.json of a checkpoint. ValueError if it is damaged or of an older version of this code."""
    state = read_json(folder / STATE)
    try:
        return state | {"files": state["files"]}
    except KeyError:
        raise ValueError(
            f"{folder} was written by an older version of this code; only that version can read it"
        ) from None


def read_json(path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from error


def check(folder):
    """ValueError if a checkpoint's files are missing or damaged, with the older one that --resume could use. A collective.

    Each rank reads its share of the files. Other folders have no state.json, and nothing to compare with.
    """
    folder = Path(folder)
    faults = gather(fault_of(folder, rank(), world_size()) if (folder / STATE).exists() else None)
    if any(faults):
        there = complete(folder.parent)
        older = there[: there.index(folder)] if folder in there else []
        whole = next((path for path in reversed(older) if not fault_of(path)), None)
        remedy = f"to go on with --resume from {whole}, which is whole, delete {folder}"
        raise ValueError(f"{next(filter(None, faults))}; {remedy if whole else 'there is no older one that is whole'}")


def fault_of(folder, part=0, parts=1) -> str | None:
    """What is wrong with this part of a checkpoint's files; None if nothing is."""
    try:
        expected = read_state(folder)["files"]
        for name in files_of(folder):
            if name.endswith(".safetensors") and name not in expected:  # transformers might read it instead of ours
                return f"{folder / name} is not a file of this checkpoint"
        for name in sorted(expected)[part::parts]:
            if not (folder / name).exists():
                return f"{folder / name} is missing"
            if size_and_digest(folder / name) != expected[name]:
                return f"{folder / name} is damaged: its size or digest is not that of {STATE}"
    except (OSError, ValueError) as error:
        return one_line(error)


def restore_optimizer(folder, policy, optimizer):
    """Loads the optimizer's state in place, on any number of ranks."""
    state_dict, tensors = optimizer_tensors(policy, optimizer)
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder / OPTIMIZER)))
    set_optimizer_state_dict(policy, optimizer, state_dict, options=FLAT)


# -----------------------------------------------------------------------------
# what a checkpoint consists of


def files_of(folder) -> list[str]:
    """Names of all files in a checkpoint but state.json, relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != STATE)


def digests_of(folder, names) -> dict:
    return {name: size_and_digest(folder / name) for name in names}


def size_and_digest(path) -> list:
    """[bytes, digest] of a file. xxHash reads several gigabytes a second, so that hashing costs little beside loading."""
    found, n = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            found.update(block)
            n += len(block)
    return [n, found.hexdigest()]


# -----------------------------------------------------------------------------
# the student that a run leaves


def save_final(out, dtype, trust_remote_code=False):
    """On rank 0, writes OUT/final: the student of the newest checkpoint, in `dtype`. It gets its name once it is complete."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    if rank() > 0:
        return
    folder, checkpoint = out / FINAL, latest(out)
    tmp = folder.with_name(FINAL + ".tmp")
    remove(tmp)
    try:
        lm = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, trust_remote_code=trust_remote_code)
        lm.generation_config = (
            GenerationConfig()
        )  # one that transformers writes for sure; the student's own replaces it
        lm.save_pretrained(tmp)
        (tmp / "generation_config.json").unlink()
        for name in files_of(checkpoint):
            if Path(name).parent == Path() and not name.endswith((".safetensors", ".index.json")):
                shutil.copyfile(checkpoint / name, tmp / name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(tmp, ignore_errors=True)
        raise OSError(f"could not save {folder}: {one_line(error)}") from None
    for file in tmp.iterdir():
        fsync(file)
    remove(folder)
    tmp.rename(folder)
    fsync(out)
