"""Times what the GPU's libraries do on the same shapes, to set beside bench_block_attention_cuda.

    python bench/kernels/sdpa_reference.py [--bench FILE.json] [--json FILE]

Per (KV length, chunk, batch): torch's scaled_dot_product_attention, its best backend, on contiguous
KV with the query heads of a KV head packed into rows (what chunk decoding would cost without
pages, limits or raggedness); replayed from a CUDA graph over KV larger than the L2. Also the bf16
matrix-product peak. With --bench it prints both side by side.
"""

import argparse
import functools
import json
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
ROTATED_BYTES = 512 << 20
LEAST_CALLS = 12  # in a graph: launching it counts among them
# Many rows are replayed until the clock has settled: they are compared at the clock that lasts.
MANY_ROWS, STEADY_SECONDS = 1024, 0.5
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)


def replay_us(body, replays=15, seconds=0.0):
    """Median microseconds of the last `replays` of `body`, captured in a CUDA graph.

    It is replayed for at least `seconds`.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    while len(times) < replays + 2 or sum(times) < seconds * 1e6:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times[-replays:])


def gemm_tflops(n=8192):
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / replay_us(lambda: torch.mm(a, b, out=out), 30, STEADY_SECONDS) * 1e-6


def num_kv_sets(kv_len, batch):
    """As many sets of K and V as lie beyond the L2 together, within reason."""
    kv_bytes = batch * kv_len * KV_HEADS * HEAD_DIM * 4
    return max(1, min(24, -(-ROTATED_BYTES // kv_bytes)))


def call_us(call, kv, num_rows):
    """Microseconds of call(k, v) over the sets in turn, in a graph of LEAST_CALLS at least."""
    calls = kv * -(-LEAST_CALLS // len(kv))

    def body():
        for k, v in calls:
            call(k, v)

    seconds = STEADY_SECONDS if num_rows >= MANY_ROWS else 0.0
    return replay_us(body, seconds=seconds) / len(calls)


def sdpa_us(kv_len, rows, batch):
    packed = rows * Q_HEADS // KV_HEADS
    options = {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(batch, KV_HEADS, packed, HEAD_DIM, **options)
    kv = [
        tuple(torch.randn(batch, KV_HEADS, kv_len, HEAD_DIM, **options) for _ in range(2))
        for _ in range(num_kv_sets(kv_len, batch))
    ]
    best = float("inf")
    for backend in BACKENDS:
        with sdpa_kernel(backend):
            attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, q)
            best = min(best, call_us(attend, kv, rows * batch))
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--bench", help="JSON of bench_block_attention_cuda")
    parser.add_argument("--json", help="write the times here")
    parser.add_argument("--chunks", type=int, nargs="+", default=[8, 16, 32])
    args = parser.parse_args()
    ours = {}
    if args.bench:
        with open(args.bench) as file:
            ours = {result["name"]: result for result in json.load(file)["results"]}
    peak = gemm_tflops()
    print(f"bf16 matrix product {peak:.0f} TFLOP/s")
    results = {}
    for kv_len in (4096, 1024):
        for rows in args.chunks:
            for batch in (1, 8, 32, 128):
                name = f"kv {kv_len} c {rows} b {batch}"
                results[name] = sdpa_us(kv_len, rows, batch)
                mine = ours.get(name)
                beside = f", ours {mine['layer_us']:.1f} us" if mine else ""
                print(f"{name}: SDPA {results[name]:.1f} us{beside}", flush=True)
    for name, result in ours.items():
        if "prefill" in name:
            tflops = result["flops"] / result["layer_us"] * 1e-6
            print(f"{name}: {tflops:.0f} TFLOP/s, {100 * tflops / peak:.0f}% of the product's")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"gemm_tflops": peak, "sdpa_us": results}, file, indent=1)


if __name__ == "__main__":
    main()
