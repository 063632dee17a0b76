"""What this machine can do: doctor."""

from __future__ import annotations

from trimtab.verbs.common import finish
from trimtab.verbs.options import Json


def doctor(as_json: Json = False) -> None:
    """What this machine can do, and why not."""
    from trimtab.doctor import examine, print_findings
    from trimtab.run import screen

    findings = examine()
    print_findings(findings, screen(as_json))
    finish(as_json, {"findings": findings})
