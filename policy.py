"""Student and teacher as modules: loading, sharding with FSDP2, and a forward pass that never makes [N, V] logits."""

from contextlib import suppress

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import data
from common import one_line, one_rank_at_a_time, say, world_size
from losses import head_logits


class Policy(nn.Module):
    """A causal language model whose forward() returns on_hidden(hidden, weight, bias) instead of logits.

    vocabulary: a data.Vocabulary, what student and teacher have in common.
    file_dtype: the dtype of the model's files, on load and on save.
    """

    def __init__(self, lm, vocabulary, file_dtype=torch.float32):
        super().__init__()
        self.lm = lm
        self.vocabulary = vocabulary
        self.file_dtype = file_dtype

    def head_options(self, temperature) -> dict:
        """What the head functions of losses.py need to know of the vocabulary."""
        return {"temperature": temperature, "vocab": self.vocabulary.size, "merged": self.vocabulary.merged}

    def forward(self, ids, rows, cols, on_hidden):
        """ids [B, L], right-padded, so causal attention needs no mask; rows and cols [N] choose hidden states.

        Calls on_hidden(hidden [N, H], weight [V', H], bias [V'] or None) with the head's weights, and returns its result.
        on_hidden must run inside forward(): only there are the head's weights whole. FSDP2 does not reshard the root module,
        to which the head belongs, after forward, so they remain whole through the backward pass.
        """
        hidden = self.lm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # [B, L, H]
        out = self.lm.get_output_embeddings()
        hidden = hidden[rows, cols]  # [N, H]: only the positions that predict a response token go through the head
        return on_hidden(hidden, out.weight.to(hidden.dtype), out.bias)


def choose_attention_kernels(device):
    """On CUDA, decides which kernels may compute attention in this process from here on: flash and memory-efficient.

    Not math attention, which builds an [L, L] matrix for each head, and not cuDNN's, which plans anew for every shape. The
    choice must hold for all passes alike: gradient checkpointing compares what the kernels of the forward and of the backward
    pass save. Call it after everything that may import vLLM, which changes these switches.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.enable_mem_efficient_sdp(True)
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.enable_math_sdp(False)


def token_logprobs(policy, batch, temperature):
    """[N] log pi(y_t) of a micro-batch's response tokens, with gradient if it is enabled."""

    def on_hidden(hidden, weight, bias):
        z, lse = head_logits(hidden, weight, batch.tokens[:, None], bias, **policy.head_options(temperature))
        return z[:, 0] - lse

    return policy(batch.ids, batch.rows, batch.cols, on_hidden)


# -----------------------------------------------------------------------------
# loading


def model_paths(cfg):
    """{role: folder or hub name} of the models that this process loads; "toy" is trained here if it does not exist yet."""
    paths = {"student": cfg.student}
    if not cfg.teacher_url:
        paths["teacher"] = cfg.teacher
    if "toy" in paths.values():
        import toy

        teacher, student = toy.models()
        folders = {"teacher": teacher, "student": student}
        paths = {role: folders[role] if path == "toy" else path for role, path in paths.items()}
    return paths


def pretrained(auto_class, path, **options):
    """auto_class.from_pretrained(path): a config or a tokenizer. ValueError if there is no such folder or hub name, or no network."""
    try:
        return auto_class.from_pretrained(path, **options)
    except OSError as error:
        raise ValueError(f"{path}: {one_line(error)}") from error


def load_tokenizer(paths, cfg):
    """(the student's tokenizer, the Vocabulary that student and teacher share).

    ValueError if the tokenizers differ, a context is too short, or the vocabulary is smaller than --topk.
    """
    from transformers import AutoConfig, AutoTokenizer

    hub_options = {"trust_remote_code": cfg.trust_remote_code}
    tokenizers = {role: pretrained(AutoTokenizer, path, **hub_options) for role, path in paths.items()}
    tokenizer = tokenizers["student"]
    vocab = data.shared_vocab(tokenizer, tokenizers.get("teacher", tokenizer))
    for role, path in paths.items():
        config = pretrained(AutoConfig, path, **hub_options).get_text_config()
        vocab = min(vocab, config.vocab_size)
        context = getattr(config, "max_position_embeddings", None)
        if context and cfg.max_prompt + cfg.max_response > context:
            raise ValueError(
                f"--max_prompt {cfg.max_prompt} + --max_response {cfg.max_response} tokens do not fit "
                f"the {role}'s context of {context}"
            )
    if cfg.topk > vocab:
        raise ValueError(f"--topk {cfg.topk} is more than the shared vocabulary of {vocab}")
    stops = {role: stop_ids_of(path, tokenizers[role]) for role, path in paths.items()}
    stop_ids = sorted({i for ids in stops.values() for i in ids if i < vocab})
    merged = stop_ids if cfg.merge_stops and len(stop_ids) > 1 else []
    if not merged and stops.get("teacher", stops["student"]) != stops["student"]:
        say(f"warning: the teacher ends its answers with {stops['teacher']}, the student with {stops['student']}")
    return tokenizer, data.Vocabulary(vocab, data.newline_token_ids(tokenizer, vocab), stop_ids, merged)


def load_policy(path, cfg, vocabulary, device, *, trainable):
    """The student (trainable): fp32 master weights, bf16 compute on CUDA. The teacher: bf16 on CUDA, fp32 on a CPU.

    With several ranks, and with one GPU, sharded with FSDP2. ValueError for a model whose logits are more than weight @ hidden
    + bias.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    hub_options = {"trust_remote_code": cfg.trust_remote_code}
    config = AutoConfig.from_pretrained(path, **hub_options)
    file_dtype = config.dtype or torch.float32
    text_config = config.get_text_config()  # the language part of a vision-language model; otherwise all of it
    for name, value in vars(text_config).items():  # dropout is always off: the gate would take it for drift
        if "drop" in name and isinstance(value, float):
            setattr(text_config, name, 0.0)
    dtype = torch.float32 if trainable else compute_dtype(device)
    # Making the mesh is a collective, so it stands outside the block in which the ranks take turns.
    mesh = init_device_mesh(device.type, (world_size(),)) if dist.is_initialized() else None
    # Each rank holds the whole model in host memory until it has sharded it, which needs no communication.
    with one_rank_at_a_time():
        lm = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, **hub_options)
        lm.requires_grad_(False)
        for part in (lm.get_decoder(), lm.get_output_embeddings()):  # a vision tower stays frozen
            part.requires_grad_(trainable)
        check_head(lm, path)
        if trainable and cfg.grad_ckpt:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
            lm.train()  # transformers checkpoints in training mode only; without dropout the mode changes nothing else
        policy = Policy(lm, vocabulary, file_dtype)
        if mesh:
            shard(policy, mesh, device)  # moves only this rank's shards to the device, one layer at a time
        return policy.to(device)


def shard(policy, mesh, device):
    """FSDP2, one decoder block at a time. It averages gradients over the ranks.

    On CUDA it also casts each block's weights to bf16 for its forward and backward pass, which is why a single GPU shards, too:
    one computes what eight compute.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    precision = MixedPrecisionPolicy(param_dtype=compute_dtype(device), reduce_dtype=torch.float32)
    blocks = policy.lm._no_split_modules or ()  # names of classes, such as Qwen3DecoderLayer
    for module in reversed(list(policy.lm.modules())):  # inner modules first, as FSDP2 asks
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)


def compute_dtype(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@torch.no_grad()
def check_head(lm, path):
    """ValueError for models that scale or cap their logits after the head, as Gemma 2 does: losses.py would be wrong."""
    cap = getattr(lm.config.get_text_config(), "final_logit_softcapping", None)
    if cap:  # the check of numbers below would miss it: a cap changes large logits only
        raise ValueError(f"{path} caps its logits (final_logit_softcapping {cap}), which losses.py does not do")
    ids = torch.arange(8)[None]
    logits = lm(ids).logits[0, -1].float()
    if logits.isnan().any():
        raise ValueError(f"{path} gives NaN logits: its weights are damaged, or overflow in {lm.dtype}")
    hidden = lm.get_decoder()(input_ids=ids).last_hidden_state[0, -1:]
    out = lm.get_output_embeddings()
    ours = nn.functional.linear(hidden, out.weight, out.bias)[0].float()
    if not torch.allclose(ours, logits, rtol=2e-2, atol=2e-2 * logits.std().item()):
        raise ValueError(f"{path} scales or caps its logits after the head, which losses.py does not do")


# -----------------------------------------------------------------------------
# stop tokens


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


# -----------------------------------------------------------------------------
# full tensors, whether or not the model is sharded


def full_tensor(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def head_weights(policy):
    """(weight, bias or None) of the head, whole on every rank, without gradient. A collective."""
    out = policy.lm.get_output_embeddings()
    bias = None if out.bias is None else full_tensor(out.bias).detach()
    return full_tensor(out.weight).detach(), bias


def full_weights(policy):
    """Yields (name, full tensor) of the state dict, one at a time, tied weights once.

    A collective: every rank must iterate over all of it.
    """
    tied = policy.lm.all_tied_weights_keys  # {copy: source}, such as the head, whose source is the embedding
    for name, weight in policy.lm.state_dict().items():
        if name not in tied:
            yield name, full_tensor(weight)
