"""`nnslim doctor`: what this machine can do."""

from __future__ import annotations

import typer


def doctor() -> None:
    """Explain this machine: versions, what is compatible, which CPU and GPU features there are, where files go."""
    from nnslim.doctor import examine

    findings = examine()
    for line in findings.lines():
        typer.echo(line)
    if not findings.usable:
        raise typer.Exit(1)
