"""Steps of the value search as compiled functions, to be timed beside captured ones (`retcon.memory.values.captured`).

A step has hooks and takes gradients, which torch.compile doesn't follow. So its operations are recorded once, gradients
included, and the flat list of them is compiled.
"""

import time
from collections.abc import Callable

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from retcon.memory.values.captured import Capture, cuda_graphs


class CompiledSteps:
    """A capture that compiles; on CUDA the compiled step is then launched as one, as captured steps are.

    Args:
        backend: of torch.compile.
    """

    def __init__(self, device_type: str, backend: str = "inductor") -> None:
        self.device_type, self.backend = device_type, backend
        self.seconds: list[float] = []
        """What compiling took, by step."""

    def __call__(self) -> Capture:
        """Return the capture of one chunk's steps."""
        launched_as_one = cuda_graphs() if self.device_type == "cuda" else None

        def capture(work: Callable[[], None]) -> Callable[[], None]:
            began = time.perf_counter()
            operations = make_fx(lambda: work())()
            step = torch.compile(operations, backend=self.backend, dynamic=False, fullgraph=True)

            def run() -> None:
                with torch.no_grad():
                    step()

            run()  # compiles; the next batch is copied over what it leaves
            if self.device_type == "cuda":
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - began)
            return run if launched_as_one is None else launched_as_one(run)

        return capture
