"""Peak memory of a stretch of work: of the device where there is one, else of the process."""

import re
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """While in scope, watches; afterwards `nbytes` is the peak, or None where this system does not report it.

    On a CPU it is the process's resident memory (`kind` is "process"), libraries and model included.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kind = "device" if device.type == "cuda" else "process"
        self.nbytes: int | None = None

    def __enter__(self) -> "Peak":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):
                _RESET.write_text("5")  # Linux: the high-water mark starts anew
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.nbytes = torch.cuda.max_memory_allocated(self.device)
        else:
            with suppress(OSError):
                found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
                self.nbytes = int(found[1]) * 1024 if found else None
