"""A teacher on another machine: a vLLM server that scores prompts.

vllm serve MODEL --max-logprobs 32                          # there
python train.py ... --teacher_url http://HOST:8000/v1       # here, which makes
teacher = ServerTeacher("http://HOST:8000/v1", cfg, tokenizer, vocabulary)
targets = teacher.targets(batches)                          # as LocalTeacher's (policy.py), one dictionary per micro-batch
"""

import math
from concurrent.futures import ThreadPoolExecutor

import torch

from configs import TOPK_LOSSES
from support.errors import on_all_ranks

REQUESTS = 32  # in flight, from each rank
TIMEOUT = 10, 600  # seconds: to connect, and for an answer
RETRIES = 5  # after pauses of 0, 1, 2, 4 and 8 s


class ServerTeacher:
    """Prompt log-probs of an OpenAI-compatible vLLM server, one request per rollout, as token ids.

    ValueError if its vocabulary or context does not fit; OSError if it does not answer, or refuses.
    """

    head = None  # full-vocabulary losses need a teacher in this process
    digest = config = None  # nobody here has seen its weights

    def __init__(self, url, cfg, tokenizer, vocabulary):
        import requests
        from urllib3.util import Retry

        self.url = url.rstrip("/").removesuffix("/v1")
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.k = cfg.topk if cfg.loss in TOPK_LOSSES else 0
        self.session = requests.Session()
        # read=1: a request that timed out after TIMEOUT is asked only once more. A busy server's Retry-After may be an hour.
        retry = Retry(
            RETRIES, read=1, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504), allowed_methods=None,
            respect_retry_after_header=False,
        )  # fmt: skip
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=REQUESTS, max_retries=retry))
        models = self.ask("GET", "/v1/models", field="data")
        self.model, context = models[0].get("id"), models[0].get("max_model_len")
        if context is None:
            raise self.lacks("max_model_len", "/v1/models")
        needed = cfg.max_prompt + cfg.max_response + 1  # the server insists on generating one token
        if context < needed:
            raise ValueError(
                f"--teacher_url: {self.model} takes {context} tokens there; prompt, response and one more are {needed}"
            )
        self.check_vocabulary()
        self.score([0, vocabulary.size - 1])  # if an id or the number of log-probs is too large, the server says so

    def check_vocabulary(self):
        """Every 50th id, and all that were added to the tokenizer, must be the same text to both."""
        added = self.tokenizer.all_special_ids, self.tokenizer.get_added_vocab().values()
        ids = sorted(set(range(0, self.vocabulary.size, 50)).union(*added))
        theirs = self.ask("POST", "/detokenize", {"model": self.model, "tokens": ids}, field="prompt")
        ours = self.tokenizer.decode(ids)
        if theirs != ours:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
            raise ValueError(
                f"--teacher_url: the vocabularies differ; the same ids are {ours[at : at + 20]!r} for the student "
                f"and {theirs[at : at + 20]!r} for {self.model}"
            )

    def check_scores(self, ids):
        """ValueError unless the log-probs and ranks that the server gives these tokens are those of one distribution."""
        k = self.k or 1
        for token, row in zip(ids[1:], self.prompt_logprobs(ids, k)[1:], strict=True):
            by_rank = [x["logprob"] for x in sorted(row.values(), key=lambda x: x["rank"])]
            total = sum(map(math.exp, by_rank))
            text = f"--teacher_url: {self.model} gives {self.tokenizer.decode([token])!r} ({token})"
            if not total <= 1.001:  # NaN, too
                raise ValueError(f"{text} and its top {k} a probability of {total:.4g} together")
            if any(worse > better + 1e-3 for better, worse in zip(by_rank, by_rank[1:], strict=False)):
                raise ValueError(f"{text} a rank that its log-probs contradict: {row}")

    def ask(self, method, path, body=None, *, field):
        """This field of the server's answer. OSError if it is empty or missing, as in that of a server other than vLLM's."""
        try:
            answer = self.session.request(method, self.url + path, json=body, timeout=TIMEOUT)
        except OSError as error:
            raise OSError(f"--teacher_url: no answer from {self.url}{path}: {error}") from None
        if not answer.ok:
            raise OSError(f"--teacher_url: {self.url}{path} answers {answer.status_code}: {answer.text[:500]}")
        try:
            found = answer.json()
        except ValueError:  # such as a web page
            found = None
        if not isinstance(found, dict) or not found.get(field):
            raise self.lacks(field, path)
        return found[field]

    def lacks(self, field, path):
        return OSError(f"--teacher_url: {self.url}{path} gives no {field}, as vLLM's server does")

    def prompt_logprobs(self, ids, k) -> list[dict | None]:
        """{id: {"logprob", "rank"}} of each token and of the k most likely in its place; None for the first token."""
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "prompt_logprobs": k}
        rows = self.ask("POST", "/v1/completions", body, field="choices")[0].get("prompt_logprobs")
        if rows is None:
            raise self.lacks("prompt_logprobs", "/v1/completions")
        if len(rows) != len(ids):
            counts = f"{len(rows)} tokens where {len(ids)} were sent"
            raise ValueError(
                f"--teacher_url: {self.model} scores {counts}; it must add none, such as BOS, nor leave any out"
            )
        for i, (token, row) in enumerate(zip(ids[1:], rows[1:], strict=True), 1):
            if str(token) not in row:
                text, named = self.tokenizer.decode([token]), self.tokenizer.decode([int(other) for other in row])
                raise ValueError(f"--teacher_url: {self.model} scores {named!r} as token {i}, where {text!r} was sent")
        return rows

    def score(self, ids, start=1):
        """(log-probs of ids[start:], the k most likely tokens in their places: [[(log-prob, id), ...], ...]).

        Of a merged outcome only the tokens that the server names are counted: any other is less likely than its top-k.
        """
        rows = self.prompt_logprobs(ids, self.k)
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
        """A collective: if the server fails on one rank, all ranks exit with its error."""
        jobs = [(r.prompt + r.response, len(r.prompt)) for batch in batches for r in batch.rollouts]
        scored = iter(on_all_ranks(self.score_all, jobs))
        return [self.pack([next(scored) for _ in batch.rollouts]) for batch in batches]

    def score_all(self, jobs) -> list:
        with ThreadPoolExecutor(REQUESTS) as pool:
            scored = list(pool.map(lambda job: self.score(*job), jobs))
        self.session.close()  # its connections: what lies between may forget an idle one, and a request on it gets no answer
        return scored

    def pack(self, scored):
        """The targets of one micro-batch. A place of the top-k that stays empty has log-prob -inf."""
        empty = (-torch.inf, 0)
        top = [row + [empty] * (self.k - len(row)) for _, rows in scored for row in rows]
        logp = torch.tensor([x for logp, _ in scored for x in logp], dtype=torch.float32)
        ids = torch.tensor([[i for _, i in row] for row in top], dtype=torch.long)
        logq = torch.tensor([[x for x, _ in row] for row in top], dtype=torch.float32)
        shape = len(top), self.k
        return {"logq_sampled": logp, "topk_ids": ids.view(shape), "topk_logq": logq.view(shape)}
