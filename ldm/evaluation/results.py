"""A result is a figure together with the protocol that decides it, and one hash of that protocol."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from ldm.evaluation.figures import Figure

SHORT = 12


def protocol_hash(protocol: Mapping[str, object]) -> str:
    """sha256 of a protocol as JSON with sorted keys. TypeError for what is no JSON value."""
    text = json.dumps(protocol, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def digest(values: object) -> str:
    """sha256 of a long list, such as prompts, for a protocol that need not repeat it."""
    return protocol_hash({"": values})


@dataclass(frozen=True)
class Result:
    """One figure. `of` says of which pictures; `protocol` is everything that decides the number, as JSON values."""

    metric: str
    of: str
    figure: Figure
    protocol: Mapping[str, object]
    unit: str = ""
    notes: tuple[str, ...] = ()
    details: Mapping[str, object] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """sha256 of the metric's name and its protocol: equal hashes are comparable numbers."""
        return protocol_hash({"metric": self.metric, "of": self.of, **self.protocol})

    @property
    def value(self) -> str:
        """The value with its unit."""
        return f"{self._number(self.figure.value)}{f' {self.unit}' if self.unit else ''}"

    @property
    def interval(self) -> str:
        """The 95 % interval, or nothing."""
        if self.figure.interval is None:
            return ""
        low, high = self.figure.interval
        return f"{self._number(low)} to {self._number(high)}"

    def _number(self, value: float) -> str:
        """Shares in per cent; other values with four digits."""
        return f"{100 * value:.1f}" if self.unit == "%" else f"{value:.4g}"

    def __str__(self) -> str:
        between = f"95 %: {self.interval}; " if self.interval else ""
        return (
            f"{self.metric}, {self.of}: {self.value} ({between}{self.figure.count:,} pictures; "
            f"protocol {self.hash[:SHORT]})"
        )

    def as_json(self) -> dict[str, object]:
        """All of it as JSON values."""
        return {
            "metric": self.metric,
            "of": self.of,
            "value": self.figure.value,
            "interval_95": self.figure.interval,
            "count": self.figure.count,
            "unit": self.unit,
            "protocol_sha256": self.hash,
            "protocol": dict(self.protocol),
            "notes": list(self.notes),
            "details": dict(self.details),
        }
