"""Times what other libraries' paged attention does on the shapes of bench_block_attention_cuda.

    python bench/kernels/peers_reference.py [--cells KV:C:B,...] [--peers NAME ...]
                                            [--json FILE] [--seconds N]

Per (KV length, chunk, batch), on KV in shuffled pages of 64 tokens and with every row seeing the
whole KV, the time of each of these, replayed from a CUDA graph over KV larger than the L2:

    decode        FlashInfer's batch decode on tensor cores (chunk 1 only)
    fa2, fa3      FlashInfer's batch prefill, either backend
    fa3_packed    the same fa3 with the query heads of a KV head packed into rows by hand
    xqa           the XQA kernels that FlashInfer ships, chunks as draft tokens under an open mask
    cudnn         cuDNN's paged attention, through its own Python frontend
    cudnn_packed  the same with the query heads packed into rows by hand

Planning on the host, which some of them need before every step, and packing by hand stay out of
the times. In every cell the first and the last request of a peer's output are compared with plain
torch; a peer that disagrees, or fails, prints a line and is left out of that cell.

FlashInfer and cuDNN's frontend are no dependencies of Optimus: only this script asks for them
(pip install flashinfer-python nvidia-cudnn-frontend).
"""

import argparse
import json
import time

import torch
from sdpa_reference import HEAD_DIM, KV_HEADS, Q_HEADS, call_us, num_kv_sets

PAGE = 64
GROUP = Q_HEADS // KV_HEADS
SCALE = HEAD_DIM**-0.5
OPTIONS = {"device": "cuda", "dtype": torch.bfloat16}
TOLERANCE = 2e-2
WORKSPACE_BYTES = 512 << 20
SEMAPHORES = 2 << 20


class Cell:
    """Queries and rotated KV of one shape; every KV set has its pages in the same shuffled order.

    KV is [pages, KV heads, tokens of a page, head dim]. Queries and outputs are kept in two
    layouts: [request, row, query head, head dim], which is [..., KV head, head of its group, ...],
    and packed, [request, row x head of the group, KV head, head dim].
    """

    def __init__(self, kv_len, rows, batch):
        if kv_len % PAGE:
            raise SystemExit(f"KV lengths must be multiples of {PAGE}, got {kv_len}")
        self.kv_len, self.rows, self.batch = kv_len, rows, batch
        self.name = f"kv {kv_len} c {rows} b {batch}"
        pages = kv_len // PAGE
        shape = (batch * pages, KV_HEADS, PAGE, HEAD_DIM)
        sets = range(num_kv_sets(kv_len, batch))
        self.kv = [tuple(torch.randn(shape, **OPTIONS) for _ in range(2)) for _ in sets]
        self.table = torch.randperm(batch * pages, device="cuda", dtype=torch.int32)
        self.table = self.table.view(batch, pages)
        self.page_indptr = torch.arange(batch + 1, dtype=torch.int32) * pages
        self.last_page = torch.full((batch,), PAGE, dtype=torch.int32)
        self.q = torch.randn(batch, rows, Q_HEADS, HEAD_DIM, **OPTIONS)
        self.q_packed = self.pack(self.q)

    def pack(self, rows):
        rows = rows.view(self.batch, self.rows, KV_HEADS, GROUP, HEAD_DIM).transpose(2, 3)
        return rows.contiguous().view(self.batch, self.rows * GROUP, KV_HEADS, HEAD_DIM)

    def lens(self, value):
        return torch.full((self.batch,), value, device="cuda", dtype=torch.int32)

    def error(self, out):
        """Largest relative error over the first and last request of a packed output."""
        worst = 0.0
        for request in {0, self.batch - 1}:
            k, v = (
                cache[self.table[request]].float().transpose(0, 1).reshape(KV_HEADS, -1, HEAD_DIM)
                for cache in self.kv[0]
            )
            q = self.q_packed[request].float().transpose(0, 1)
            want = torch.softmax(q @ k.transpose(1, 2) * SCALE, dim=-1) @ v
            got = out[request].float().transpose(0, 1)
            worst = max(worst, ((got - want).norm() / want.norm()).nan_to_num(1e9).item())
        return worst


class Peers:
    """Makes, per peer and cell, the output tensor and a function of (k, v) that fills it.

    The output is in the layout of the peer: packed or not, as its shape tells.
    """

    def __init__(self, flashinfer):
        self.flashinfer = flashinfer
        self.workspace = torch.empty(WORKSPACE_BYTES, device="cuda", dtype=torch.uint8)
        self.semaphores = torch.zeros(SEMAPHORES, device="cuda", dtype=torch.int32)
        self.semaphores = self.semaphores.view(torch.uint32)
        self.handle = None

    def decode(self, cell):
        if cell.rows > 1:
            return None
        wrapper = self.flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace, "HND", use_tensor_cores=True
        )
        return self.planned(wrapper, cell, cell.q)

    def fa2(self, cell):
        return self.prefill(cell, cell.q, "fa2")

    def fa3(self, cell):
        return self.prefill(cell, cell.q, "fa3")

    def fa3_packed(self, cell):
        return self.prefill(cell, cell.q_packed, "fa3")

    def prefill(self, cell, q, backend):
        wrapper = self.flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            self.workspace, "HND", backend=backend
        )
        row_indptr = torch.arange(cell.batch + 1, dtype=torch.int32) * q.shape[1]
        return self.planned(wrapper, cell, q, row_indptr)

    def planned(self, wrapper, cell, q, *indptr):
        pages = (cell.page_indptr, cell.table.flatten(), cell.last_page)
        shape = (q.shape[2], KV_HEADS, HEAD_DIM, PAGE)
        wrapper.plan(*indptr, *pages, *shape, q_data_type=q.dtype, kv_data_type=q.dtype)
        out = torch.empty_like(q)
        flat_q, flat_out = q.flatten(0, 1), out.flatten(0, 1)
        return out, lambda k, v: wrapper.run(flat_q, (k, v), out=flat_out)

    def xqa(self, cell):
        """One row: [request, beam, head, dim]. Several: [request, beam, row, head, dim] + mask."""
        out = torch.empty_like(cell.q)
        shape = (cell.batch, 1, *((cell.rows,) if cell.rows > 1 else ()), Q_HEADS, HEAD_DIM)
        q, flat_out = cell.q.view(shape), out.view(shape)
        lens = cell.lens(cell.kv_len).view(torch.uint32).view(cell.batch, 1)
        mask = None
        if cell.rows > 1:
            words = (cell.batch, cell.rows, -(-cell.rows // 32) * 2)
            mask = torch.full(words, -1, device="cuda", dtype=torch.int16).view(torch.uint16)
        self.semaphores.view(torch.int32).zero_()
        pages = (cell.table, lens)
        buffers = (flat_out, self.workspace, self.semaphores)
        shape = {"num_kv_heads": KV_HEADS, "page_size": PAGE, "q_seq_len": cell.rows}

        def call(k, v):
            self.flashinfer.xqa(q, k, v, *pages, *buffers, **shape, kv_layout="HND", mask=mask)

        return out, call

    def cudnn(self, cell):
        return self.cudnn_paged(cell, cell.q)

    def cudnn_packed(self, cell):
        return self.cudnn_paged(cell, cell.q_packed)

    def cudnn_paged(self, cell, q):
        import cudnn

        if self.handle is None:
            self.handle = cudnn.create_handle()
        cudnn.set_stream(self.handle, torch.cuda.current_stream().cuda_stream)
        out = torch.empty_like(q)
        bfloat16, single = cudnn.data_type.BFLOAT16, cudnn.data_type.FLOAT
        graph = cudnn.pygraph(
            io_data_type=bfloat16,
            intermediate_data_type=single,
            compute_data_type=single,
            handle=self.handle,
        )
        dim, stride = [list(of) for of in (q.transpose(1, 2).shape, q.transpose(1, 2).stride())]
        graph_q = graph.tensor(name="q", dim=dim, stride=stride, data_type=bfloat16)
        graph_k, graph_v = (graph.tensor_like(cache) for cache in cell.kv[0])
        table = cell.table.view(cell.batch, 1, -1, 1)
        tensors = {
            "seq_len_q": cell.lens(q.shape[1]).view(-1, 1, 1, 1),
            "seq_len_kv": cell.lens(cell.kv_len).view(-1, 1, 1, 1),
            "paged_attention_k_table": table,
            "paged_attention_v_table": table,
        }
        inputs = {name: graph.tensor_like(tensor) for name, tensor in tensors.items()}
        graph_out, _ = graph.sdpa(
            name="sdpa",
            q=graph_q,
            k=graph_k,
            v=graph_v,
            **inputs,
            use_padding_mask=True,
            generate_stats=False,
            attn_scale=SCALE,
            paged_attention_max_seq_len_kv=cell.kv_len,
        )
        graph_out.set_output(True).set_dim(dim).set_stride(stride)
        graph.build([cudnn.heur_mode.A])
        scratch = torch.empty(max(1, graph.get_workspace_size()), device="cuda", dtype=torch.uint8)
        fixed = {graph_q: q, graph_out: out, **{inputs[name]: tensors[name] for name in inputs}}

        def call(k, v):
            cudnn.set_stream(self.handle, torch.cuda.current_stream().cuda_stream)
            graph.execute({**fixed, graph_k: k, graph_v: v}, scratch, handle=self.handle)

        return out, call


PEERS = ["decode", "fa2", "fa3", "fa3_packed", "xqa", "cudnn", "cudnn_packed"]


def peer_us(peers, peer, cell):
    """Microseconds a call, or None if the peer has nothing for such a cell."""
    made = getattr(peers, peer)(cell)
    if made is None:
        return None
    out, call = made
    out.fill_(float("nan"))
    call(*cell.kv[0])
    torch.cuda.synchronize()
    error = cell.error(out if out.shape == cell.q_packed.shape else cell.pack(out))
    if error > TOLERANCE:
        raise ValueError(f"off by {error:.3g} from plain torch")

    return call_us(call, cell.kv, cell.rows * cell.batch)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    grid = [f"{kv}:{c}:{b}" for kv in (4096, 1024) for c in (1, 2, 4, 8, 16, 32)
            for b in (1, 8, 32, 64, 128, 256)]  # fmt: skip
    parser.add_argument("--cells", default=",".join(grid), help="KV:C:B,... (default: all)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--json", help="write the times here, after every cell")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    args = parser.parse_args()
    try:
        import flashinfer
    except ImportError as problem:
        hint = "this script needs FlashInfer (pip install flashinfer-python)"
        raise SystemExit(f"{hint}: {problem}") from None
    began = time.monotonic()
    peers, results, broken = Peers(flashinfer), {}, False
    for shape in args.cells.split(","):
        if time.monotonic() - began > args.seconds:
            print(f"stopped before {shape}: {args.seconds:g} seconds are over")
            break
        cell = Cell(*map(int, shape.split(":")))
        times = results[cell.name] = {}
        for peer in args.peers:
            try:
                us = peer_us(peers, peer, cell)
                if us is not None:
                    times[peer] = us
            except Exception as problem:
                reason = (str(problem).strip() or repr(problem)).splitlines()[-1]
                print(f"{cell.name}: {peer} left out: {type(problem).__name__}: {reason[:300]}")
                try:
                    torch.cuda.synchronize()
                except RuntimeError:
                    broken = True
                    break
        if times:
            best = min(times, key=times.get)
            each = ", ".join(f"{peer} {us:.1f}" for peer, us in times.items())
            print(f"{cell.name}: {each} us; best {best} {times[best]:.1f} us", flush=True)
        if args.json:
            done = {"flashinfer": flashinfer.__version__, "results": results}
            with open(args.json, "w") as file:
                json.dump(done, file, indent=1)
        if broken:
            raise SystemExit(f"{cell.name}: the GPU cannot be used any more after {peer} failed")


if __name__ == "__main__":
    main()
