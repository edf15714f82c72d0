"""What /metrics says, in Prometheus' text format."""

from qgraft.serving.service import Service

_HELP = {
    "requests_running": ("gauge", "Requests that are being answered."),
    "requests_waiting": ("gauge", "Requests in the queue."),
    "adapters_loaded": ("gauge", "Adapters in memory."),
    "kv_cache_usage": ("gauge", "Share of the memory of keys and values that is held."),
    "prompt_tokens_total": ("counter", "Tokens of prompts."),
    "cached_tokens_total": ("counter", "Tokens of prompts that another request had passed through."),
    "generation_tokens_total": ("counter", "Tokens of answers."),
    "passes_total": ("counter", "Passes through the model."),
    "pass_tokens_total": ("counter", "Tokens in these passes."),
}


def metrics_text(service: Service) -> str:
    """All of it."""
    engine, counts = service.engine, service.engine.counts
    values = {
        "requests_running": len(engine.running), "requests_waiting": len(engine.waiting),
        "adapters_loaded": len(service.catalogue.entries), "kv_cache_usage": round(engine.passes.used, 6),
        **{f"{name}_total": counts[name] for name in
           ("prompt_tokens", "cached_tokens", "generation_tokens", "passes", "pass_tokens")},
    }  # fmt: skip
    lines = []
    for name, value in values.items():
        kind, told = _HELP[name]
        lines += [f"# HELP qgraft_{name} {told}", f"# TYPE qgraft_{name} {kind}", f"qgraft_{name} {value}"]
    lines += ["# HELP qgraft_requests_total Requests by how they ended.", "# TYPE qgraft_requests_total counter"]
    lines += [
        f'qgraft_requests_total{{reason="{reason}"}} {counts[f"finished_{reason}"]}'
        for reason in ("stop", "length", "error", "cancelled")
    ]
    return "\n".join(lines) + "\n"
