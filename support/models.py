"""What is asked of a model before it is used: its weights are whole, its head is one that losses.py can apply, its positions fit."""

import inspect

import torch
import xxhash
from safetensors import SafetensorError
from torch import nn

# -----------------------------------------------------------------------------
# weights


def load_lm(path, **options):
    """AutoModelForCausalLM.from_pretrained(path, **options). ValueError if a weight is missing, or is none of the model's.

    transformers makes up what is missing, and drops what it does not know, such as weights with a wrapper's prefix. A head that
    is tied to the embedding is not missing; masks and the like, which old files have as buffers, are no weights.
    """
    from transformers import AutoModelForCausalLM

    try:
        lm, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    except SafetensorError as error:
        raise ValueError(f"{path}: a file of weights is damaged: {error}") from error
    buffers = {name for name, _ in lm.named_buffers()}
    unknown = [name for name in info["unexpected_keys"] if name not in buffers and not name.endswith(".masked_bias")]
    kinds = ((info["missing_keys"], "are missing"), (unknown, "in its files are not the model's"))
    faults = [f"{len(names)} weights {what}, such as {min(names)}" for names, what in kinds if names]
    if faults:
        raise ValueError(f"{path}: {'; '.join(faults)}")
    return lm


SMALL_TENSOR = 1 << 16  # elements; a digest reads a tensor of at most so many as a whole


def weights_digest(lm) -> str:
    """The dtype and a digest of a model's weights, which are in host memory.

    It reads a small tensor as a whole, and some thousands of elements, evenly spread, of a large one: another revision differs
    in most of them, and a damaged part of a file in some. Reading all would cost a tenth of loading the model.
    """
    found = xxhash.xxh3_128()
    for name, x in lm.named_parameters():
        stride = 1 if x.numel() <= SMALL_TENSOR else x.numel() >> 12
        sample = x.detach().flatten()[::stride].contiguous()
        found.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        found.update(sample.view(torch.uint8).numpy())
    return f"{lm.dtype} {found.hexdigest()}"


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


def patch_with_liger(model_type):
    """From here on, models of this type have Liger's fused RMSNorm, SwiGLU and RoPE. ValueError if it knows no such type."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    if apply is None:
        raise ValueError(f"--kernels: liger-kernel has nothing for models of the type {model_type}")
    wanted = {
        "rope": True,
        "rms_norm": True,
        "swiglu": True,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }
    known = inspect.signature(apply).parameters  # Gemma, for example, has no swiglu
    apply(**{name: x for name, x in wanted.items() if name in known})


# -----------------------------------------------------------------------------
# positions


def rope_parameters(config) -> list[dict]:
    """Of all layers, or of each type of layers; empty for models with other positions."""
    found = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [part for part in (found, *found.values()) if isinstance(part, dict) and "rope_type" in part]


def context_of(config) -> int | None:
    """Tokens that a model takes; None if it does not say. With YaRN, the factor times the original context.

    Qwen's model cards add YaRN to a config without raising its max_position_embeddings.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    for rope in rope_parameters(config):
        if rope["rope_type"] == "yarn" and context:
            context = max(context, int(rope["factor"] * rope["original_max_position_embeddings"]))
    return context


def check_positions(config, path, length):
    """ValueError if the positions' frequencies change before a text of this many tokens ends.

    The trainer's would then depend on the longest text of a batch, and the sampler's on how far it has come.
    """
    for rope in rope_parameters(config):
        limit = rope.get("original_max_position_embeddings") or config.get_text_config().max_position_embeddings
        if rope["rope_type"] in ("longrope", "dynamic") and length > limit:
            raise ValueError(
                f"{path} has positions of the type {rope['rope_type']}, whose frequencies change beyond {limit} tokens: "
                f"--max_prompt + --max_response must be at most that"
            )
