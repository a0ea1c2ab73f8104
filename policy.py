"""Student and teacher as modules: loading, sharding with FSDP2, and a forward pass that never makes [N, V] logits.

hidden = policy(batch)                                                  # [N, H] at the response tokens
z, lse = head_logits(hidden, *policy.head(), ids, **options)            # losses.py applies the head, in chunks
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from configs import FULL_VOCABULARY_LOSSES, TOPK_LOSSES
from losses import head_kl, head_logits, head_topk
from support import toy
from support.common import one_rank_at_a_time, world_size
from support.models import check_head, load_lm, patch_with_liger, weights_digest
from support.vocabulary import Vocabulary


class Policy(nn.Module):
    """A causal language model whose forward pass ends before the head.

    vocabulary: what student and teacher have in common. file_dtype: the dtype of the model's files, on load and on save. digest:
    of the weights, as this rank has loaded them.
    """

    def __init__(self, lm, vocabulary: Vocabulary, file_dtype=torch.float32, digest=""):
        super().__init__()
        self.lm = lm
        self.vocabulary = vocabulary
        self.file_dtype = file_dtype
        self.digest = digest

    def forward(self, batch):
        """Hidden states [N, H] of a MicroBatch, at the positions that predict its N response tokens.

        batch.ids [B, L] is padded on the right, so causal attention needs no mask.
        """
        hidden = self.lm.get_decoder()(input_ids=batch.ids, use_cache=False).last_hidden_state  # [B, L, H]
        return hidden[batch.rows, batch.cols]

    def head(self):
        """(weight [V', H], bias [V'] or None) of the language-model head. Only after forward(), and before the next backward.

        The head belongs to FSDP2's root module, which shard() keeps whole after a forward pass, until the backward pass ends.
        """
        out = self.lm.get_output_embeddings()
        return out.weight, out.bias


def token_logprobs(policy, batch, temperature):
    """[N] log pi(y_t) of a micro-batch's response tokens, with gradient if it is enabled."""
    hidden = policy(batch)
    options = policy.vocabulary.head_options(temperature)
    z, lse = head_logits(hidden, *policy.head(), batch.tokens[:, None], **options)
    return z[:, 0] - lse


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


def uses_compile(cfg) -> bool:
    return cfg.kernels in ("compile", "both")


# -----------------------------------------------------------------------------
# loading


def model_paths(cfg):
    """{role: folder or hub name} of the models that this process loads."""
    paths = {"student": toy.STUDENT if cfg.student == "toy" else cfg.student}
    if not cfg.teacher_url:
        paths["teacher"] = toy.TEACHER if cfg.teacher == "toy" else cfg.teacher
    return paths


def load_policy(path, cfg, vocabulary, device, *, trainable):
    """The student (trainable): fp32 master weights, bf16 compute on CUDA. The teacher: bf16 on CUDA, fp32 on a CPU.

    With several ranks, and with one GPU, sharded with FSDP2. ValueError for a model that scales or caps its logits, which are then
    not weight @ hidden + bias, and for one of a type that --kernels does not support.
    """
    from transformers import AutoConfig

    # Making the mesh is a collective, so it stands outside the block in which the ranks take turns. init_device has made a process
    # group, of one for a single GPU; a single rank on a CPU has none.
    mesh = init_device_mesh(device.type, (world_size(),)) if dist.is_initialized() else None
    # Each rank holds the whole model in host memory until it has sharded it, which needs no communication.
    with one_rank_at_a_time():
        hub_options = {"trust_remote_code": cfg.trust_remote_code}
        config = AutoConfig.from_pretrained(path, **hub_options)
        file_dtype = config.dtype or torch.float32
        text_config = config.get_text_config()  # the language part of a vision-language model; otherwise all of it
        for name, value in vars(text_config).items():  # dropout is always off: the gate would take it for drift
            if "drop" in name and isinstance(value, float):
                setattr(text_config, name, 0.0)
        dtype = torch.float32 if trainable else compute_dtype(device)
        if cfg.kernels in ("liger", "both"):
            patch_with_liger(text_config.model_type)
        lm = load_lm(path, config=config, dtype=dtype, **hub_options)
        digest = weights_digest(lm)
        lm.requires_grad_(False)
        for part in (lm.get_decoder(), lm.get_output_embeddings()):  # a vision tower stays frozen
            part.requires_grad_(trainable)
        check_head(lm, path)
        if trainable and cfg.grad_ckpt:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
            lm.train()  # transformers checkpoints in training mode only; without dropout the mode changes nothing else
        policy = Policy(lm, vocabulary, file_dtype, digest)
        if uses_compile(cfg):
            for block in decoder_blocks(lm):
                block.compile(dynamic=True)  # each on its own, inside its checkpoint and its shard; lengths vary
        if mesh:
            shard(policy, mesh, device)  # moves only this rank's shards to the device, one layer at a time
        return policy.to(device)


def compute_dtype(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def shard(policy, mesh, device):
    """FSDP2, one decoder block at a time. It averages gradients over the ranks.

    On CUDA it also casts each block's weights to bf16 for its forward and backward pass. A single GPU shards, too, so that it
    computes in the same precision as eight.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    precision = MixedPrecisionPolicy(param_dtype=compute_dtype(device), reduce_dtype=torch.float32)
    for block in decoder_blocks(policy.lm):
        fully_shard(block, mesh=mesh, mp_policy=precision)
    # The root holds the embedding, the last norm and the head. It stays whole after forward(): Policy.head() needs that.
    fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=False)


def decoder_blocks(lm):
    """The modules that transformers names as not to be split, such as Qwen3DecoderLayer; inner ones first, as FSDP2 asks."""
    names = lm._no_split_modules or ()
    return [module for module in reversed(list(lm.modules())) if type(module).__name__ in names]


# -----------------------------------------------------------------------------
# a teacher in this process (support/server_teacher.py: one elsewhere)


class LocalTeacher:
    """A frozen Policy. With cfg.teacher_offload its weights wait in host memory between two rollout batches.

    head: its (weight, bias), whole, if the loss is over the whole vocabulary; else None.
    """

    def __init__(self, policy, cfg, device):
        self.policy, self.cfg, self.device = policy, cfg, device
        self.digest, self.config = policy.digest, policy.lm.config.to_json_string()
        self.head = whole_head(policy) if cfg.loss in FULL_VOCABULARY_LOSSES else None
        if cfg.teacher_offload:
            policy.to("cpu")

    @contextmanager
    def on_device(self):
        if self.cfg.teacher_offload:
            self.policy.to(self.device)
        yield
        if self.cfg.teacher_offload:
            self.policy.to("cpu")

    def targets(self, batches) -> list[dict]:
        """What the loss needs of the teacher, for each micro-batch, on the host. A collective, as every forward pass is."""
        with self.on_device():
            return [teacher_targets(self.policy, batch, self.cfg) for batch in batches]

    @torch.no_grad()
    def reverse_kl(self, student, batches) -> list:
        """The exact KL(student || teacher) at each response token, in nats, on the host: [N] for each micro-batch."""
        options = student.vocabulary.head_options(self.cfg.temperature)
        kl = []
        with self.on_device():
            for batch in batches:
                hidden, hidden_t = student(batch), self.policy(batch)
                kl.append(head_kl(hidden, *student.head(), hidden_t, *self.policy.head(), **options)[0].cpu())
        return kl


@torch.no_grad()
def teacher_targets(policy, batch, cfg) -> dict:
    """The teacher's targets of one micro-batch (train.py lists them), from one forward pass."""
    hidden = policy(batch)
    k = cfg.topk if cfg.loss in TOPK_LOSSES else 1
    options = policy.vocabulary.head_options(cfg.temperature)
    topk_ids, topk_logq, logq = head_topk(hidden, *policy.head(), k, also_ids=batch.tokens[:, None], **options)
    targets = {"logq_sampled": logq[:, 0], "topk_ids": topk_ids, "topk_logq": topk_logq}
    if cfg.loss in FULL_VOCABULARY_LOSSES:  # [N, H_t] is small beside [N, V]; the head is applied again in the loss
        targets["hidden"] = hidden
    return {name: x.cpu() for name, x in targets.items()}


# -----------------------------------------------------------------------------
# whole tensors, whether or not the model is sharded. Collectives: every rank must call them


def full_tensor(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def whole_head(policy):
    """(weight, bias or None) of the head on every rank, without gradient, at any time."""
    weight, bias = policy.head()  # sharded, unless a forward pass has just gathered it
    return full_tensor(weight).detach(), None if bias is None else full_tensor(bias).detach()


def full_weights(policy):
    """Yields (name, full tensor) of the state dict, one at a time, tied weights once. Every rank must iterate over all of it.

    state_dict() gives the fp32 shards, the root's too: FSDP2 reshards what a forward pass has gathered.
    """
    tied = policy.lm.all_tied_weights_keys  # {copy: source}, such as the head, whose source is the embedding
    for name, weight in policy.lm.state_dict().items():
        if name not in tied:
            yield name, full_tensor(weight)
