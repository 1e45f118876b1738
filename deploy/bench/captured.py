"""All loopback ranks' work of one run as a CUDA graph, to be replayed without the host.

Real ranks have a process each; loopback ranks share one host thread, which at eight ranks of 4,096
rows takes longer to enqueue a hop than a GPU to compute it. A graph holds the same kernels, copies
and dependencies, so that what is timed is the device's work and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ringspan.attention.exposure import Exposure
from ringspan.deploy.bench.timing import Run

CAPTURED = "the ranks' work as a CUDA graph"
"""What a row's note says."""


def captured(
    once: Callable[[torch.cuda.Stream], object],
    exposures: Sequence[Exposure],
    device: torch.device,
) -> Run:
    """once(stream): one run, enqueued on `stream` and what joins it again. It ran before: nothing
    is left to compile or to allocate for good."""
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    for exposure in exposures:
        exposure.off = True  # an event within a graph has no time
    try:
        stream.wait_stream(torch.cuda.current_stream(device))
        once(stream)
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
            once(stream)
    finally:
        for exposure in exposures:
            exposure.off = False

    def run(calls: int) -> None:
        for _ in range(calls):
            graph.replay()

    return run
