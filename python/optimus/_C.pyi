"""Types of the C++ engine. All methods raise ValueError for bad arguments and RuntimeError for
internal faults, with the values in the text."""

from collections.abc import Sequence

import numpy as np

class ModelConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    mask_token_id: int  # -1: none
    true_vocab_size: int  # tokens that exist; 0: vocab_size
    dtype: str  # "float32" | "bfloat16": weights, activations and KV
    def __init__(self) -> None: ...

class Model:
    """Weights of a dense Qwen3/SDAR decoder."""

    def __init__(self, config: ModelConfig) -> None: ...
    @property
    def config(self) -> ModelConfig: ...
    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face names and shapes this model needs."""

    def load_tensor(self, name: str, data: np.ndarray) -> None:
        """Copies one tensor in: float32, float16, or bfloat16 as its bits in uint16."""

    def finish_loading(self) -> None:
        """Raises ValueError naming every tensor that was not loaded."""

    def num_parameters(self) -> int: ...
    def weight_bytes(self) -> int: ...

class EngineConfig:
    decode_mode: str  # "ar" | "block" | "chunk" | "elastic"
    kv_policy: str  # "freeze" | "refresh" | "auto"
    block_length: int
    chunk_length: int  # chunk mode
    recompute_block: bool  # chunk mode: feed every position of the block each step, like block mode
    chunk_arms: list[int]  # elastic mode; empty = powers of two from 2 to block_length
    max_num_seqs: int
    max_num_batched_rows: int
    max_model_len: int
    page_size: int
    num_pages: int
    enable_prefix_cache: bool
    num_threads: int  # 0 = all cores
    eos_token_ids: list[int]
    shuffle_pages: bool  # hand pages out in random order (tests)
    def __init__(self) -> None: ...

class SamplingParams:
    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_tokens: int  # -1 = up to max_model_len
    ignore_eos: bool
    stop_token_ids: list[int]
    unmasking_strategy: str
    confidence_threshold: float
    entropy_bound: float
    denoising_steps: int  # 0 = block_length
    def __init__(self) -> None: ...

class RequestMetrics:
    nfe: int
    decode_rows: int
    prefill_rows: int
    cached_prompt_tokens: int
    num_preemptions: int
    chunk_histogram: dict[int, int]
    arrival_s: float
    first_token_s: float
    finish_s: float

class Commit:
    output_idx: int  # position in the output
    token_id: int
    logprob: float
    confidence: float
    step: int  # the request's forward evaluation, from 1

class RequestUpdate:
    id: int
    commits: list[Commit]
    num_known: int  # leading output tokens that are final and contiguous
    finish_reason: str | None  # None while running, "stop" | "length" | "abort"

class StepRecord:
    """What one step did; a step without work has rows == 0."""

    step: int
    rows: int
    prefill_rows: int
    logit_rows: int
    num_seqs: int
    chunk_length: int
    refresh_rows: int
    commits: int
    predicted_ms: float
    forward_ms: float
    step_ms: float
    reason: str

class StepOutput:
    updates: list[RequestUpdate]
    record: StepRecord

class RequestState:
    """Snapshot of a request. `output_*` are trimmed at the end of a finished request."""

    id: int
    prompt_token_ids: list[int]
    status: str  # "waiting" | "prefilling" | "decoding" | "finished"
    finish_reason: str | None
    output_token_ids: list[int]  # -1 where masked
    output_logprobs: list[float]
    output_confidences: list[float]
    output_steps: list[int]
    metrics: RequestMetrics

class Engine:
    def __init__(self, model: Model, config: EngineConfig) -> None: ...
    @property
    def config(self) -> EngineConfig: ...
    def add_request(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> int:
        """Queues a request, returns its id. Raises ValueError (and changes nothing) on an empty
        prompt, ids out of range, bad sampling values, or a request that can never fit."""

    def step(self) -> StepOutput:
        """Runs one step (releases the GIL)."""

    def has_unfinished(self) -> bool: ...
    def request(self, id: int) -> RequestState: ...
    def stop_request(self, id: int, num_tokens: int) -> None:
        """Ends a request after `num_tokens` output tokens (finish_reason "stop"): stop strings."""

    def abort(self, id: int) -> None:
        """Ends a request (finish_reason "abort") and frees its pages. Unknown id raises."""

    def release(self, id: int) -> None:
        """Forgets a finished request."""

    def profile(self, repeats: int = 3) -> list[tuple[int, float]]:
        """Measures step time over row counts, installs and returns the table (rows, ms)."""

    def set_profile(self, points: list[tuple[int, float]]) -> None: ...
    def forward(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        kv_limits: Sequence[int],
        page_ids: Sequence[int],
    ) -> np.ndarray:
        """Logits [rows, vocab_size] fp32 of rows of one sequence over the given pages; for tests
        and research. Only while no request is unfinished."""

    @property
    def num_free_pages(self) -> int: ...
    @property
    def num_cached_pages(self) -> int:
        """Pages held by the prefix cache and by nobody else."""

    @property
    def num_waiting(self) -> int: ...
    @property
    def num_running(self) -> int: ...
    @property
    def memory(self) -> dict[str, int]:
        """Bytes: weights, kv_cache, activations, state."""

class PagePool:
    def __init__(self, num_pages: int) -> None: ...
    def allocate(self) -> int: ...
    def retain(self, page: int) -> None: ...
    def release(self, page: int) -> bool: ...
    def ref_count(self, page: int) -> int: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def num_free(self) -> int: ...

class PrefixCache:
    def __init__(
        self, pool: PagePool, page_size: int, alignment: int, enabled: bool = True
    ) -> None: ...
    def match(self, tokens: Sequence[int]) -> tuple[list[int], int]: ...
    def insert(
        self, tokens: Sequence[int], pages: Sequence[int], num_registered: int, num_full: int
    ) -> None: ...
    def evict(self, num_pages: int) -> int: ...
    def clear(self) -> None: ...
    @property
    def num_evictable(self) -> int: ...
    @property
    def num_cached(self) -> int: ...
