"""The teacher, a model in this process or a vLLM server: what the loss needs of it, once for each rollout batch.

    teacher = load_teacher(cfg, path, tokenizer, vocab, device)     # --teacher_url: vllm serve MODEL --max-logprobs 32
    targets = teacher.targets(batches)                              # one dictionary a micro-batch

Targets are {"logp": [N], "ids": [N, K], "logq": [N, K]} on the CPU, fp32: the sampled token's log-prob, the K most
likely tokens and theirs. Full-vocabulary losses, which need a model in this process, get {"hidden": [N, H]} besides.
"""

from concurrent.futures import ThreadPoolExecutor

import torch

from policy import FULL_KL, TOPK, head_weights, load_policy, teacher_targets

REQUESTS = 32  # at once, from each rank
TIMEOUT = 10, 600  # seconds: to connect, and for an answer
RETRIES = 5  # after pauses of 0, 1, 2, 4 and 8 s


def load_teacher(cfg, path, tokenizer, vocab, device):
    if cfg.teacher_url:
        return ServerTeacher(cfg.teacher_url, cfg, tokenizer, vocab)
    return LocalTeacher(load_policy(path, cfg, vocab, device, trainable=False), cfg, device)


class LocalTeacher:
    """A frozen Policy. With cfg.teacher_offload its weights wait in host memory between two rollout batches."""

    def __init__(self, policy, cfg, device):
        self.policy, self.cfg, self.device = policy, cfg, device
        self.head = head_weights(policy) if cfg.loss in FULL_KL else None
        self.rest()

    def rest(self):
        if self.cfg.teacher_offload:
            self.policy.to("cpu")

    def targets(self, batches):
        if self.cfg.teacher_offload:
            self.policy.to(self.device)
        found = [teacher_targets(self.policy, batch, self.cfg) for batch in batches]
        self.rest()
        return found


class ServerTeacher:
    """Prompt log-probs of an OpenAI-compatible vLLM server, one request a rollout, as token ids.

    ValueError where its vocabulary or context does not fit; OSError where it does not answer, or refuses.
    """

    head = None  # only a model in this process has one

    def __init__(self, url, cfg, tokenizer, vocab):
        import requests
        from urllib3.util import Retry

        self.url, self.vocab = url.rstrip("/").removesuffix("/v1"), vocab
        self.k = cfg.topk if cfg.loss in TOPK else 0
        self.session = requests.Session()
        busy = dict(status_forcelist=(429, 500, 502, 503, 504), allowed_methods=None)
        retry = Retry(RETRIES, read=1, backoff_factor=0.5, **busy)  # read: a long wait for an answer is not made longer
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=REQUESTS, max_retries=retry))
        (model, *_) = self.ask("GET", "/v1/models")["data"]
        self.model, needed = model["id"], cfg.max_prompt + cfg.max_response + 1  # it generates a token besides
        if model["max_model_len"] < needed:
            raise ValueError(
                f"--teacher_url: {self.model} takes {model['max_model_len']} tokens there; prompt, response and one more are {needed}"
            )
        self.check_vocabulary(tokenizer)
        self.score([0, vocab - 1])  # one id or log-prob too many, and the server says so

    def check_vocabulary(self, tokenizer):
        """Every 50th id, and all that were added to the tokenizer, must be the same text to both."""
        ids = sorted({*range(0, self.vocab, 50), *tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()})
        theirs = self.ask("POST", "/detokenize", {"model": self.model, "tokens": ids})["prompt"]
        ours = tokenizer.decode(ids)
        if theirs != ours:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
            pair = f"{ours[at : at + 20]!r} for the student and {theirs[at : at + 20]!r} for {self.model}"
            raise ValueError(f"--teacher_url: the vocabularies differ; the same ids are {pair}")

    def ask(self, method, path, body=None):
        """The JSON of the server's answer."""
        try:
            answer = self.session.request(method, self.url + path, json=body, timeout=TIMEOUT)
        except OSError as error:
            raise OSError(f"--teacher_url: no answer from {self.url}{path}: {error}") from None
        if not answer.ok:
            raise OSError(f"--teacher_url: {self.url}{path} answers {answer.status_code}: {answer.text[:500]}")
        return answer.json()

    def score(self, ids, start=1):
        """(log-probs of ids[start:], [[(rank, id, log-prob), ...], ...] of the most likely tokens in their places)."""
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "prompt_logprobs": self.k}
        rows = self.ask("POST", "/v1/completions", body)["choices"][0].get("prompt_logprobs")
        if rows is None:
            raise OSError(f"--teacher_url: {self.url} gives no prompt_logprobs, as vLLM does")
        rows = rows[start:]
        logp = [row[str(i)]["logprob"] for i, row in zip(ids[start:], rows, strict=True)]
        ranked = [sorted((x["rank"], int(i), x["logprob"]) for i, x in row.items()) for row in rows]
        # The sampled token comes along where it is not among the k; ids that only pad the teacher's embedding may be.
        return logp, [[x for x in row if x[0] <= self.k and x[1] < self.vocab][: self.k] for row in ranked]

    def targets(self, batches):
        jobs = [batch.sequences() for batch in batches]
        with ThreadPoolExecutor(REQUESTS) as pool:
            scored = pool.map(lambda job: self.score(*job), sum(jobs, []))
            return [self.pack([next(scored) for _ in part]) for part in jobs]

    def pack(self, scored):
        """The targets of one batch; places that stay empty have log-prob -inf."""
        ranked = [row + [(0, 0, -torch.inf)] * (self.k - len(row)) for _, rows in scored for row in rows]
        logp = torch.tensor([x for logp, _ in scored for x in logp], dtype=torch.float32)
        ids = torch.tensor([[i for _, i, _ in row] for row in ranked], dtype=torch.long).view(len(ranked), self.k)
        logq = torch.tensor([[x for *_, x in row] for row in ranked], dtype=torch.float32).view(len(ranked), self.k)
        return {"logp": logp, "ids": ids, "logq": logq}
