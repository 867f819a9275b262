"""The keys of the JSON objects that scripts rely on."""

METRICS = ["max_abs", "mean_abs", "rel_l2", "sqnr_db", "cosine_mean", "cosine_p5", "cosine_min", "kl_mean", "top1", "top5",
           "nonfinite"]
VERIFY = ["provider", "feeds", "samples", "ok", "outputs"]
BLOCK_DRIFT = ["block", "name", "value", *METRICS, "alone", "chain", "added", "rank"]
OPTIMIZE = ["model", "output", "plan", "passes", "bytes", "feeds", "drift", "speed", "ok"]
PASS = ["name", "exact", "fired", "refused", "seconds"]
BENCH = ["machine", "provider", "models", "ratios"]
TIMES = ["model", "p50_ms", "p90_ms", "p99_ms", "load_ms", "bytes", "peak_bytes", "nodes_by_provider",
         "memcpy_nodes", "fallback_nodes"]
CUDA = ["tf32", "reference", "candidate"]
PLACE = ["nodes_by_provider", "memcpy_nodes", "fallback_nodes"]
RATIO = ["model", "speedup", "low", "high"]
INSPECT = ["model", "opset", "producer", "nodes", "parameters", "ffn_blocks", "rejected"]
BLOCK = {"index": int, "name": str, "graph": str, "d_model": int, "d_ff": int, "d_out": int, "activation": str, "gated": bool,
         "up_bias": bool, "down_bias": bool, "parallel": bool, "experts": int, "shares_weights_with": (int, type(None)),
         "parameters": int, "macs_per_token": int, "input": str, "output": str}
