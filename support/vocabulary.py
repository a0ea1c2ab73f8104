"""What the tokens of student and teacher have in common, and which of them end an answer.

The one source for training, for evaluate.py, and for the generation config of the student that a run leaves.
"""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from support.common import print0
from support.errors import one_line


@dataclass
class Vocabulary:
    size: int  # ids below it mean the same to student and teacher; further rows of the embeddings are padding
    newline_ids: set[int]  # whose text contains a newline: in BPE many besides "\\n", such as ".\\n\\n"
    stop_ids: list[int]  # that end an answer of either
    merged: list[int]  # the stop ids, if there are several and they count as one outcome (--merge_stops); else empty
    # In the plain template a base model that has answered goes on with another question. The tokens of its "Question:", which
    # end the answer if they come after a newline; empty for other templates.
    next_question: list[int] = field(default_factory=list)

    def head_options(self, temperature) -> dict:
        """What the head functions of losses.py need to know of the vocabulary."""
        return {"temperature": temperature, "vocab": self.size, "merged": self.merged}

    def asks_again(self, response) -> bool:
        """Whether the response has just gone on with another question."""
        n = len(self.next_question)
        return 0 < n < len(response) and response[-n:] == self.next_question and response[-n - 1] in self.newline_ids


def load_tokenizer(paths, *, trust_remote_code=False, merge_stops=False, template="auto"):
    """(the student's tokenizer, the Vocabulary of all models) of paths {role: folder or hub name}; a "student" is among them.

    template: as --template. ValueError if the tokenizers differ.
    """
    from transformers import AutoConfig

    options = {"trust_remote_code": trust_remote_code}
    tokenizers = {role: tokenizer_of(path, **options) for role, path in paths.items()}
    tokenizer = tokenizers["student"]
    size = shared_size(tokenizer, tokenizers.get("teacher", tokenizer))
    for path in paths.values():
        size = min(size, pretrained(AutoConfig, path, **options).get_text_config().vocab_size)
    stops = {role: stop_ids_of(path, tokenizers[role]) for role, path in paths.items()}
    stop_ids = sorted({i for ids in stops.values() for i in ids if i < size})
    merged = stop_ids if merge_stops and len(stop_ids) > 1 else []
    if not merged and stops.get("teacher", stops["student"]) != stops["student"]:
        print0(f"warning: the teacher ends its answers with {stops['teacher']}, the student with {stops['student']}")
    newlines = newline_ids(tokenizer, size)
    is_plain = template == "plain" or (template == "auto" and not tokenizer.chat_template)
    return tokenizer, Vocabulary(
        size, newlines, stop_ids, merged, next_question(tokenizer, newlines) if is_plain else []
    )


def tokenizer_of(path, **options):
    """A model's tokenizer, of transformers' own kind. ValueError if there is only mistral-common's, which has no chat template."""
    from transformers import AutoTokenizer

    tokenizer = pretrained(AutoTokenizer, path, mistral_format=False, **options)
    folder = folder_of(path)
    if (folder / "tekken.json").exists() and not (folder / "tokenizer.json").exists():
        raise ValueError(
            f"{path} has only mistral-common's tokenizer, tekken.json: add a tokenizer.json of transformers to it"
        )
    return tokenizer


def folder_of(path) -> Path:
    """A model's folder; that of a hub name is in the cache, with all that was loaded."""
    from transformers.utils import cached_file

    return Path(cached_file(path, "config.json")).parent


def pretrained(auto_class, path, **options):
    """auto_class.from_pretrained(path), of a config or tokenizer. ValueError without such a folder or hub name, network, or package."""
    try:
        return auto_class.from_pretrained(path, **options)
    except (OSError, ImportError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error


def shared_size(student, teacher) -> int:
    """V such that ids below it mean the same to both tokenizers; ValueError if a token's ids differ.

    Compares the maps, not the sizes: models of one family pad their embeddings differently.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    shared = min(max(ours.values()), max(theirs.values())) + 1  # not their lengths: there may be gaps between the ids
    our_pairs, their_pairs = ({(token, i) for token, i in vocab.items() if i < shared} for vocab in (ours, theirs))
    differ = sorted({token for token, _ in our_pairs ^ their_pairs})
    if differ:
        token = differ[0]
        raise ValueError(
            f"teacher and student have different tokenizers: {len(differ)} tokens differ, for example {token!r} "
            f"is id {ours.get(token)} for the student and {theirs.get(token)} for the teacher"
        )
    return shared


def newline_ids(tokenizer, size: int) -> set[int]:
    # Without the ids in a gap of the vocabulary, which some tokenizers cannot decode
    ids = sorted({i for i in tokenizer.get_vocab().values() if i < size})
    texts = tokenizer.batch_decode([[i] for i in ids])
    return {i for i, text in zip(ids, texts, strict=True) if "\n" in text}


def decode(tokenizer, ids, **options) -> str:
    """The text of tokens that a model sampled. An id in a gap of the vocabulary has none, and some tokenizers cannot decode it."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return tokenizer.decode([i for i, token in zip(ids, tokens, strict=True) if token is not None], **options)


# -----------------------------------------------------------------------------
# what ends an answer


def next_question(tokenizer, newlines) -> list[int]:
    """The tokens of "Question:" after a newline; the plain template (data.py) begins with that word."""
    ids = tokenizer("\n\nQuestion:", add_special_tokens=False)["input_ids"]
    start = max((i + 1 for i, token in enumerate(ids) if token in newlines), default=len(ids))
    return ids[start:]


def stop_ids_of(path, tokenizer) -> list[int]:
    """The stop tokens of a model's folder or hub name. Not every model comes with a generation_config.json."""
    from transformers import GenerationConfig

    for file in ("generation_config.json", "config.json"):
        with suppress(OSError):
            return stop_ids(tokenizer, GenerationConfig.from_pretrained(path, config_file_name=file))
    return stop_ids(tokenizer)


def stop_ids(tokenizer, generation_config=None) -> list[int]:
    """The EOS ids of tokenizer and generation config, and the end of turn of the chat template.

    Base models often do not list their end-of-turn token as EOS, though the chat template ends every answer with it.
    """
    ids = set(end_of_turn(tokenizer))
    for source in (tokenizer, generation_config):
        eos = getattr(source, "eos_token_id", None)
        ids |= set(eos) if isinstance(eos, (list, tuple)) else {eos} - {None}
    return sorted(ids)


def end_of_turn(tokenizer) -> list[int]:
    """The first special token that the chat template puts after an answer; empty if there is none."""
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        return []
    chat = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "It is 2."}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except jinja2.exceptions.TemplateError:  # it refuses this conversation; data.encode() reports it if it refuses ours
        return []
    _, found, end = text.rpartition("It is 2.")
    ids = tokenizer(end, add_special_tokens=False)["input_ids"] if found else []
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    # In some tokenizers the newline after the end-of-turn token is an added token, too, but it ends no answer.
    return [i for i in ids if i in special and tokenizer.decode([i]).strip()][:1]
