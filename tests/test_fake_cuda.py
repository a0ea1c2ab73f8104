"""python -m pytest tests/test_fake_cuda.py      (what runs on CUDA, at the size of --preset qwen3: seconds on a CPU)

Fake tensors have shapes and dtypes but no data: nothing is computed or allocated. `Tensor.is_cuda` is patched to be
True, so the code takes its CUDA branches. These tests cannot show values, speed, or memory that a kernel takes itself.
"""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen3Config

import data
import losses
import train
from bench.gpu import head_pass
from configs import TrainConfig, parse
from gating import STATS, drift, gate, gate_stats
from losses import _vocabulary_chunks, head_kl, head_logits, head_topk, lsm_loss, opd_loss, tail_loss
from policy import Policy
from support.vocabulary import Vocabulary

N, H, H_T, V, K = 16384, 2048, 2560, 151936, 32  # one full response; student 1.7B, teacher 4B
VOCAB, STOPS = 151669, [151643, 151645]  # the tokenizer's; the head's other rows only pad
SEGMENTS = N // 64
BF16, FP32 = torch.bfloat16, torch.float32
CHUNK = 4 << 27  # bytes of the head's largest temporary: 2^27 elements in fp32
SMALL = 32 << 20  # bytes; an allowance for tensors [N] and [N, K]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that exist at once, and notes the dtypes of every matmul: (operands, result)."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.matmuls = weakref.WeakKeyDictionary(), 0, set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.live[x.untyped_storage()] = x.untyped_storage().nbytes()
        self.peak = max(self.peak, self.now())
        if op.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [x.dtype for x in args if isinstance(x, torch.Tensor)][-2:]
            self.matmuls.add((a, b, out.dtype))
        return out

    def now(self):
        return sum(self.live.values())


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    # Two results depend on data, which fake tensors do not have: the number of different ids (here the largest
    # possible), and the number of segments.
    monkeypatch.setattr(torch, "unique", lambda x, return_inverse: (x.new_empty(min(x.numel(), VOCAB)), x))
    monkeypatch.setattr(torch.Tensor, "__int__", lambda x: SEGMENTS - 1)
    with FakeTensorMode(), LiveBytes() as memory:
        yield memory


def parameter(*shape):
    return torch.empty(*shape, dtype=BF16, requires_grad=True)


def beyond(memory, run):
    """Peak of live bytes in run(), beyond those before it, and run's result."""
    before, memory.peak = memory.now(), 0
    out = run()
    return memory.peak - before, out


def test_the_meter_sees_known_allocations(memory):
    """1,000 and 500 kB at once, then 250; a view is not counted twice."""

    def run():
        a, b = torch.empty(250_000), torch.empty(125_000)
        del a
        return b.view(5, -1), torch.empty(62_500)

    assert beyond(memory, run)[0] == 1_500_000


# Bytes of a backward pass beyond inputs and gradients, if it
# - goes over the vocabulary in chunks: a chunk and its bf16 copy, and two fp32 tensors [N, H], the gradient of hidden
#   and the chunk's addition to it;
ALL_ROWS = CHUNK + CHUNK // 2 + 2 * N * H * 4
# - reads K rows of the head per position: the rows in use in fp32; then, for some positions at a time, their rows in
#   bf16 and in fp32, a chunk, beside the last positions' gradients, a chunk.
ROWS_IN_USE = VOCAB * H * 4 + CHUNK // 2 + 2 * CHUNK
LOSSES = {
    "opd": (1, lambda z, lse, logq: opd_loss(z[:, 0] - lse, lse.detach(), logq[:, 0])[0], ALL_ROWS),
    "lsm": (K, lambda z, lse, logq: lsm_loss(z, logq), ROWS_IN_USE),
    "fkl_topk": (K, lambda z, lse, logq: lsm_loss(z, logq, forward=True), ROWS_IN_USE),
    "tail_topk": (K, lambda z, lse, logq: tail_loss(z - lse[:, None], logq), ALL_ROWS),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_chosen_tokens(memory, name):
    """Dtypes, shapes, and memory: no matmul of the vocabulary's size in fp32, and nothing of the size [N, V]."""
    k, loss_of, bound = LOSSES[name]
    hidden, weight = parameter(N, H), parameter(V, H)
    ids, logq = torch.empty(N, k, dtype=torch.long), torch.empty(N, k)

    def run():
        z, lse = head_logits(hidden, weight, None, ids, vocab=VOCAB, merged=STOPS)
        loss = loss_of(z, lse, logq)
        loss.sum().backward()
        return z, lse, loss

    most, (z, lse, loss) = beyond(memory, run)
    assert (z.shape, lse.shape, loss.shape) == ((N, k), (N,), (N,))
    assert z.dtype == lse.dtype == loss.dtype == FP32
    assert hidden.grad.dtype == weight.grad.dtype == BF16
    assert memory.matmuls == {(BF16, BF16, FP32)}
    assert 0.9 * bound < most - weight.grad.nbytes - hidden.grad.nbytes < bound + SMALL


@pytest.mark.parametrize("n", [1, 1000, 12345, 16383, pytest.param(2 << 20, marks=pytest.mark.slow)])
def test_chunks_of_the_vocabulary_are_multiples_of_128_columns(memory, n):
    """Except the last. Nearly all of the vocabulary for one position; for 2^21 positions, more than the chunk's 64."""
    hidden, weight = torch.empty(n, 64, dtype=BF16), torch.empty(V, 64, dtype=BF16)
    chunks = _vocabulary_chunks(hidden, weight, None, 1.0, VOCAB, 2**27)
    widths = [logits.shape[1] for _, logits in chunks]
    assert sum(widths) == VOCAB and all(width % 128 == 0 for width in widths[:-1])
    assert widths[0] == {1: 151552, 1000: 134144, 12345: 10752, 16383: 8192, 2 << 20: 128}[n]


def test_bench_gpu_compares_them_with_chunks_of_any_width(memory, monkeypatch):
    seen = []

    def note(hidden, weight, bias, temperature, vocab, chunk):
        for v, logits in _vocabulary_chunks(hidden, weight, bias, temperature, vocab, chunk):
            seen.append(logits.shape[1])
            yield v, logits

    monkeypatch.setattr(losses, "_vocabulary_chunks", note)
    monkeypatch.setattr(losses, "CUDA_COLUMNS", 128)  # put back after the test
    hidden, weight, ids = parameter(12001, H), parameter(VOCAB, H), torch.empty(12001, 1, dtype=torch.long)
    for columns, width in ((128, 11136), (1, 11183)):
        seen.clear()
        head_pass(hidden, weight, ids, columns)
        assert seen[0] == width and sum(seen) == 2 * VOCAB  # forward and backward


@pytest.mark.parametrize("beta", [0.5, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.0, 1.0))])
def test_losses_over_the_whole_vocabulary(memory, beta):
    # Forward: logits of both models, half a chunk each, and three temporaries of that size; four for JSD
    bound = (2 + (4 if beta == 0.5 else 3)) * CHUNK // 2
    hidden, weight = parameter(N, H), parameter(V, H)
    hidden_t, weight_t = torch.empty(N, H_T, dtype=BF16), torch.empty(V, H_T, dtype=BF16)
    options = {"beta": beta, "vocab": VOCAB, "merged": STOPS}
    most, (kl, lse) = beyond(memory, lambda: head_kl(hidden, weight, None, hidden_t, weight_t, None, **options))
    assert kl.shape == lse.shape == (N,) and kl.dtype == lse.dtype == FP32 and not lse.requires_grad
    assert 0.9 * bound < most < bound + SMALL
    # Backward: up to four quarters of a chunk, a bf16 copy of one, and two fp32 tensors [N, H] as above
    bound = CHUNK + CHUNK // 8 + 2 * N * H * 4
    most, _ = beyond(memory, kl.sum().backward)
    assert hidden.grad.dtype == weight.grad.dtype == BF16
    assert memory.matmuls == {(BF16, BF16, FP32)}
    assert most - weight.grad.nbytes - hidden.grad.nbytes < bound + SMALL


def test_the_teachers_top_k(memory):
    hidden, weight = parameter(N, H_T), parameter(V, H_T)
    y = torch.empty(N, 1, dtype=torch.long)
    most, targets = beyond(memory, lambda: head_topk(hidden, weight, None, K, also_ids=y, vocab=VOCAB, merged=STOPS))
    ids, logq, logq_sampled = targets
    assert (ids.shape, logq.shape, logq_sampled.shape) == ((N, K), (N, K), (N, 1))
    assert (ids.dtype, logq.dtype, logq_sampled.dtype) == (torch.long, FP32, FP32)
    assert memory.matmuls == {(BF16, BF16, FP32)}
    assert 0.9 * CHUNK < most < CHUNK + SMALL


@pytest.mark.parametrize("stat", STATS)
def test_gates(memory, stat):
    """From log-probs of any dtype, gates and drift in fp32; about ten tensors [N]."""
    logp, logp_old = torch.empty(2, N, dtype=BF16).unbind()
    segments = torch.empty(N, dtype=torch.long)
    most, (g, s) = beyond(memory, lambda: gate(drift(logp, logp_old), segments, stat=stat))
    d = drift(logp, logp_old)
    for x in (g, s, d):
        assert x.shape == (N,) and x.dtype == FP32
    assert all(x.shape == () and x.dtype == FP32 for x in gate_stats(g, s, d).values())
    assert most < 10 * N * 4


def qwen3_policy():
    """The student with 1 of its 28 layers. As in training: checkpointed activations, weights that FSDP2 has cast to bf16."""
    config = Qwen3Config(
        vocab_size=V, hidden_size=H, intermediate_size=6144, num_hidden_layers=1, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    lm = AutoModelForCausalLM.from_config(config, dtype=BF16).train()
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(lm, Vocabulary(VOCAB, set(), STOPS, STOPS))


def micro_batch():
    def ints():
        return torch.zeros(N, dtype=torch.long)

    teacher = {"logq_sampled": torch.empty(N), "topk_ids": torch.empty(N, K, dtype=torch.long)}
    teacher |= {"topk_logq": torch.empty(N, K), "hidden": torch.empty(N, H_T, dtype=BF16)}
    ids = torch.zeros(1, 100 + N, dtype=torch.long)
    return data.MicroBatch(
        ids, ints(), ints(), ints(), ints(), torch.empty(N), torch.empty(N), [], teacher, logp_old=torch.empty(N)
    )


@pytest.mark.parametrize(
    "loss_name",
    ["opd", "lsm", "fkl_topk", "tail_topk", "rkl", *(pytest.param(x, marks=pytest.mark.slow) for x in ("fkl", "jsd"))],
)
def test_a_training_pass(memory, loss_name):
    """A forward and backward pass as train.update makes them."""
    cfg = parse(TrainConfig, ["--preset", "qwen3", "--loss", loss_name])
    policy, batch = qwen3_policy(), micro_batch()
    teacher_head = torch.empty(V, H_T, dtype=BF16), None

    def run():
        outputs = train.student_outputs(policy, batch, cfg, teacher_head)
        loss, info = train.base_loss(outputs, batch, cfg)
        d = drift(outputs["logp"].detach(), batch.logp_old)
        g, _ = gate(d, batch.segments, cfg.gate, tau=cfg.tau, stat=cfg.stat)
        (g * loss).sum().backward()
        return outputs["logp"].detach(), loss, info

    most, (logp, loss, info) = beyond(memory, run)
    for x in (logp, loss, *info.values()):
        assert x.shape == (N,) and x.dtype == FP32
    assert loss.requires_grad and not logp.requires_grad
    grads = [p.grad for p in policy.parameters()]
    assert all(grad.dtype == BF16 for grad in grads)
    # Operands in bf16: results in bf16 in the decoder, and in fp32 in the head
    assert memory.matmuls == {(BF16, BF16, BF16), (BF16, BF16, FP32)}
    # Less than one matrix [N, V] in bf16, 4.6 GiB. With math attention, 16 matrices [N, N] alone would take 8 GiB.
    assert most - sum(grad.nbytes for grad in grads) < N * V * 2
