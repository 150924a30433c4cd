"""One CUDA graph of a padded batch: it serves sequences that come and go, and leaves all other bytes as they were."""

from __future__ import annotations

import pytest
from conftest import backend_of
from padded_batch import INACTIVE, PaddedBatch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("inactive", INACTIVE)
def test_a_graph_leaves_pages_of_others_alone(inactive: str) -> None:
    """Captured while nobody is there; sequences come and go for 50 replays, each of which appends a token per row."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        batch = PaddedBatch(backend_of("cuda"), inactive)
        batch.step()  # compiles
        batch.check("before the capture")
        stream.begin_capture()
        batch.step()
        graph = stream.end_capture()
        batch.run(lambda: graph.launch(stream), 50)
