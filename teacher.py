"""The teacher, a model in this process or a vLLM server: what the loss needs of it, once per rollout batch.

    teacher = load_teacher(cfg, path, tokenizer, vocabulary, device)     # --teacher_url: vllm serve MODEL --max-logprobs 32
    targets = teacher.targets(batches)                              # one dictionary per micro-batch

Targets are in fp32 on the host: {"logq_sampled": [N], log q of the sampled token; "topk_ids" [N, K], the K most likely
tokens; "topk_logq" [N, K], their log-probs}. Full-vocabulary losses also get {"hidden": [N, H_t]}, and need a model here.
"""

from concurrent.futures import ThreadPoolExecutor

import torch

from configs import FULL_VOCABULARY_LOSSES, TOPK_LOSSES
from losses import head_kl, head_topk
from policy import head_weights, load_policy

REQUESTS = 32  # in flight, from each rank
TIMEOUT = 10, 600  # seconds: to connect, and for an answer
RETRIES = 5  # after pauses of 0, 1, 2, 4 and 8 s


def load_teacher(cfg, path, tokenizer, vocabulary, device):
    if cfg.teacher_url:
        return ServerTeacher(cfg.teacher_url, cfg, tokenizer, vocabulary)
    return LocalTeacher(load_policy(path, cfg, vocabulary, device, trainable=False), cfg, device)


class LocalTeacher:
    """A frozen Policy. With cfg.teacher_offload its weights wait in host memory between two rollout batches.

    head: its (weight, bias), if the loss is over the whole vocabulary; else None.
    """

    def __init__(self, policy, cfg, device):
        self.policy, self.cfg, self.device = policy, cfg, device
        self.head = head_weights(policy) if cfg.loss in FULL_VOCABULARY_LOSSES else None
        if cfg.teacher_offload:
            policy.to("cpu")

    def targets(self, batches):
        if self.cfg.teacher_offload:
            self.policy.to(self.device)
        targets = [teacher_targets(self.policy, batch, self.cfg) for batch in batches]
        if self.cfg.teacher_offload:
            self.policy.to("cpu")
        return targets

    @torch.no_grad()
    def reverse_kl(self, student, batches):
        """The exact KL(student || teacher) at each response token, in nats, on the host: [N] for each micro-batch."""
        if self.cfg.teacher_offload:
            self.policy.to(self.device)
        weight_t, bias_t = head_weights(self.policy)
        kl = []
        for batch in batches:
            hidden_t = self.policy(batch.ids, batch.rows, batch.cols, lambda hidden, weight, bias: hidden)

            def on_hidden(hidden, weight, bias, hidden_t=hidden_t):
                options = student.head_options(self.cfg.temperature)
                return head_kl(hidden, weight, hidden_t, weight_t, bias, bias_t, **options)[0]

            kl.append(student(batch.ids, batch.rows, batch.cols, on_hidden).cpu())
        if self.cfg.teacher_offload:
            self.policy.to("cpu")
        return kl


@torch.no_grad()
def teacher_targets(policy, batch, cfg):
    """The targets of one micro-batch, from one forward pass of the teacher."""
    k = cfg.topk if cfg.loss in TOPK_LOSSES else 1

    def on_hidden(hidden, weight, bias):
        ids, logq, logq_sampled = head_topk(
            hidden, weight, k, bias, also_ids=batch.tokens[:, None], **policy.head_options(cfg.temperature)
        )
        targets = {"logq_sampled": logq_sampled[:, 0], "topk_ids": ids, "topk_logq": logq}
        if cfg.loss in FULL_VOCABULARY_LOSSES:  # [N, H] is small beside [N, V]; the head is applied again in the loss
            targets["hidden"] = hidden
        return targets

    targets = policy(batch.ids, batch.rows, batch.cols, on_hidden)
    return {name: x.cpu() for name, x in targets.items()}


class ServerTeacher:
    """Prompt log-probs of an OpenAI-compatible vLLM server, one request per rollout, as token ids.

    ValueError if its vocabulary or context does not fit; OSError if it does not answer, or refuses.
    """

    head = None  # only a model in this process has one

    def __init__(self, url, cfg, tokenizer, vocabulary):
        import requests
        from urllib3.util import Retry

        self.url = url.rstrip("/").removesuffix("/v1")
        self.vocabulary = vocabulary
        self.k = cfg.topk if cfg.loss in TOPK_LOSSES else 0
        self.session = requests.Session()
        # read=1: a request that timed out after TIMEOUT is asked only once more
        retry = Retry(
            RETRIES, read=1, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504), allowed_methods=None
        )
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=REQUESTS, max_retries=retry))
        model = self.ask("GET", "/v1/models")["data"][0]
        self.model = model["id"]
        needed = cfg.max_prompt + cfg.max_response + 1  # the server insists on generating one token
        if model["max_model_len"] < needed:
            raise ValueError(
                f"--teacher_url: {self.model} takes {model['max_model_len']} tokens there; "
                f"prompt, response and one more are {needed}"
            )
        self.check_vocabulary(tokenizer)
        self.score([0, vocabulary.size - 1])  # if an id or the number of log-probs is too large, the server says so

    def check_vocabulary(self, tokenizer):
        """Every 50th id, and all that were added to the tokenizer, must be the same text to both."""
        ids = sorted(
            {*range(0, self.vocabulary.size, 50), *tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        )
        theirs = self.ask("POST", "/detokenize", {"model": self.model, "tokens": ids})["prompt"]
        ours = tokenizer.decode(ids)
        if theirs != ours:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
            raise ValueError(
                f"--teacher_url: the vocabularies differ; the same ids are {ours[at : at + 20]!r} for the student "
                f"and {theirs[at : at + 20]!r} for {self.model}"
            )

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
        """(log-probs of ids[start:], the k most likely tokens in their places: [[(log-prob, id), ...], ...]).

        Of a merged outcome only the tokens that the server names are counted: any other is less likely than its top-k.
        """
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "prompt_logprobs": self.k}
        rows = self.ask("POST", "/v1/completions", body)["choices"][0].get("prompt_logprobs")
        if rows is None:
            raise OSError(f"--teacher_url: {self.url} gives no prompt_logprobs, as vLLM does")
        merged, logp, top = self.vocabulary.merged, [], []
        for token, row in zip(ids[start:], rows[start:], strict=True):
            # The sampled token is named even if it is not in the top-k; ids that only pad the teacher's embedding may be.
            named = {int(i): x["logprob"] for i, x in row.items() if int(i) < self.vocabulary.size or int(i) == token}
            ranks = {int(i): x["rank"] for i, x in row.items()}
            if any(i in named for i in merged):
                outcome = torch.logsumexp(torch.tensor([named[i] for i in merged if i in named]), 0).item()
                best_rank = min(ranks[i] for i in merged if i in named)
                named = {i: x for i, x in named.items() if i not in merged} | {merged[0]: outcome}
                ranks[merged[0]] = best_rank
            logp.append(named[merged[0] if token in merged else token])
            top.append(sorted(((x, i) for i, x in named.items() if ranks[i] <= self.k), reverse=True)[: self.k])
        return logp, top

    def targets(self, batches):
        jobs = [(r.prompt + r.response, len(r.prompt)) for batch in batches for r in batch.rollouts]
        with ThreadPoolExecutor(REQUESTS) as pool:
            scored = pool.map(lambda job: self.score(*job), jobs)
            return [self.pack([next(scored) for _ in batch.rollouts]) for batch in batches]

    def pack(self, scored):
        """The targets of one micro-batch. A place of the top-k that stays empty has log-prob -inf."""
        empty = (-torch.inf, 0)
        top = [row + [empty] * (self.k - len(row)) for _, rows in scored for row in rows]
        logp = torch.tensor([x for logp, _ in scored for x in logp], dtype=torch.float32)
        ids = torch.tensor([[i for _, i in row] for row in top], dtype=torch.long)
        logq = torch.tensor([[x for x, _ in row] for row in top], dtype=torch.float32)
        shape = len(top), self.k
        return {"logq_sampled": logp, "topk_ids": ids.view(shape), "topk_logq": logq.view(shape)}
