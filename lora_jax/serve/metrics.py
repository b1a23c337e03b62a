"""Metrics for Prometheus. Names of gauges are those of vLLM, which gateways read."""

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

_MOST_LABELS = 100
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
OTHERS = "others"


class Metrics:
    """Counts of a server, and the state of its driver and store."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.server: Any = None  # set once it is ready
        self._labels: set[str] = set()

        def histogram(name: str, what: str) -> Histogram:
            labels = ("adapter",)
            return Histogram(name, what, labels, buckets=_SECONDS, registry=self.registry)

        self._first = histogram("lora_jax_time_to_first_token_seconds", "until the first token")
        self._between = histogram("lora_jax_time_between_tokens_seconds", "between tokens")
        self._requests = Counter(
            "lora_jax_requests", "requests by status", ("status",), registry=self.registry
        )
        self.registry.register(_Asked(self))

    def answered(self, status: int) -> None:
        """Count a request that has its status."""
        self._requests.labels(str(status)).inc()

    def label(self, adapter: str) -> str:
        """Return the label of an adapter; beyond a number of them, all share one."""
        if adapter not in self._labels and len(self._labels) >= _MOST_LABELS:
            return OTHERS
        self._labels.add(adapter)
        return adapter

    def clock(self, adapter: str) -> "Clock":
        """Return the clock of one answer."""
        label = self.label(adapter)
        return Clock(self._first.labels(label), self._between.labels(label))

    def text(self) -> bytes:
        """Return all metrics in the format of Prometheus."""
        return generate_latest(self.registry)


class Clock:
    """Times of the tokens of one answer."""

    def __init__(self, first: Any, between: Any):
        self._first, self._between = first, between
        self._began, self._last = time.monotonic(), 0.0

    def tokens(self, count: int) -> None:
        """Count tokens that have arrived together."""
        if not count:
            return
        now = time.monotonic()
        if not self._last:
            self._first.observe(now - self._began)
        else:
            for _ in range(count):
                self._between.observe((now - self._last) / count)
        self._last = now


class _Asked(Collector):
    """Metrics that are read when they are asked for."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics

    def collect(self) -> Iterator[Any]:
        server = self._metrics.server
        if server is None:
            return
        driver, store = server.driver, server.store

        def gauge(name: str, what: str, value: float) -> GaugeMetricFamily:
            return GaugeMetricFamily(name, what, value=value)

        yield gauge("vllm:num_requests_running", "requests in rows", driver.running)
        yield gauge("vllm:num_requests_waiting", "requests that wait for a row", driver.waiting)
        yield gauge("vllm:kv_cache_usage_perc", "share of the cache in use", driver.cache_usage)
        yield self._adapters(server)
        count, size = store.host
        yield gauge("lora_jax_host_adapters", "versions in host memory", count)
        yield gauge("lora_jax_host_adapter_bytes", "bytes of these", size)
        loads = CounterMetricFamily("lora_jax_adapter_loads", "reads", labels=("adapter",))
        seconds = CounterMetricFamily(
            "lora_jax_adapter_load_seconds", "seconds of reading", labels=("adapter",)
        )
        for family, counts in ((loads, store.loads), (seconds, store.load_seconds)):
            totals: dict[str, float] = {}
            for name, value in [*counts.items()]:
                label = self._metrics.label(name)
                totals[label] = totals.get(label, 0) + value
            for label, value in totals.items():
                family.add_metric((label,), value)
            yield family
        yield CounterMetricFamily("lora_jax_adapter_evictions", "evictions", value=store.evictions)
        programs = server.engine.compiled_programs
        yield CounterMetricFamily("compiled_programs", "compiled programs", value=programs)

    def _adapters(self, server: Any) -> GaugeMetricFamily:
        names = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        info = GaugeMetricFamily("vllm:lora_requests_info", "adapters in use", labels=names)
        running = {v.name for lease in server.driver.running_leases() for v in lease.versions}
        waiting = {v.name for lease in server.driver.waiting_leases() for v in lease.versions}
        row = (str(server.max_loras), ",".join(sorted(running)), ",".join(sorted(waiting)))
        info.add_metric(row, time.time())
        return info
