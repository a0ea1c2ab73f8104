"""The student and the teacher: loading, FSDP2, and what one forward pass over a batch gives.

The language-model head runs inside Policy.forward, on response positions alone, so that FSDP2 gathers
its weight once per micro-batch and reduces its gradient like any other, tied to the embedding or not.
"""

import torch
import torch.distributed as dist
from torch import nn

from losses import head_kl, head_logits, head_topk, lsm_loss, opd_loss, tail_loss

TOPK = ("lsm", "fkl_topk", "tail_topk")
FULL_KL = {"rkl": 1.0, "fkl": 0.0, "jsd": None}  # beta; jsd takes --beta


class Policy(nn.Module):
    """A causal LM whose forward is `head(hidden [N, H], weight [V', H], bias [V'] or None)`."""

    def __init__(self, lm, vocab):
        super().__init__()
        self.lm, self.vocab = lm, vocab
        self.dtype = torch.float32  # of the files it came from, and of those it is saved to
        self.teacher_head = None  # (weight, bias) of the teacher, on the student, for full-vocabulary losses

    def forward(self, batch, head):
        with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=batch.ids.is_cuda):
            hidden = self.lm.get_decoder()(input_ids=batch.ids, use_cache=False).last_hidden_state
        out = self.lm.get_output_embeddings()
        hidden = hidden[batch.rows, batch.cols]  # [N, H], the positions that predict the response
        if hidden.is_cuda:  # autocast leaves the last norm's output in fp32
            hidden = hidden.to(torch.bfloat16)
        return head(hidden, out.weight.to(hidden.dtype), out.bias)


def load_policy(path, cfg, vocab, device, *, trainable):
    """Trainable: fp32 master weights, bf16 compute on CUDA. Otherwise bf16 on CUDA, fp32 on CPU. Sharded over all ranks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = torch.bfloat16 if device.type == "cuda" and not trainable else torch.float32
    kwargs = dict(dtype=dtype, trust_remote_code=cfg.trust_remote_code)
    lm = AutoModelForCausalLM.from_pretrained(path, **kwargs).requires_grad_(trainable)
    check_head(lm, path)
    if trainable and cfg.grad_ckpt:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        lm.train()
    policy = Policy(lm, vocab)
    policy.dtype = AutoConfig.from_pretrained(path, trust_remote_code=cfg.trust_remote_code).dtype or torch.float32
    if dist.is_initialized():
        shard(policy, device)  # moves to the device what it keeps, layer by layer
    return policy.to(device)


def shard(policy, device):
    """FSDP2, block by block. It averages gradients over the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = torch.bfloat16 if device.type == "cuda" else None
    precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in policy.lm.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)


@torch.no_grad()
def check_head(lm, path):
    """Stops for models whose logits are not weight @ hidden + bias (scaled or soft-capped, as in Gemma)."""
    ids = torch.arange(8)[None]
    logits = lm(ids).logits[0, -1].float()
    hidden, out = (lm.get_decoder()(input_ids=ids).last_hidden_state[0, -1:], lm.get_output_embeddings())
    ours = nn.functional.linear(hidden, out.weight, out.bias)[0].float()
    if not torch.allclose(ours, logits, rtol=2e-2, atol=2e-2 * logits.std().item()):
        raise ValueError(f"{path} scales or caps its logits after the head, which losses.py does not do")


def training_flops(policy, lengths):
    """FLOPs of one forward and backward pass over sequences of these lengths, 6 a parameter and token and causal attention.

    Without recomputation, and with the head at every position, as model FLOPs utilisation is usually counted.
    """
    config = policy.lm.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_hidden_layers * config.num_attention_heads * head_dim
    size = sum(p.numel() for p in policy.lm.parameters())
    if not config.tie_word_embeddings:
        size -= policy.lm.get_input_embeddings().weight.numel()  # looked up, not multiplied
    return sum(6 * size * n + 6 * width * n**2 for n in lengths)


def full_tensor(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def head_weights(policy):
    """(weight, bias) of the head, whole on every rank, without gradient."""
    out = policy.lm.get_output_embeddings()
    return full_tensor(out.weight).detach(), None if out.bias is None else full_tensor(out.bias).detach()


def full_weights(policy):
    """(name, full tensor) of the state dict, one tensor at a time; a collective: every rank must walk it."""
    for name, weight in policy.lm.state_dict().items():
        yield name, full_tensor(weight)


@torch.no_grad()
def teacher_targets(teacher, batch, cfg):
    """What the loss needs of the teacher {name: [N, ...]}, on the CPU: computed once, it serves every epoch."""

    def head(hidden, weight, bias):
        k = cfg.topk if cfg.loss in TOPK else 1
        at = dict(ids=batch.tokens[:, None], temperature=cfg.temperature, vocab=teacher.vocab)
        ids, logq, logp = head_topk(hidden, weight, k, bias, **at)
        targets = {"logp": logp[:, 0], "ids": ids, "logq": logq}
        return targets | {"hidden": hidden} if cfg.loss in FULL_KL else targets

    return {name: x.cpu() for name, x in teacher(batch, head).items()}


def score(policy, batch, temperature):
    """[N] log-probs of the batch's response tokens."""

    def head(hidden, weight, bias):
        z, lse = head_logits(hidden, weight, batch.tokens[:, None], bias, temperature=temperature, vocab=policy.vocab)
        return z[:, 0] - lse

    return policy(batch, head)


def position_loss(policy, batch, cfg, want_logp=True):
    """One forward pass: (logp [N] of the sampled tokens, loss [N], diagnostics {name: [N]}).

    The first pass over a batch fills batch.old. The top-k losses need the student's logits at K ids
    alone; logp, for the gate, then costs one pass over the vocabulary without gradient, and is None
    where nothing asks for it (want_logp=False).
    """
    t = {name: x.to(batch.ids.device) for name, x in batch.targets.items()}
    if cfg.loss == "opd":
        logp = score(policy, batch, cfg.temperature)
        batch.keep_old(logp)
        clips = (cfg.clip_low or None, cfg.clip_high or None, cfg.dual_clip or None)
        return logp, *opd_loss(logp, batch.old, t["logp"], *clips)

    tokens, at = batch.tokens[:, None], dict(temperature=cfg.temperature, vocab=policy.vocab)
    exact = cfg.loss == "tail_topk" or not cfg.renormalise  # true probabilities: lse needs its gradient

    def kl_head(hidden, weight, bias):
        beta = cfg.beta if cfg.loss == "jsd" else FULL_KL[cfg.loss]
        weight_t, bias_t = policy.teacher_head
        kl, lse = head_kl(hidden, weight, t["hidden"], weight_t, bias, bias_t, beta=beta, **at)
        z, _ = head_logits(hidden.detach(), weight.detach(), tokens, bias, temperature=cfg.temperature, lse=False)
        return z[:, 0] - lse, kl

    def topk_head(hidden, weight, bias):
        ids = torch.cat([tokens, t["ids"]], 1)
        z, lse = head_logits(hidden, weight, ids, bias, lse=want_logp or exact, **at)
        return z, lse if exact or lse is None else lse.detach()

    if cfg.loss in FULL_KL:
        logp, loss = policy(batch, kl_head)
        batch.keep_old(logp)
        return logp, loss, {}
    z, lse = policy(batch, topk_head)
    logp = None if lse is None else (z[:, 0] - lse).detach()
    batch.keep_old(logp)
    there = t["logq"] > -torch.inf  # a server may have given fewer than K
    inside = ((t["ids"] == tokens) & there).any(1)
    support = torch.cat([(~inside & cfg.add_sampled)[:, None], there], 1)
    z = z.masked_fill(~support, -torch.inf)
    info = {"outside": (~inside).float(), "teacher_mass": t["logq"].exp().sum(1)}
    if lse is not None:
        info["student_mass"] = (z[:, 1:] - lse[:, None]).detach().exp().sum(1)
    if cfg.loss == "tail_topk":
        return logp, tail_loss(z[:, 1:] - lse[:, None], t["logq"]), info
    logq = torch.cat([t["logp"][:, None], t["logq"]], 1)
    kind = dict(
        renormalise=cfg.renormalise, log_ratio_clamp=cfg.log_ratio_clamp or None, forward=cfg.loss == "fkl_topk"
    )
    return logp, lsm_loss(z, logq, support, lse=lse, **kind), info
