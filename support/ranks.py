"""What all ranks must have alike. Each reads its own node's code, data and models, and a copy may be another one."""

import hashlib
import socket
from dataclasses import asdict

from support.common import ROOT, digest, gather, versions
from support.errors import abort


def same_on_all_ranks(found):
    """Ends all ranks in one line that says what differs where, unless `found` {what: a value or digest} is equal on all of them."""
    everyones = gather((socket.gethostname(), found))
    host0, expected = everyones[0]
    differing = []
    for what in {what: None for _, theirs in everyones for what in theirs}:
        ranks = [i for i, (_, theirs) in enumerate(everyones) if theirs.get(what) != expected.get(what)]
        places = ", ".join(f"{i} ({everyones[i][0]})" for i in ranks)
        differing += [f"{what} on rank {places}"] if ranks else []
    if differing:
        abort(f"not the same as on rank 0 ({host0}): {'; '.join(differing)}")


def settings_and_code(cfg) -> dict:
    per_node = ("device", "threads", "teacher_url")  # may suit the node
    found = {f"--{name}": x for name, x in asdict(cfg).items() if name not in per_node}
    found |= {f"the version of {name}": versions()[name] for name in ("torch", "transformers", "vllm")}
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("support/*.py")])
    return found | {"the code": digest([[path.name, path.read_text("utf-8")] for path in files])}


def data_and_tokenizer(train_prompts, held_out, model_files, vocabulary) -> dict:
    """model_files: {name: content} of the student's, as checkpoint.model_files returns them."""
    found = {"--data's prompts": train_prompts.digest}
    for name, prompts in held_out.items():
        found[f"the problems of {name}"] = digest_of_problems(prompts)
    # Of a hub model's other files, a node's cache may have more or fewer.
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"):
        found[f"--student's {name}"] = hashlib.blake2b(model_files.get(name, b"")).hexdigest()
    shared = [vocabulary.size, vocabulary.stop_ids, vocabulary.merged, sorted(vocabulary.newline_ids)]
    return found | {"the vocabulary of student and teacher": digest(shared)}


def digest_of_problems(prompts) -> str:
    """prompts: [(Problem, prompt ids)]."""
    return digest([[problem.id, ids, problem.answer] for problem, ids in prompts])
