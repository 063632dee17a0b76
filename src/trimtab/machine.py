"""The machine: which device and dtype to use, what it is called, and what its memory can still hold."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

from trimtab.errors import ModelError, RoomError, nearest

Dtype = torch.dtype

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str | None, dtype: str | None) -> tuple[str, Dtype, str]:
    """Pick device and dtype, with the reason in words."""
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}.", nearest(dtype, DTYPES))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        why = "the only device here" if device == "cpu" else "an accelerator is here"
    else:
        why = "asked for"
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"device {device!r} cannot be used: {error}", "Try cpu.") from None
    if dtype is not None:
        return device, DTYPES[dtype], f"{device} ({why}), {dtype} (asked for)"
    if device.startswith("cuda") and torch.cuda.is_bf16_supported():
        return device, torch.bfloat16, f"{device} ({why}), bfloat16 (native here)"
    return device, torch.float32, f"{device} ({why}), float32 (exact; half precision is not faster on this device)"


def require_room(needed: int, dtype: Dtype, device: str, mend: str = "") -> None:
    """Refuse weights that memory cannot hold before they are fetched or read; the system would end the process without a word.

    Raises:
        RoomError: too large.
    """
    if (free := free_memory(device)) and needed > free:
        half = "Try --dtype bfloat16, a smaller model," if dtype == torch.float32 else "Try a smaller model,"
        raise RoomError(
            f"this model is too large: its weights take {needed / 1e9:.1f} GB as {str(dtype).removeprefix('torch.')}, and {free / 1e9:.1f} GB are free on {device}.",
            mend or f"{half} or (to evaluate or judge) serve it elsewhere and give URL#MODEL.",
        )


def free_memory(device: str) -> int:
    """Bytes that a device can still take, within the limit of a container; 0 where that cannot be told."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    free = 1024 * next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no container, or "max": no limit
        return free
    return min(free, limit - used)


def describe_machine(device: torch.device) -> str:
    """The device in words, for cost lines: `Intel(R) Xeon(R) Processor, 2 threads`."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        model = match.group(1) if match else model
    return f"{model}, {torch.get_num_threads()} threads"
