"""Types of the C++ engine. All methods raise ValueError for bad arguments and RuntimeError for
internal faults, with the values in the text."""

from collections.abc import Sequence

import numpy as np

def cuda_problem() -> str:
    """Why device "cuda" cannot be used here; empty when it can."""

def cuda_device_name() -> str: ...
def cuda_memory() -> tuple[int, int]:
    """Free and total bytes of the GPU."""

def bf16_gemm(x: np.ndarray, weight: np.ndarray, num_threads: int = 1) -> np.ndarray:
    """x [rows, k] times weight [n, k] transposed, bf16 as uint16, by the library."""

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

    def __init__(self, config: ModelConfig, device: str = "cpu") -> None:
        """device: "cpu" or "cuda" (bfloat16 only), where the weights lie and steps run."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def device(self) -> str: ...
    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face names and shapes this model needs."""

    def load_tensor(self, name: str, data: np.ndarray) -> None:
        """Copies one tensor in: float32, float16, or bfloat16 as its bits in uint16."""

    def finish_loading(self) -> None:
        """Raises ValueError naming every tensor that was not loaded."""

    def num_parameters(self) -> int: ...
    def weight_bytes(self) -> int: ...

class MeasuredArm:
    """One line of a calibration: chunk decoding with these settings, on paired prompts."""

    def __init__(
        self,
        *,
        threshold: float,
        chunk_length: int,
        refresh: bool,
        accuracy: float,
        difference_upper: float,
    ) -> None: ...
    @property
    def threshold(self) -> float: ...
    @property
    def chunk_length(self) -> int: ...
    @property
    def refresh(self) -> bool: ...
    @property
    def accuracy(self) -> float:
        """Share of right answers, 0..1."""

    @property
    def difference_upper(self) -> float:
        """Upper 95% bound of accuracy minus block decoding's at the same threshold."""

class LatencyProfile:
    """Measured time of a step: a curve over rows, and one over keys read on top of it.

    Fields are copied in and out: assign whole lists.
    """

    decode: list[tuple[int, float]]  # (rows, ms), every row a mask row; rows ascend, times > 0
    prefill: list[tuple[int, float]]  # (rows, ms), no row a mask row; empty = as decode
    kv: list[tuple[int, float]]  # (keys read, ms above `decode`); empty = 0
    is_padded: bool  # a step costs what the next of decode's row counts costs
    def __init__(self) -> None: ...
    def validate(self) -> None:
        """Raises ValueError naming what does not ascend or is not positive."""

    def ms(self, rows: int, prefill_rows: int = 0, kv_tokens: int = 0) -> float:
        """Measured time of a step, between and beyond the points. Raises like `validate`."""

class EngineConfig:
    decode_mode: str  # "ar" | "block" | "chunk" | "schedule" | "elastic" | "elastic_per_request"
    kv_policy: str  # "freeze" | "refresh" | "auto"
    block_length: int
    chunk_length: int  # chunk mode
    recompute_block: bool  # chunk mode: feed every position of the block each step, like block mode
    chunk_schedule: list[tuple[int, int]]  # schedule mode: (most requests, chunk length)
    chunk_arms: list[int]  # elastic modes; empty = powers of two from 2 to block_length
    measured_arms: list[MeasuredArm]  # elastic modes: calibration; empty = nothing known
    quality_floor: float | None  # elastic modes: accuracy; None = block decoding's
    target_tpot_ms: float  # per request and output token; 0 = none
    target_ttft_ms: float  # arrival to first token; 0 = none
    step_log_size: int  # steps remembered
    max_num_seqs: int
    max_num_batched_rows: int
    max_model_len: int
    page_size: int
    num_pages: int  # CUDA: 0 = as many as gpu_memory_utilization leaves room for
    gpu_memory_utilization: float  # share of the GPU's memory that is in use at most
    cuda_graphs: bool  # False: CUDA kernels are launched one by one
    async_scheduling: bool  # plan a step before the results of the one in progress are known
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
    positions: list[int]  # of the commits, in the output
    token_ids: list[int]  # of the commits
    num_forwards: int  # the request's forward evaluations until these commits, 0 without commits
    num_known: int  # leading output tokens that are final and contiguous
    finish_reason: str | None  # None while running, "stop" | "length" | "abort"

class ArmEstimate:
    """One chunk length as an elastic policy judged it; per step of the whole batch."""

    chunk_length: int
    refresh: bool
    commits: float
    rows: float
    ms: float
    tpot_ms: float
    score: float
    verdict: str

class StepRecord:
    """What one step did, and why; a step without work has rows == 0."""

    step: int  # from 1
    start_s: float  # engine clock
    rows: int
    prefill_rows: int
    refresh_rows: int
    logit_rows: int
    num_seqs: int
    num_decoding: int
    num_waiting: int
    kv_tokens: int
    chunk_length: int  # the policy's choice (per request: the longest), 0 without decode rows
    refresh: bool  # finished blocks are refreshed
    chunk_lengths: list[int]  # masks each decoding request evaluated
    commits: int
    expected_commits: float  # 0 = not estimated
    predicted_ms: float  # 0 = no profile
    forward_ms: float
    step_ms: float
    # The host's part: planning, starting the step (on the CPU, computing it too), waiting for its
    # results, applying them. A GPU idles during all but the wait. 0 in the simulator.
    plan_ms: float
    launch_ms: float
    wait_ms: float
    apply_ms: float
    idle_ms: float  # on the device, between the forward before and this one; 0 = none before
    rows_ms: float  # of idle_ms: until the rows were made
    meets_target: bool
    is_ahead: bool  # planned before the results of the step before were known
    reason: str
    arms: list[ArmEstimate]  # what an elastic policy compared

class StepOutput:
    updates: list[RequestUpdate]
    finished_ids: list[int]  # of the updates with a finish_reason
    record: StepRecord  # a copy
    is_idle: bool  # nothing was done

class RequestState:
    """Snapshot of a request. `output_*` are trimmed at the end of a finished request."""

    id: int
    prompt_token_ids: list[int]
    status: str  # "waiting" | "prefilling" | "decoding" | "finished"
    finish_reason: str | None
    output_token_ids: list[int]  # -1 where masked
    output_logprobs: list[float]
    output_confidences: list[float]
    output_steps: list[int]  # 0 where masked
    block_start: int  # position of the current block
    open_confidences: list[float]  # masks the last step evaluated and left, in order
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

    def profile(self, repeats: int = 3) -> LatencyProfile:
        """Measures step time over rows and contexts, installs and returns it. Only while idle."""

    def set_profile(self, profile: LatencyProfile) -> None: ...
    @property
    def overhead_ms(self) -> float:
        """Time between two forwards, as learned: host work."""

    def predict_ms(self, rows: int, prefill_rows: int = 0, kv_tokens: int = 0) -> float:
        """From one step to the next, corrected by what was seen. Requires a profile."""

    def relative_error(self, rows: int) -> float:
        """Relative error to expect of `predict_ms`."""

    def step_records(self) -> list[StepRecord]:
        """The last `step_log_size` steps, oldest first."""

    def reliability(self) -> dict[str, list[tuple[float, float, float]]]:
        """Calibration of the commit model, "by_probability" (tenths) and "by_rank": of each bin
        (masks, sum of predicted probabilities, commits)."""

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
        """Bytes: weights, kv_cache, activations, state, graphs."""

    @property
    def padded_rows(self) -> list[int]:
        """Numbers of rows that CUDA steps are padded to; empty on the CPU."""

    @property
    def graphs(self) -> list[tuple[int, float, int]]:
        """Captured CUDA graphs: rows, milliseconds to capture, bytes of GPU memory."""

    def time_forward(self, rows: int, contexts: list[int], repeats: int = 3) -> float:
        """Median milliseconds of a step of mask rows in as many sequences as `contexts`, which read
        so many positions, in pages of their own. Only while idle."""

    def time_gemms(self, rows: int, repeats: int = 3) -> float:
        """Median milliseconds of the matrix products alone of such a step. Only while idle."""

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

class CommitTrace:
    """A recorded answer, as csrc/engine/commit_process.h describes it. Raises ValueError."""

    def __init__(
        self, *, prompt_len: int, row_begin: Sequence[int], confidences: Sequence[float]
    ) -> None: ...
    @property
    def prompt_len(self) -> int: ...
    @property
    def row_begin(self) -> list[int]:
        """[num_tokens + 1] into confidences."""

    @property
    def confidences(self) -> list[float]:
        """Row j: of positions j, j + 1, ... to the end of j's block, all before j known."""

    @property
    def num_tokens(self) -> int: ...
    def confidence(self, first_mask: int, idx: int) -> float:
        """In the mask at output position idx while its block's first mask is at first_mask."""

class SimulatorConfig:
    engine: EngineConfig
    latency: LatencyProfile  # what steps really take
    profile: LatencyProfile  # what the engine believes at the start; empty = `latency`
    without_profile: bool  # the engine believes nothing
    host_ms: float  # between two steps
    jitter: float  # relative standard deviation of a step's time
    outlier_share: float  # of steps that take outlier_factor times as long
    outlier_factor: float
    slowdowns: list[tuple[float, float]]  # (from this second on, time factor)
    seed: int
    def __init__(self) -> None: ...

class SimulatedRequest:
    @property
    def id(self) -> int: ...
    @property
    def prompt_len(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def metrics(self) -> RequestMetrics: ...

class Simulator:
    """The engine's scheduler and policies with a virtual clock and recorded confidences."""

    def __init__(self, config: SimulatorConfig, traces: Sequence[CommitTrace]) -> None: ...
    def add_request(
        self, arrival_s: float, prompt_len: int, trace: int, params: SamplingParams
    ) -> int:
        """A request that decodes trace number `trace` until max_tokens. Arrivals never descend."""

    def run(self, until_s: float, max_steps: int) -> int:
        """Steps until nothing is left, `until_s` has come or `max_steps` were run; their number."""

    def take_finished(self) -> list[SimulatedRequest]:
        """Requests that finished since the last call, in the order in which they did."""

    @property
    def now_s(self) -> float: ...
    @property
    def needed_rows(self) -> int: ...
    @property
    def oracle_s(self) -> float:
        """What the same steps would have taken with only the rows that turned out to be needed."""

    @property
    def num_unfinished(self) -> int: ...
    def step_records(self) -> list[StepRecord]: ...
    def reliability(self) -> dict[str, list[tuple[float, float, float]]]: ...
